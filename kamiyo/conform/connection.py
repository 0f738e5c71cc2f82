"""How bytes can arrive: far too many, far too slowly, and from somebody who has stopped talking."""

import asyncio
import time
from contextlib import AsyncExitStack

from kamiyo.conform import samples
from kamiyo.conform.check import check
from kamiyo.conform.samples import Sample
from kamiyo.conform.target import NOTHING_TO_OBSERVE, Fault, Target, Unseen, told
from kamiyo.conform.wire import Answer, Ending, Wire, connected, head

_MIB = 1024 * 1024
_DECLARED = 1024 * _MIB
_CHUNKED = 8 * _MIB
_PIECE = 256 * 1024

# Seconds to give the receiver to answer between two pieces of a body that it should not want.
_BETWEEN_PIECES = 0.02

# Seconds in which a length that is far too great must be refused.
_REFUSAL = 5.0

# Connections with a slow body at the same time, the pieces each comes in, and the deliveries made meanwhile.
_SLOW = 8
_PIECES = 12
_MEANWHILE = 5

_FOREIGN = f"t=%d,v1={'0' * 64}"


@check(
    "1 MiB and more",
    "Whoever reads a whole body before looking at the signature lets anyone fill its memory. Beyond a limit "
    "it must be refused (413) or cut off without being read to its end; and the next delivery must work.",
)
async def too_large(target: Target) -> str:
    """Announce 1 GiB; send 8 MiB without announcing them; send a signed event of 1 MiB and one byte."""
    await _announce_a_gibibyte(target)
    await _send_chunks(target)
    sample = samples.padded(_MIB + 1)
    answer = await target.post(sample.body, target.signature(sample.body))
    if not (answer.accepted or answer.refused or answer.left):
        raise Fault(f"a signed event of 1 MiB and one byte: {told(answer)}")
    await target.accepts(samples.customer(), what="the next delivery")
    return f"refused unread; a signed one of 1 MiB is {'accepted' if answer.accepted else 'refused'}"


async def _announce_a_gibibyte(target: Target) -> None:
    async with connected(target.address, target.timeout) as wire:
        await wire.send(head(target.address, [_forged()], _DECLARED) + b" " * 1024)
        answer = await wire.answer(min(_REFUSAL, target.timeout))
    if answer.ending is Ending.silent:
        raise Fault("1 GiB announced, unsigned: it waits for all of it")
    _require_refusal(answer, "1 GiB announced, unsigned")


async def _send_chunks(target: Target) -> None:
    chunk = b"%x\r\n" % _PIECE + b" " * _PIECE + b"\r\n"
    async with connected(target.address, target.timeout) as wire:
        await wire.send(head(target.address, [_forged()], None))
        for _ in range(_CHUNKED // _PIECE):
            if await wire.answered_within(_BETWEEN_PIECES) or not await wire.send(chunk):
                break
        else:
            raise Fault("8 MiB in chunks, unsigned: not refused before its end")
        _require_refusal(await wire.answer(target.timeout), "8 MiB in chunks, unsigned")


def _require_refusal(answer: Answer, what: str) -> None:
    if not (answer.refused or answer.left):
        raise Fault(f"{what}: {told(answer)}")


@check(
    "slow body",
    "A body that trickles, from a bad line or on purpose, must cost its own connection only. A receiver with "
    "a few workers that wait for it answers nobody else meanwhile.",
)
async def slow_body(target: Target) -> str:
    """Trickle eight signed bodies for some seconds, and deliver others meanwhile."""
    slow = [samples.customer() for _ in range(_SLOW)]
    async with AsyncExitStack() as stack:
        wires = [await stack.enter_async_context(connected(target.address, target.timeout)) for _ in range(_SLOW)]
        began = time.monotonic()
        trickles = [asyncio.create_task(_trickle(target, wire, one)) for wire, one in zip(wires, slow, strict=True)]
        try:
            for _ in range(_MEANWHILE):
                await target.accepts(samples.customer(), what="another delivery meanwhile")
            if time.monotonic() - began >= target.trickle_seconds:
                raise Fault("the other deliveries had to wait for it")
            answers = await asyncio.gather(*trickles)
        finally:
            for trickle in trickles:
                trickle.cancel()
    for answer in answers:
        if not (answer.accepted or answer.refused or answer.left):
            raise Fault(f"the slow one itself: {told(answer)}")
    ending = "accepted" if all(answer.accepted for answer in answers) else "refused"
    return f"others are answered meanwhile; it is {ending} itself"


async def _trickle(target: Target, wire: Wire, sample: Sample) -> Answer:
    await wire.send(head(target.address, [target.signature(sample.body)], len(sample.body)))
    size = -(-len(sample.body) // _PIECES)
    for start in range(0, len(sample.body), size):
        if await wire.answered_within(target.trickle_seconds / _PIECES):
            break
        if not await wire.send(sample.body[start : start + size]):
            break
    return await wire.answer(target.timeout)


@check(
    "half-closed connection",
    "A sender, or a proxy between, may close its half as soon as it has sent, or in the middle. The receiver "
    "must come to an end with it: an answer or a closed connection, never a connection that stays for ever, "
    "nor half an event.",
)
async def half_closed(target: Target) -> str:
    """Close the sending half after the last byte, and in the middle; then deliver both again, whole."""
    whole, half = samples.customer(), samples.customer()
    ending = await _half_close(target, whole, whole.body)
    if not (ending.accepted or ending.refused or ending.left):
        raise Fault(f"closed after the last byte: {told(ending)}")
    cut = await _half_close(target, half, half.body[: len(half.body) // 2])
    if not (cut.refused or cut.left):
        raise Fault(f"closed half way: {told(cut)}")
    seen = False
    for what, one in (
        ("closed after the last byte, then again", whole),
        ("closed half way, then again", half),
    ):
        await target.accepts_again(one, what=what)
        seen = await target.effect(one, what=what)
    first = "accepted" if ending.accepted else "refused" if ending.refused else "left unanswered"
    return f"{first}; the redelivery is accepted{', and stored once' if seen else '; ' + NOTHING_TO_OBSERVE}"


async def _half_close(target: Target, sample: Sample, sent: bytes) -> Answer:
    async with connected(target.address, target.timeout) as wire:
        await wire.send(head(target.address, [target.signature(sample.body)], len(sample.body)) + sent)
        if not wire.half_close():
            raise Unseen("over TLS there is no half-closed connection; ask the receiver behind it")
        return await wire.answer(target.timeout)


def _forged() -> str:
    return _FOREIGN % int(time.time())


CHECKS = (too_large, slow_body, half_closed)
