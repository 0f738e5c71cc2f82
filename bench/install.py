"""Peers' libraries: fetched once, into `bench/.cache`, by pip and npm, from locks with hashes."""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.peers.base import ROOT, PeerUnavailable
from bench.processes import output

CACHE = ROOT / "bench" / ".cache"
TOOLS = ROOT / "requirements-bench.txt"


def python_environment(name: str, lock: Path) -> Path:
    """The Python of an environment with exactly what `lock` names. Raises PeerUnavailable."""
    folder = CACHE / f"{name}-{_fingerprint(lock)}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        _say(f"installing {lock.relative_to(ROOT)} into {folder.relative_to(ROOT)} (once)")
        _do([sys.executable, "-m", "venv", str(folder)])
        _do([str(python), "-m", "pip", "install", "--quiet", "--require-hashes", "-r", str(lock)])
        (folder / "complete").touch()
    return python


def node_environment(name: str, source: Path) -> Path:
    """The `node_modules` with exactly what the lock in `source` names. Raises PeerUnavailable."""
    if not (shutil.which("node") and shutil.which("npm")):
        raise PeerUnavailable("node and npm are not installed")
    files = [source / "package.json", source / "package-lock.json"]
    folder = CACHE / f"{name}-{_fingerprint(*files)}"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _say(f"installing {source.relative_to(ROOT)}/package.json into {folder.relative_to(ROOT)} (once)")
        for file in files:
            shutil.copy(file, folder)
        _do(["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"], folder)
        (folder / "complete").touch()
    return folder / "node_modules"


async def run(words: Sequence[str], *, env: Mapping[str, str]) -> None:
    """Run a step of a peer's preparation to its end. Raises PeerUnavailable with what it said when it failed."""
    status, out, err = await output(words, env=env)
    if status:
        raise PeerUnavailable(f"{' '.join(words[:4])}: {_tail(out + err)}")


def _do(words: Sequence[str], folder: Path | None = None) -> None:
    try:
        done = subprocess.run(
            words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
    except OSError as error:
        raise PeerUnavailable(f"{words[0]}: {error.strerror}") from error
    if done.returncode:
        raise PeerUnavailable(f"{' '.join(words[:4])}: {_tail(done.stdout)}")


def _tail(said: str) -> str:
    return "\n".join(said.strip().splitlines()[-8:])


def _fingerprint(*files: Path) -> str:
    """Of the files' contents and this Python's version: a changed lock makes a new environment."""
    digest = hashlib.sha256(repr(sys.version_info[:3]).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)
