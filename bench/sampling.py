"""Where our server's time goes: py-spy looks at it a few hundred times a second while it is loaded."""

import asyncio
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from bench import install
from bench.load import LoadFailed
from bench.measure import Session, started
from bench.peers.base import Peer, PeerUnavailable
from bench.peers.ours import Ours
from bench.processes import output

_TIMES_A_SECOND = 250
_LINES = 30


async def profiles(
    session: Session, peers: Iterable[Peer], seconds: float
) -> dict[str, dict[str, list[tuple[str, float]]]]:
    """For each of Kamiyo's lines: the functions by their own share of samples, and by their share with callees."""
    try:
        tools = await asyncio.to_thread(install.python_environment, "tools", install.TOOLS)
    except PeerUnavailable as error:
        print(f"LEFT OUT: the profile: {error}", file=sys.stderr)
        return {}
    found = {}
    for peer in peers:
        if isinstance(peer, Ours) and peer.name != "kamiyo-two":
            try:
                found[peer.name] = await _profile(session, peer, tools.parent / "py-spy", max(seconds, 3))
            except LoadFailed as error:
                print(f"LEFT OUT: the profile of {peer.label}: {error}", file=sys.stderr)
    return found


async def _profile(session: Session, peer: Peer, py_spy: Path, seconds: float) -> dict[str, list[tuple[str, float]]]:
    out = session.folder / "samples"
    async with session.lab.connected(peer.database) as db:
        await session.lab.empty(db, peer.schemas, peer.kept)
        await peer.refill(db, session.coming(40_000 * (seconds + 4)))
    async with started(session, peer) as (port, pids):
        await session.fire(peer.path, port, connections=64, seconds=1, expect=30_000)
        # It takes a moment to begin looking; a little more load than it needs makes sure there is some at its end.
        watching = asyncio.create_task(
            output(
                [
                    *(str(py_spy), "record", "--pid", str(pids["server"]), "--subprocesses", "--gil"),
                    *("--format", "raw", "--rate", str(_TIMES_A_SECOND)),
                    *("--duration", str(int(seconds)), "--output", str(out)),
                ]
            )
        )
        await session.fire(peer.path, port, connections=64, seconds=seconds + 2, expect=20_000)
        status, _, said = await watching
    if status:
        raise LoadFailed(f"py-spy: {said.strip()}")
    shares = summary(out.read_text())
    out.unlink()
    return shares


def summary(raw: str) -> dict[str, list[tuple[str, float]]]:
    """From py-spy's raw format (`frame;frame;… count` in each line): the top functions, shares in percent.

    Only samples that hold the interpreter's lock are in it, so waiting is not. Frames that everything runs under (the
    command line, the event loop) are left out of the shares with callees.
    """
    own: Counter[str] = Counter()
    within: Counter[str] = Counter()
    total = 0
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        frames = [_short(frame) for frame in stack.split(";")]
        total += int(count)
        own[frames[-1]] += int(count)
        for frame in set(frames):
            within[frame] += int(count)

    def top(counts: Counter[str], most: float) -> list[tuple[str, float]]:
        shares = [(name, round(100 * count / max(total, 1), 1)) for name, count in counts.most_common()]
        return [(name, share) for name, share in shares if share < most][:_LINES]

    return {"own": top(own, 101), "with callees": top(within, 90)}


def _short(frame: str) -> str:
    """`run (kamiyo/receive.py:120)` without the line, so that a function is one line of the profile."""
    name, _, place = frame.partition(" (")
    if not place:
        return name.partition('"')[0]
    return f"{name} ({place.rpartition(':')[0] or place.rstrip(')')})"
