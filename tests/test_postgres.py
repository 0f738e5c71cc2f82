"""The embedded PostgreSQL: who shares it, who stops it, and what is left when somebody is killed.

Users are processes of their own here, for locks and process ids are between processes.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import asyncpg
import psutil
import pytest

from kamiyo.errors import DatabaseUnavailable
from kamiyo.postgres import EmbeddedPostgres, EmbeddedPostgresError, temporary_postgres

ROOT = Path(__file__).resolve().parent.parent
INSTALLED = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
"""PostgreSQLs of Debian's, if there are any."""

# A signal that comes just before a process begins to wait does not end its wait; through the pipe it does.
USER = """
import select, signal, socket, sys
from pathlib import Path
from kamiyo.postgres import EmbeddedPostgres

heard, tell = socket.socketpair()
tell.setblocking(False)
signal.set_wakeup_fd(tell.fileno())
# Whoever runs the tests in the background may have it ignored; a terminal's programs have not.
signal.signal(signal.SIGINT, signal.default_int_handler)
with EmbeddedPostgres.start(Path(sys.argv[1]), durable=False) as server:
    try:
        print(server.pid, server.url, flush=True)
        select.select([sys.stdin, heard], [], [])
    except KeyboardInterrupt:
        pass
print("left", flush=True)
"""


class User:
    """Another process that uses the server of `folder`, until told to leave."""

    def __init__(self, folder: Path, *wrapped_by: str) -> None:
        self.process = subprocess.Popen(
            [*wrapped_by, sys.executable, "-c", USER, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            start_new_session=True,
        )
        said = _piped(self.process.stdout).readline().split()
        assert said, "it did not start"
        self.server, self.url = int(said[0]), said[1]

    def leave(self) -> None:
        _piped(self.process.stdin).write("\n")
        _piped(self.process.stdin).flush()
        self.has_left()

    def has_left(self) -> None:
        assert _piped(self.process.stdout).readline() == "left\n"
        self.process.wait()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def _piped(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


NewUser = Callable[..., User]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once: initdb takes most of a second."""
    place = tmp_path_factory.mktemp("cluster") / "postgres"
    EmbeddedPostgres.start(place, durable=False).stop()
    return place


@pytest.fixture
def folder(cluster: Path) -> Iterator[Path]:
    """The folder of a cluster that does not run. Whatever runs on it afterwards is ended."""
    assert _servers(cluster) == []
    yield cluster
    _end_servers(cluster)


@pytest.fixture
def new_user(folder: Path) -> Iterator[NewUser]:
    users: list[User] = []

    def make(*wrapped_by: str) -> User:
        users.append(User(folder, *wrapped_by))
        return users[-1]

    yield make
    for user in users:
        with user.process:
            user.process.kill()


def _copy(cluster: Path, place: Path) -> None:
    shutil.copytree(cluster / "data", place / "data")


def _servers(folder: Path) -> list[psutil.Process]:
    """Every process of PostgreSQL's that works on this folder's data, in whatever state."""
    return [process for process in psutil.process_iter() if _cwd(process).startswith(str(folder))]


def _cwd(process: psutil.Process) -> str:
    try:
        return str(process.cwd())
    except psutil.Error:
        return ""


def _end_servers(folder: Path) -> None:
    left = _servers(folder)
    for process in left:
        # What is left of a server that was killed ends by itself, perhaps at this moment.
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=60)


def _ask(url: str, query: str) -> object:
    async def ask() -> object:
        connection = await asyncpg.connect(url)
        try:
            return await connection.fetchval(query)
        finally:
            await connection.close()

    return asyncio.run(ask())


def test_a_first_start_makes_a_durable_database_and_the_next_one_finds_its_rows(tmp_path: Path) -> None:
    place = tmp_path / "new" / "postgres"
    with EmbeddedPostgres.start(place) as server:
        for setting in ("fsync", "full_page_writes", "synchronous_commit", "data_checksums"):
            assert _ask(server.url, f"SHOW {setting}") == "on"
        assert _ask(server.url, "SHOW listen_addresses") == ""
        assert _ask(server.url, "SELECT current_database() || ' ' || current_user") == "kamiyo postgres"
        _ask(server.url, "CREATE TABLE kept AS SELECT 7 AS number")
    with EmbeddedPostgres.start(place) as server:
        assert _ask(server.url, "SELECT number FROM kept") == 7
    assert _servers(place) == []


def test_nobody_but_the_owner_can_come_to_the_socket_or_read_the_data(folder: Path) -> None:
    with EmbeddedPostgres.start(folder) as server:
        socket = folder / ".s.PGSQL.5432"
        for private in (socket, server.log, folder / "data", folder / "users.lock"):
            assert stat.S_IMODE(private.stat().st_mode) & 0o077 == 0, private


def test_two_processes_share_one_server_and_only_the_last_to_leave_stops_it(folder: Path, new_user: NewUser) -> None:
    first, second = new_user(), new_user()
    assert first.server == second.server
    first.leave()
    assert _ask(second.url, "SELECT 1") == 1
    second.leave()
    assert _servers(folder) == []


def test_whoever_starts_at_the_same_moment_makes_one_cluster_and_starts_one_server(tmp_path: Path) -> None:
    place = tmp_path / "postgres"
    handles: list[EmbeddedPostgres] = []
    starters = [
        threading.Thread(target=lambda: handles.append(EmbeddedPostgres.start(place, durable=False))) for _ in range(3)
    ]
    for starter in starters:
        starter.start()
    for starter in starters:
        starter.join()
    assert len(handles) == 3
    assert len({handle.pid for handle in handles}) == 1
    assert (place / "server.log").read_text().count("starting PostgreSQL") == 1
    for handle in handles:
        handle.stop()
        handle.stop()
    assert _servers(place) == []


def test_a_killed_process_is_no_longer_counted_so_the_last_living_one_stops_the_server(
    folder: Path, new_user: NewUser
) -> None:
    killed, living = new_user(), new_user()
    killed.kill()
    assert _ask(living.url, "SELECT 1") == 1
    living.leave()
    assert _servers(folder) == []


def test_a_server_that_outlived_all_its_users_is_adopted_and_then_stopped(folder: Path, new_user: NewUser) -> None:
    killed = new_user()
    killed.kill()
    assert psutil.pid_exists(killed.server)
    with EmbeddedPostgres.start(folder) as server:
        assert server.pid == killed.server
        assert _ask(server.url, "SELECT 1") == 1
    assert _servers(folder) == []


def test_ctrl_c_reaches_the_users_and_not_the_server_they_still_need(folder: Path, new_user: NewUser) -> None:
    interrupted, other = new_user(), new_user()
    # The terminal sends it to everybody in the foreground group: whoever the first user started, too.
    os.killpg(interrupted.process.pid, signal.SIGINT)
    interrupted.has_left()
    assert _ask(other.url, "SELECT 1") == 1
    other.leave()
    assert _servers(folder) == []


def test_everything_killed_at_once_is_recovered_by_the_next_start(folder: Path, new_user: NewUser) -> None:
    user = new_user()
    _ask(user.url, "CREATE TABLE kept AS SELECT 7 AS number")
    user.kill()
    psutil.Process(user.server).kill()
    with EmbeddedPostgres.start(folder) as server:
        assert server.pid != user.server
        assert _ask(server.url, "SELECT number FROM kept") == 7


def test_a_process_id_that_belongs_to_somebody_else_since_a_power_cut_does_not_stop_the_start(
    folder: Path, new_user: NewUser
) -> None:
    user = new_user()
    user.kill()
    psutil.Process(user.server).kill()
    _end_servers(folder)
    pid_file = folder / "data" / "postmaster.pid"
    # PostgreSQL lets its own parent's id pass, so another living process of its user has to have it.
    owner = str(pid_file.stat().st_uid)
    switch = ["setpriv", f"--reuid={owner}", "--clear-groups"] if os.geteuid() == 0 else []
    with subprocess.Popen([*switch, "cat"], stdin=subprocess.PIPE) as stranger:
        for lock in (pid_file, folder / ".s.PGSQL.5432.lock"):
            _, *lines = lock.read_text().splitlines()
            lock.write_text("\n".join([str(stranger.pid), *lines]) + "\n")
        with EmbeddedPostgres.start(folder) as server:
            assert _ask(server.url, "SELECT 1") == 1
        assert stranger.poll() is None


def test_a_server_that_died_under_its_users_comes_back_at_the_same_address(folder: Path) -> None:
    with EmbeddedPostgres.start(folder) as server:
        address, before = server.url, server.pid
        assert before is not None
        psutil.Process(before).kill()
        server.ensure_running()
        assert server.pid not in (None, before)
        assert server.url == address
        assert _ask(address, "SELECT 1") == 1
        again = server.pid
        server.ensure_running()
        assert server.pid == again


def test_a_start_waits_for_the_sessions_of_a_killed_server_to_end(folder: Path, new_user: NewUser) -> None:
    user = new_user()
    session = asyncio.run(_stopped_session(user.url))
    user.kill()
    psutil.Process(user.server).kill()
    # Another story's start may have waited as well, and the log is that of all of them.
    log, before = folder / "server.log", (folder / "server.log").read_text()
    handles: list[EmbeddedPostgres] = []
    starter = threading.Thread(target=lambda: handles.append(EmbeddedPostgres.start(folder)))
    starter.start()
    _wait_until(lambda: "is still in use" in log.read_text().removeprefix(before))
    session.resume()
    starter.join()
    with handles[0] as server:
        assert _ask(server.url, "SELECT 1") == 1


async def _stopped_session(url: str) -> psutil.Process:
    """A session's process that cannot notice anything any more, its server's death included."""
    connection = await asyncpg.connect(url)
    session = psutil.Process(await connection.fetchval("SELECT pg_backend_pid()"))
    session.suspend()
    connection.terminate()
    return session


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def test_a_folder_too_deep_for_a_socket_works_all_the_same_and_leaves_nothing_behind(
    cluster: Path, tmp_path: Path
) -> None:
    deep = tmp_path / ("a folder, with %41 and 'quotes' " * 3) / ("é" * 60) / "postgres"
    deep.parent.mkdir(parents=True)
    _copy(cluster, deep)
    with EmbeddedPostgres.start(deep) as server, EmbeddedPostgres.start(deep) as joined:
        assert joined.url == server.url
        sockets = Path(str(_ask(server.url, "SHOW unix_socket_directories")))
        assert sockets.is_dir()
        server.restart(immediate=True)
        assert joined.url == server.url
        assert _ask(joined.url, "SELECT 1") == 1
    assert not sockets.exists()
    assert _servers(deep) == []


def test_data_of_another_version_is_left_alone_and_the_sentence_names_both(tmp_path: Path) -> None:
    folder = tmp_path / "postgres"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "PG_VERSION").write_text("13\n")
    with pytest.raises(EmbeddedPostgresError, match=r"made by PostgreSQL 13, and this is PostgreSQL 18.*pg_dump"):
        EmbeddedPostgres.start(folder)
    assert (folder / "data" / "PG_VERSION").read_text() == "13\n"
    assert issubclass(EmbeddedPostgresError, DatabaseUnavailable)


def test_a_start_that_fails_says_why_and_where_the_log_is_and_leaves_no_process(folder: Path) -> None:
    with pytest.raises(EmbeddedPostgresError) as raised:
        EmbeddedPostgres.start(folder, settings={"shared_buffers": "a lot"})
    said = str(raised.value)
    assert 'invalid value for parameter "shared_buffers": "a lot"' in said
    assert "One of the settings given is wrong" in said
    assert str(folder / "server.log") in said
    assert _servers(folder) == []


def test_a_place_that_is_no_folder_is_a_sentence_and_not_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EmbeddedPostgresError, match=r"cannot use .*/file/postgres: Not a directory"):
        EmbeddedPostgres.start(tmp_path / "file" / "postgres")


def test_a_cluster_whose_making_was_interrupted_is_made_again(tmp_path: Path) -> None:
    half = tmp_path / "postgres" / "data.new"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")
    with EmbeddedPostgres.start(tmp_path / "postgres", durable=False) as server:
        assert _ask(server.url, "SELECT 1") == 1
    assert not half.exists()


def test_the_log_has_no_statement_and_no_value(folder: Path) -> None:
    with EmbeddedPostgres.start(folder) as server:
        _ask(server.url, "CREATE TABLE people (address text PRIMARY KEY CHECK (address <> 'secret'), n int)")
        _ask(server.url, "INSERT INTO people VALUES ('jenny@example.com')")
        for wrong in (
            "VALUES ('jenny@example.com')",
            "VALUES ('secret')",
            "SELECT 'jenny@example.com', 'secret'::int",
        ):
            with pytest.raises(asyncpg.PostgresError):
                _ask(server.url, f"INSERT INTO people {wrong}")
        log = server.log.read_text()
    assert "ready to accept connections" in log
    assert "jenny" not in log
    assert "secret" not in log


def test_a_temporary_server_takes_settings_is_restarted_and_is_gone_afterwards() -> None:
    with temporary_postgres({"max_connections": "23"}) as server:
        assert _ask(server.url, "SHOW max_connections") == "23"
        _ask(server.url, "CREATE TABLE kept AS SELECT 7 AS number")
        first = server.pid
        server.restart()
        second = server.pid
        assert "automatic recovery" not in server.log.read_text()
        server.restart(immediate=True)
        assert "automatic recovery" in server.log.read_text()
        assert len({first, second, server.pid}) == 3
        assert _ask(server.url, "SELECT number FROM kept") == 7
        folder = server.log.parent
    assert not folder.exists()
    assert _servers(folder) == []
    assert server.pid is None


@pytest.mark.skipif(not INSTALLED, reason="Debian's PostgreSQL is not installed")
def test_another_postgresql_serves_as_well() -> None:
    binary = INSTALLED[0]
    with temporary_postgres(bin_dir=binary.parent) as server:
        assert str(_ask(server.url, "SHOW server_version")).startswith(binary.parent.parent.name + ".")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_root_starts_it_where_nobody_else_may_go_and_no_mode_is_changed(cluster: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    with EmbeddedPostgres.start(closed / "postgres", durable=False) as server:
        assert _ask(server.url, "SELECT 1") == 1
        assert server.pid is not None
        assert psutil.Process(server.pid).uids().real != 0
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700
    # As a copy made by root, or a backup brought back by root, is.
    _copy(cluster, closed / "copied")
    with EmbeddedPostgres.start(closed / "copied") as server:
        assert _ask(server.url, "SELECT 1") == 1


def _namespaces() -> bool:
    asked = ["unshare", "--user", "--map-root-user", "unshare", "--user", "--map-user=1", "true"]
    return shutil.which("unshare") is not None and subprocess.run(asked, capture_output=True).returncode == 0


@pytest.mark.skipif(not _namespaces(), reason="user namespaces are not to be had here")
def test_a_root_that_cannot_become_another_user_starts_it_all_the_same(tmp_path: Path) -> None:
    place = tmp_path / "postgres"
    lonely = User(place, "unshare", "--user", "--map-root-user")
    with lonely.process:
        assert psutil.pid_exists(lonely.server)
        lonely.leave()
    assert _servers(place) == []
