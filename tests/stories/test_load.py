"""Load and its ends: two servers on one customer, more than can be committed, slow clients, SIGTERM, rolling restarts.

Real processes on a real PostgreSQL. KAMIYO_LOAD_SECONDS is how long the load of the first story lasts.
"""

import asyncio
import contextlib
import hashlib
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import psutil
import pytest

from bench.chaos.crew import Member, environment, working
from bench.chaos.ground import free_ports, listening
from bench.chaos.proxy import carrying
from bench.chaos.stripe import Answer, Connections, request_for
from kamiyo.database import Connection
from tests.conftest import (
    ADMIN_KEY,
    DEADLINE,
    SECRET,
    NewDatabase,
    Served,
    event_json,
    fresh_id,
    locks_waited_for,
    serving,
    settled,
    until,
    waiting_for_locks,
)
from tests.turns import NOW, example, put

# Load and grace are measured in seconds: these run after the others, in two processes, for most of them wait.
# Those that need a core for themselves do not meet.
pytestmark = pytest.mark.alone
with_a_core = pytest.mark.xdist_group("with a core")

SECONDS = float(os.environ.get("KAMIYO_LOAD_SECONDS", "4"))

#: What a server takes of memory at most, in bytes, whatever is thrown at it: see docs/maintenance.md.
MOST_RESIDENT = 256 << 20


def port_of(server: Served) -> int:
    port = urlsplit(server.url).port
    assert port is not None
    return port


def delivery(body: bytes) -> bytes:
    return request_for(body, int(time.time()), SECRET)


async def post(port: int, body: bytes) -> Answer:
    async with Connections([port]) as connection:
        return await connection.post(0, delivery(body))


@pytest.fixture
def two_servers(database_url: str) -> Iterator[list[int]]:
    """The ports of two servers, each with its worker, on the clean database."""
    with serving(database_url) as one, serving(database_url) as other:
        yield [port_of(one), port_of(other)]


# ── Two servers, one customer, four tables ──────────────────────────────────────────────────────────────────────


@with_a_core
async def test_two_servers_take_one_customers_events_over_all_four_tables_without_a_deadlock(
    two_servers: list[int], db: Connection
) -> None:
    before = await db.fetchval("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
    rng = random.Random(1)
    subjects = _subjects("cus_load", 4)
    answers: Counter[str] = Counter()
    until_then = time.monotonic() + SECONDS

    async def send() -> None:
        async with Connections(two_servers) as connections:
            while time.monotonic() < until_then:
                event_type, subject = rng.choice(subjects)
                # Few seconds for many events: so most of them share theirs with others of their object.
                created = NOW + rng.randrange(4)
                body = event_json(
                    event_type=event_type, obj={**subject, "metadata": {"n": str(rng.random())}}, created=created
                )
                for server in rng.choice(((0,), (1,), (0, 1), (1, 0))):
                    answers[(await connections.post(server, delivery(body))).status] += 1

    async with asyncio.TaskGroup() as tasks:
        for _ in range(24):
            tasks.create_task(send())
    assert set(answers) == {"200"}, answers
    assert answers["200"] > 100

    async def at_rest() -> bool:
        return not await db.fetchval("SELECT count(*) FROM webhook_events WHERE next_try_at IS NOT NULL")

    await until(at_rest)
    assert await db.fetch("SELECT error_type, count(*) FROM webhook_failures GROUP BY 1") == []
    # The numbers of a session reach the view when it is idle for a second.
    await db.execute("SELECT pg_stat_force_next_flush()")
    after = await db.fetchval("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
    assert after == before


def _subjects(customer: str, count: int) -> list[tuple[str, dict[str, Any]]]:
    subjects: list[tuple[str, dict[str, Any]]] = [("customer.updated", example("customer", id=customer))]
    for number in range(count):
        subjects += [
            ("customer.subscription.updated", example("subscription", id=f"sub_load{number}", customer=customer)),
            ("invoice.updated", example("invoice", id=f"in_load{number}", customer=customer, status="open")),
            ("payment_method.updated", example("payment_method", id=f"pm_load{number}", customer=customer)),
        ]
    return subjects


# ── More than can be committed ──────────────────────────────────────────────────────────────────────────────────


@with_a_core
async def test_at_ten_times_the_load_it_can_carry_a_server_sheds_and_keeps_what_it_acknowledged(
    new_database: NewDatabase,
) -> None:
    url = new_database()
    db = await asyncpg.connect(url)
    # A PostgreSQL that cannot store more than a hundred events a second, on any machine.
    await db.execute(
        "CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS "
        "'BEGIN PERFORM pg_sleep(0.01); RETURN NEW; END';"
        "CREATE TRIGGER slowly BEFORE INSERT ON webhook_events FOR EACH ROW EXECUTE FUNCTION slowly()"
    )
    with serving(url, KAMIYO_LOG_LEVEL="error") as server:
        carried = await _offered(port_of(server), connections=100, rate=1_000, seconds=1)
        watched = psutil.Process(server.process.pid)
        flood = asyncio.create_task(
            _offered(port_of(server), connections=3_000, rate=1_000, seconds=4, until=_Seen.most_are_shed)
        )
        most = 0
        while not flood.done():
            most = max(most, watched.memory_info().rss)
            await asyncio.wait([flood], timeout=0.02)
        shed = flood.result()
        assert set(shed.statuses) <= {"200", "503", "connection"}, shed.statuses
        # A connection that the machine does not get round to in time is a retry, like a 503; most are to be answered.
        assert shed.statuses["connection"] < 0.05 * shed.statuses.total()
        assert shed.most_are_shed(), shed.statuses
        # Refused at once; some that were taken may have found the time for their commit over.
        assert shed.retry_after.keys() <= {"2", "5"}
        assert most < MOST_RESIDENT, f"{most >> 20} MiB"
        # It has its breath back at once: what it refuses costs it nothing later.
        await db.execute("DROP TRIGGER slowly ON webhook_events")
        await until(lambda: _is_taken(port_of(server)))
    promised = carried.acknowledged | shed.acknowledged
    stored = {
        event_id: digest
        for event_id, digest in await db.fetch(
            "SELECT event_id, md5(body) FROM webhook_events JOIN webhook_payloads USING (seq, created_at)"
        )
    }
    assert promised.items() <= stored.items()
    await db.close()


async def _is_taken(port: int) -> bool:
    return (await post(port, event_json())).status == "200"


class _Seen:
    """What a sender saw: answers by status, values of Retry-After, and the MD5 of each acknowledged body by event."""

    def __init__(self) -> None:
        self.statuses: Counter[str] = Counter()
        self.retry_after: Counter[str] = Counter()
        self.acknowledged: dict[str, str] = {}

    def most_are_shed(self) -> bool:
        return self.retry_after["2"] > self.statuses["200"] > 0


async def _offered(
    port: int, *, connections: int, rate: float, seconds: float, until: Callable[[_Seen], bool] | None = None
) -> _Seen:
    """Post `rate` new events a second, whatever becomes of them, over at most so many connections.

    For so many seconds; on a machine that is busy with something else on until `until` is true, at most DEADLINE.
    """
    seen, tickets = _Seen(), asyncio.Queue[None]()
    padding = "x" * 12_000

    async def carry() -> None:
        async with Connections([port]) as kept:
            while True:
                await tickets.get()
                event_id = fresh_id()
                body = event_json(event_id, obj={"id": fresh_id("ch"), "object": "charge", "description": padding})
                try:
                    answer = await kept.post(0, delivery(body))
                except (OSError, EOFError):
                    # So many knock at once that the kernel sends some away.
                    seen.statuses["connection"] += 1
                    kept.drop(0)
                    continue
                seen.statuses[answer.status] += 1
                if answer.status == "200":
                    seen.acknowledged[event_id] = hashlib.md5(body).hexdigest()  # noqa: S324 - only compared
                else:
                    seen.retry_after[answer.headers.get("retry-after", "none")] += 1

    async with asyncio.TaskGroup() as tasks:
        carriers = [tasks.create_task(carry()) for _ in range(connections)]
        began, sent = time.monotonic(), 0
        while (now := time.monotonic() - began) < seconds or (until and not until(seen) and now < DEADLINE):
            while sent < now * rate:
                tickets.put_nowait(None)
                sent += 1
            # Load at a rate is made of time: what is due is sent every hundredth of a second.
            await asyncio.sleep(0.01)
        for carrier in carriers:
            carrier.cancel()
    return seen


# ── Slow clients ────────────────────────────────────────────────────────────────────────────────────────────────


@with_a_core
async def test_three_hundred_slow_clients_hold_up_no_delivery_and_are_sent_away(
    database_url: str, tmp_path: Path
) -> None:
    [port] = free_ports(1)
    env = _env(database_url, tmp_path, PORT=str(port), KAMIYO_WORKER="false")
    # The limits are fifteen seconds; nobody has to wait for that here.
    hurry = (
        "import kamiyo.web.bounds, kamiyo.web.webhooks as w\nw.BODY_SECONDS = kamiyo.web.bounds.HEAD_SECONDS = 2.0\n"
    )
    (tmp_path / "hurry.py").write_text(hurry)
    async with _alone("serve", env | {"KAMIYO_HANDLERS": "hurry"}, tmp_path), contextlib.AsyncExitStack() as stack:
        await listening([port])
        clients = []
        for number in range(300):
            reader, writer = await stack.enter_async_context(_slow_client(port))
            # At once: who has said nothing by the time that the last one is there is sent away without a word.
            beginnings = (b"", b"POST /api/v1/webhooks/stripe HTTP/1.1\r\nHost: kam", delivery(event_json())[:-20])
            writer.write(beginnings[number % 3])
            clients.append((reader, writer))
        silent, in_headers, in_body = clients[::3], clients[1::3], clients[2::3]
        # Read as soon as they come: a connection that is written to after its end breaks, and its answer is gone.
        answers = [asyncio.create_task(reader.readline()) for reader, _ in in_headers + in_body]
        took = []
        for _ in range(40):
            for _, writer in in_headers:
                writer.write(b"i")
            began = time.monotonic()
            assert (await post(port, event_json())).status == "200"
            took.append(time.monotonic() - began)
        assert sorted(took)[len(took) // 2] < 0.5, took
        async with asyncio.timeout(DEADLINE):
            for answer in answers:
                assert (await answer).startswith(b"HTTP/1.1 408")
            for reader, _ in silent:
                assert await reader.read() == b""


@with_a_core
async def test_half_bodies_and_heads_without_end_take_no_more_memory_than_they_may(
    database_url: str, tmp_path: Path
) -> None:
    [port] = free_ports(1)
    env = _env(database_url, tmp_path, PORT=str(port), KAMIYO_WORKER="false", KAMIYO_LOG_LEVEL="error")
    half = delivery(event_json(obj={"id": "ch_1", "object": "charge", "description": "x" * 1_000_000}))[:-20]
    head = b"GET / HTTP/1.1\r\nHost: kamiyo\r\n" + b"".join(b"x-%d: %s\r\n" % (n, b"y" * 1000) for n in range(200))
    async with _alone("serve", env, tmp_path) as server, contextlib.AsyncExitStack() as stack:
        await listening([port])
        watched = psutil.Process(server.pid)
        answers: Counter[bytes] = Counter()

        async def send(what: bytes) -> None:
            reader, writer = await stack.enter_async_context(_slow_client(port))
            with contextlib.suppress(OSError):
                writer.write(what)
                await writer.drain()
                answers[(await reader.readline())[9:12]] += 1

        # Those within the bound are held for their fifteen seconds; the others are sent away at once.
        senders = [asyncio.create_task(send(half)) for _ in range(250)]
        await until(lambda: _true(sum(task.done() for task in senders) > 100))
        await asyncio.gather(*(send(head) for _ in range(20)))
        assert watched.memory_info().rss < MOST_RESIDENT, f"{watched.memory_info().rss >> 20} MiB"
        # A delivery in one piece does not wait behind them.
        assert (await post(port, event_json())).status == "200"
        for sender in senders:
            sender.cancel()
    assert answers[b"503"] > 100
    assert answers[b"431"] + answers[b""] == 20


async def _true(value: bool) -> bool:
    return value


@contextlib.asynccontextmanager
async def _slow_client(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        # The socket is closed on the loop's next round, which may not come before whoever waits for a process is done.
        await asyncio.sleep(0)


# ── SIGTERM ─────────────────────────────────────────────────────────────────────────────────────────────────────

_GRACE = 3.0
# A process needs a moment to take itself down once it is done, and the machine may be busy.
_MARGIN = 2.5

_SLOW_HANDLER = """
import asyncio, pathlib
from kamiyo import on

@on("charge.succeeded")
async def slow(event, db):
    await db.execute("INSERT INTO effects VALUES ($1)", event.id)
    pathlib.Path(event.id).touch()
    await asyncio.sleep(float(event.object["metadata"]["seconds"]))
"""


@pytest.fixture
async def slow_database(new_database: NewDatabase) -> AsyncIterator[tuple[str, Connection]]:
    """A database with a table for the slow handler's effects, and a connection to it."""
    url = new_database()
    db = await asyncpg.connect(url)
    await db.execute("CREATE TABLE effects (event_id text)")
    yield url, db
    await db.close()


def _env(url: str, folder: Path, **variables: str) -> dict[str, str]:
    (folder / "slow.py").write_text(_SLOW_HANDLER)
    return environment(
        DATABASE_URL=url,
        STRIPE_WEBHOOK_SECRET=SECRET,
        ADMIN_API_KEY=ADMIN_KEY,
        KAMIYO_SHUTDOWN_GRACE=str(_GRACE),
        KAMIYO_LOG_FORMAT="json",
        KAMIYO_HANDLERS="slow",
        **variables,
    )


def _charge(event_id: str, seconds: float, created: int = NOW) -> bytes:
    charge = example("charge", customer="cus_slow", metadata={"seconds": str(seconds)})
    return event_json(event_id, "charge.succeeded", charge, created=created)


async def _has_begun(folder: Path, event_id: str) -> None:
    async def begun() -> bool:
        return (folder / event_id).exists()

    await until(begun)


async def test_sigterm_lets_a_worker_finish_what_it_handles_and_gives_the_rest_back(
    slow_database: tuple[str, Connection], tmp_path: Path
) -> None:
    url, db = slow_database
    known, first, second, third = (fresh_id() for _ in range(4))
    async with working([], 1, _env(url, tmp_path), tmp_path) as crew:
        [worker] = crew.workers
        # From now on the type is known to be slow, so its events go one by one.
        # And only just: what takes a quarter of a second is claimed one by one, and nothing would be left to give back.
        await put(db, _charge(known, 0.03))
        await settled(db, known, "processed")
        await put(db, _charge(first, 1.0, NOW + 1), _charge(second, 0, NOW + 2), _charge(third, 0, NOW + 3))
        await _has_begun(tmp_path, first)
        await worker.restart(_GRACE + _MARGIN)
        assert worker.statuses == [0]
        rows = await db.fetch(
            "SELECT event_id, status, attempts, claim FROM webhook_events WHERE event_id <> $1", known
        )
        effects = {event_id for (event_id,) in await db.fetch("SELECT event_id FROM effects")}
    stands = {row["event_id"]: (row["status"], row["attempts"]) for row in rows}
    assert stands[first] == ("processed", 1)
    # Whoever comes next may have taken them up again already; this one left them untouched.
    assert {stands[second][0], stands[third][0]} <= {"pending", "processing", "processed"}
    assert first in effects
    log = worker.log.read_text()
    assert '"claim_given_back"' in log


async def test_sigterm_abandons_a_handler_that_outlasts_the_grace_and_its_event_is_as_it_was(
    slow_database: tuple[str, Connection], tmp_path: Path
) -> None:
    url, db = slow_database
    event_id = fresh_id()
    async with _alone("worker", _env(url, tmp_path), tmp_path) as worker:
        await put(db, _charge(event_id, 25))
        await _has_begun(tmp_path, event_id)
        assert await _stopped(worker) < _GRACE + _MARGIN
    row = await db.fetchrow(
        "SELECT status, attempts, claim, started_at FROM webhook_events WHERE event_id = $1", event_id
    )
    assert row is not None
    assert tuple(row) == ("pending", 0, None, None)
    assert await db.fetch("SELECT FROM effects") == []


async def test_sigterm_ends_a_worker_within_its_grace_though_its_connections_lead_nowhere_any_more(
    slow_database: tuple[str, Connection], tmp_path: Path
) -> None:
    url, db = slow_database
    event_id = fresh_id()
    async with (
        carrying(url) as proxy,
        _alone("worker", _env(proxy.url, tmp_path), tmp_path) as worker,
    ):
        await put(db, _charge(event_id, 25))
        await _has_begun(tmp_path, event_id)
        proxy.blackhole(1.0, random.Random(0))
        assert await _stopped(worker) < _GRACE + _MARGIN


async def test_sigterm_lets_a_server_answer_what_is_in_flight(
    slow_database: tuple[str, Connection], tmp_path: Path
) -> None:
    url, db = slow_database
    [port] = free_ports(1)
    env = _env(url, tmp_path, PORT=str(port), KAMIYO_WORKER="false")
    async with _alone("serve", env, tmp_path) as server:
        await listening([port])
        event_id = fresh_id()
        async with locks_waited_for(db), db.transaction():
            await db.execute("LOCK TABLE webhook_events IN SHARE MODE")
            answer = asyncio.create_task(post(port, event_json(event_id, "customer.updated", example("customer"))))
            await until(lambda: waiting_for_locks(db))
            stopping = asyncio.create_task(_stopped(server))
            await until(lambda: _refuses(port))
        assert (await answer).status == "200"
        assert await stopping < _GRACE + _MARGIN
    assert await db.fetchval("SELECT status FROM webhook_events WHERE event_id = $1", event_id) == "processed"


async def test_a_delivery_that_outlasts_the_grace_is_answered_503(
    slow_database: tuple[str, Connection], tmp_path: Path
) -> None:
    url, db = slow_database
    [port] = free_ports(1)
    env = _env(url, tmp_path, PORT=str(port), KAMIYO_WORKER="false") | {"KAMIYO_SHUTDOWN_GRACE": "1"}
    async with _alone("serve", env, tmp_path) as server:
        await listening([port])
        # Not a lock, which is waited for only so long.
        await db.execute(
            "CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS "
            "'BEGIN PERFORM pg_sleep(60); RETURN NEW; END';"
            "CREATE TRIGGER slowly BEFORE INSERT ON webhook_events FOR EACH ROW EXECUTE FUNCTION slowly()"
        )
        answer = asyncio.create_task(post(port, event_json()))
        asleep = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"
        await until(lambda: db.fetchval(asleep))
        assert await _stopped(server) < 1 + _MARGIN
        assert (await answer).status == "503"


async def test_a_server_whose_output_goes_to_a_full_disk_starts_and_receives(
    slow_database: tuple[str, Connection], tmp_path: Path
) -> None:
    url, _ = slow_database
    [port] = free_ports(1)
    async with _alone("serve", _env(url, tmp_path, PORT=str(port)), tmp_path, output=Path("/dev/full")):
        await listening([port])
        assert (await post(port, event_json())).status == "200"


@pytest.mark.parametrize("workers", [1, 2])
async def test_sigterm_ends_a_server_within_its_grace_whatever_clients_and_handlers_do(
    slow_database: tuple[str, Connection], tmp_path: Path, workers: int
) -> None:
    url, db = slow_database
    [port] = free_ports(1)
    event_id = fresh_id()
    async with _alone("serve", _env(url, tmp_path, PORT=str(port)), tmp_path, "--workers", str(workers)) as server:
        await listening([port])
        await put(db, _charge(event_id, 25))
        await _has_begun(tmp_path, event_id)
        async with _slow_client(port) as (_, writer):
            writer.write(delivery(event_json())[:-20])
            await writer.drain()
            assert await _stopped(server) < _GRACE + _MARGIN
    assert await db.fetchval("SELECT count(*) FROM webhook_events WHERE status = 'processing'") == 0


async def test_the_grace_of_an_application_of_ones_own_counts_from_the_signal_though_its_server_waits_for_a_client(
    slow_database: tuple[str, Connection], tmp_path: Path
) -> None:
    url, db = slow_database
    _env(url, tmp_path)
    event_id = fresh_id()
    with serving(url, folder=tmp_path, KAMIYO_HANDLERS="slow", KAMIYO_SHUTDOWN_GRACE="0.5") as server:
        await put(db, _charge(event_id, 25))
        await _has_begun(tmp_path, event_id)
        async with _slow_client(port_of(server)) as (_, writer):
            writer.write(delivery(event_json())[:-20])
            await writer.drain()
            server.process.send_signal(signal.SIGTERM)
            await settled(db, event_id, "pending")
            assert server.process.poll() is None, "uvicorn waits for its clients as long as it was told to: for ever"


@pytest.mark.parametrize("how", ["refuses", "says nothing"])
async def test_a_database_that_is_away_does_not_make_a_stop_take_the_whole_grace(
    slow_database: tuple[str, Connection], tmp_path: Path, how: str
) -> None:
    url, db = slow_database
    [port] = free_ports(1)
    event_id = fresh_id()
    async with carrying(url) as proxy, contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(
            _alone("serve", _env(proxy.url, tmp_path, PORT=str(port)) | {"KAMIYO_SHUTDOWN_GRACE": "6"}, tmp_path)
        )
        await listening([port])
        await put(db, _charge(event_id, 25))
        await _has_begun(tmp_path, event_id)
        if how == "refuses":
            await stack.enter_async_context(proxy.unreachable())
        else:
            proxy.fall_silent()
        assert await _stopped(server) < (4 if how == "refuses" else 5)
    # Whoever comes next finds it.
    assert await db.fetchval("SELECT status FROM webhook_events WHERE event_id = $1", event_id) == "processing"


async def _refuses(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return True
    writer.transport.abort()
    return False


@contextlib.asynccontextmanager
async def _alone(
    command: str, env: dict[str, str], folder: Path, *options: str, output: Path | None = None
) -> AsyncIterator[Member]:
    """One process that nobody starts again, writing to `output` or to a log in `folder`."""
    member = Member(command, (sys.executable, "-m", "kamiyo", command, *options), env, folder, output=output)
    life = asyncio.create_task(member.live_once())
    try:
        yield member
    finally:
        life.cancel()
        await asyncio.wait([life])


async def _stopped(member: Member) -> float:
    """Send SIGTERM, and return how many seconds the process took to end, with exit status 0."""
    await member.restart(30)
    assert member.statuses == [0]
    return member.slowest_stop


# ── A rolling restart ───────────────────────────────────────────────────────────────────────────────────────────


@with_a_core
async def test_a_rolling_restart_of_two_servers_under_load_loses_no_request(
    slow_database: tuple[str, Connection], tmp_path: Path
) -> None:
    url, db = slow_database
    ports = free_ports(2)
    statuses: Counter[str] = Counter()
    acknowledged: set[str] = set()
    over = False

    async def send(number: int) -> None:
        async with Connections(ports) as connections:
            server = number % 2
            while not over:
                event_id = fresh_id()
                body = event_json(event_id, "customer.updated", example("customer"))
                while event_id not in acknowledged:
                    try:
                        answer = await connections.post(server, delivery(body))
                    except (OSError, EOFError):
                        # As a load balancer does it: the connection failed, so the other server gets the request.
                        statuses["connection"] += 1
                        connections.drop(server)
                        server = 1 - server
                        # A client's own pause between two attempts; nothing is waited for.
                        await asyncio.sleep(0.01)
                        continue
                    statuses[answer.status] += 1
                    assert answer.status == "200"
                    acknowledged.add(event_id)

    async with working(ports, 1, _env(url, tmp_path), tmp_path) as crew:
        await listening(ports)
        async with asyncio.TaskGroup() as tasks:
            for number in range(12):
                tasks.create_task(send(number))
            for _ in range(2):
                for api, port in zip(crew.apis, ports, strict=True):
                    count = statuses["200"]
                    await api.restart(30)
                    await listening([port])
                    assert statuses["200"] > count
            over = True

        async def at_rest() -> bool:
            return not await db.fetchval("SELECT count(*) FROM webhook_events WHERE next_try_at IS NOT NULL")

        await until(at_rest)
        assert [api.statuses for api in crew.apis] == [[0, 0], [0, 0]]
        assert max(api.slowest_stop for api in crew.apis) < _GRACE + _MARGIN
    assert set(statuses) <= {"200", "connection"}, statuses
    stored = {
        event_id for (event_id,) in await db.fetch("SELECT event_id FROM webhook_events WHERE status = 'processed'")
    }
    assert acknowledged <= stored
