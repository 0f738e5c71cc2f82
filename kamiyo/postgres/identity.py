"""Who the embedded server runs as. PostgreSQL refuses to run as root, so for root that is a user id of its own."""

import os
import pwd
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kamiyo.postgres.problems import EmbeddedPostgresError

_ROOTS_SERVER_IDS: Final = range(60800, 60810)
"""User ids a server of root's may run as, the first that nobody has. They lie where no one gives out any by
itself: above useradd's (to 60000), and between systemd's (its UIDS-GIDS document: 60706-61183 is unused)."""


def _environment() -> dict[str, str]:
    """Nothing of the user's PG… variables: some of them (PGPORT, PGDATA, PGOPTIONS) change a server."""
    kept = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
    return {"LC_ALL": "C", **{name: os.environ[name] for name in kept if name in os.environ}}


@dataclass(frozen=True)
class As:
    """How to run a program as somebody else: words before the command, or the user subprocess switches to."""

    prefix: tuple[str, ...] = ()
    user: int | None = None
    group: int | None = None

    def popen(self, command: list[str], output: int) -> subprocess.Popen[bytes]:
        """Start it, apart from this process's terminal: Ctrl-C does not reach it."""
        return subprocess.Popen(  # noqa: S603 - PostgreSQL's own programs; no shell, no outsider's words
            [*self.prefix, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd="/",
            env=_environment(),
            start_new_session=True,
            user=self.user,
            group=self.group,
            extra_groups=None if self.user is None else [],
        )

    def run(self, command: list[str]) -> tuple[int, str]:
        """Run it to its end: its exit status, and what it said on both outputs."""
        with tempfile.TemporaryFile() as output:
            # A file and not a pipe: a child it leaves behind would hold a pipe open.
            with self.popen(command, output.fileno()) as process:
                try:
                    status = process.wait()
                except BaseException:
                    # Ctrl-C, which it does not get by itself.
                    process.kill()
                    raise
            output.seek(0)
            return status, output.read().decode(errors="replace")


@dataclass(frozen=True)
class Identity:
    """Who the server runs as, and initdb, which asks for a user with a name."""

    uid: int
    server: As
    initdb: As
    initdb_uid: int

    def give(self, path: int | Path) -> None:
        """Make it the server's own."""
        if self.uid != os.geteuid():
            os.chown(path, self.uid, group_of(self.uid))

    def give_tree(self, tree: Path) -> None:
        """Make everything in it the server's own, where it is not: initdb just made it, or root copied it."""
        if tree.stat().st_uid == self.uid:
            return
        for folder, _, files in os.walk(tree):
            for name in ("", *files):
                os.chown(os.path.join(folder, name), self.uid, group_of(self.uid), follow_symlinks=False)


def identity_for(folder: Path, binaries: Path) -> Identity:
    """Choose who runs the server of `folder`.

    An ordinary user: that user. For root, which PostgreSQL refuses:

    1. whoever owns the data already;
    2. else a user id that nobody has, so that nobody else can come to its socket. Nothing is added to the
       system's users: only initdb asks for a name, and it runs as `nobody` for its second. The id may pass
       every folder (CAP_DAC_OVERRIDE), for root keeps its projects where others cannot go (/root), and no
       mode is changed there;
    3. where root may not do that (a container without the capabilities): `nobody`, if it can come to the
       folder and the binaries;
    4. where none of these will do: root itself, in a user namespace that shows it another id.

    Raises EmbeddedPostgresError if nothing of it is possible.
    """
    me = os.geteuid()
    if me != 0:
        return Identity(me, As(), As() if _has_name(me) else _renamed(), me)
    nobody = pwd.getpwnam("nobody").pw_uid
    passes = _possible(_passing(nobody))
    data = folder / "data"
    uid = (data if data.exists() else folder).stat().st_uid
    if uid == 0:
        uid = next((uid for uid in _ROOTS_SERVER_IDS if not _has_name(uid)), nobody) if passes else nobody
    # Whoever has a name, or an id of somebody's, gets no right that he has not by himself.
    server = _passing(uid) if passes and uid in _ROOTS_SERVER_IDS else As(user=uid, group=group_of(uid))
    try:
        os.chown(folder, uid, group_of(uid))
    except OSError:
        return Identity(0, _renamed(), _renamed(), 0)
    if not _possible(server, folder, binaries):
        os.chown(folder, 0, 0)
        return Identity(0, _renamed(), _renamed(), 0)
    if passes:
        return Identity(uid, server, _passing(nobody), nobody)
    return Identity(uid, server, server, uid)


def _passing(uid: int) -> As:
    """As `uid`, with the right to pass and read every folder.

    `no_setuid_fixup`, because the server looks at its own binary with access(2), which leaves a capability
    out of account without it (capabilities(7), access(2)).
    """
    return As(
        (
            "setpriv",
            f"--reuid={uid}",
            f"--regid={group_of(uid)}",
            "--clear-groups",
            "--inh-caps=+dac_override",
            "--ambient-caps=+dac_override",
            "--securebits=+no_setuid_fixup",
            "--",
        )
    )


def _renamed() -> As:
    """As oneself, under another id: in a user namespace in which this user is `nobody`."""
    nobody = pwd.getpwnam("nobody")
    renamed = As(
        ("unshare", "--user", f"--map-user={nobody.pw_uid}", f"--map-group={nobody.pw_gid}", "--"),
    )
    if _possible(renamed):
        return renamed
    if os.geteuid() == 0:
        problem = "PostgreSQL refuses to run as root, and no other user here may enter its folders."
    else:
        problem = f"User id {os.geteuid()} has no name on this system (/etc/passwd), and PostgreSQL asks for one."
    raise EmbeddedPostgresError(f"{problem} Run as an ordinary user, or name a PostgreSQL of your own in DATABASE_URL.")


def _possible(way: As, *reached: Path) -> bool:
    """Whether programs can be run this way, and come to these folders."""
    try:
        return all(way.run(["test", "-x", str(path)])[0] == 0 for path in (Path("/"), *reached))
    except (OSError, subprocess.SubprocessError):
        return False


def _has_name(uid: int) -> bool:
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    return True


def name_of(uid: int) -> str:
    """The user's name, or its number where the system knows none."""
    return pwd.getpwuid(uid).pw_name if _has_name(uid) else str(uid)


def group_of(uid: int) -> int:
    """The user's own group; where the system does not know the user, the group of the same number."""
    return pwd.getpwuid(uid).pw_gid if _has_name(uid) else uid
