"""The durable table of events: what goes in stays, once; what a person asks for is done and written down."""

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from kamiyo import database, inbox
from kamiyo.database import Connection
from kamiyo.errors import EventNotFailed, EventUnknown
from kamiyo.event import lane_of
from kamiyo.inbox import Claimed, ClaimLost, Failure, Filters, Outcome, Settled, Status
from tests.conftest import event_json, until
from tests.turns import NOW, failures_of, put, read, row_of, statuses

FAILURE = Failure("ValueError", "no", "Traceback …", "f00d")


@pytest.fixture
async def other(database_url: str) -> AsyncIterator[Connection]:
    """Another worker's connection."""
    connection = await database.connect(database_url, application="test other")
    yield connection
    await connection.close()


def event(event_id: str, event_type: str = "invoice.paid", customer: str = "cus_1", created: int = NOW) -> bytes:
    return event_json(
        event_id, event_type, {"id": f"x_{event_id}", "object": "x", "customer": customer}, created=created
    )


async def processed(db: Connection, *event_ids: str) -> None:
    """Claim everything, and settle these."""
    number, batch = await inbox.claim(db, 1000)
    done = {claimed.event.id for claimed in batch}.intersection(event_ids)
    await inbox.succeed(db, number, [Settled(event_id, Outcome.handled, 1, 10) for event_id in done])
    await inbox.release(db, number, [claimed.event.id for claimed in batch])
    await inbox.unlock(db)


async def failed(db: Connection, *event_ids: str, fingerprint: str = "f00d", again_in: float | None = None) -> None:
    """Claim everything, and fail these."""
    number, batch = await inbox.claim(db, 1000)
    failure = Failure("ValueError", "no", "", fingerprint)
    for event_id in event_ids:
        await inbox.fail(db, number, event_id, failure, attempt=5, retry_in=again_in, microseconds=1)
    await inbox.release(db, number, [claimed.event.id for claimed in batch])
    await inbox.unlock(db)


# ── In ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_event_is_stored_once_with_its_body_as_it_came_and_known_from_then_on(
    db: Connection,
) -> None:
    body = event("evt_1").replace(b'"data"', b'\n\t"data"')
    assert await inbox.put(db, [read(body)]) == {}
    assert await inbox.put(db, [read(event("evt_1", "another.type")), read(event("evt_2"))]) == {
        "evt_1": Status.pending
    }
    row, tries = await inbox.one(db, "evt_1")
    assert (row["event_type"], row["body"], row["status"], tries) == ("invoice.paid", body, "pending", [])
    assert await db.fetchval("SELECT count(*) FROM webhook_payloads") == 2

    await processed(db, "evt_1")
    assert await inbox.put(db, [read(event("evt_1"))]) == {"evt_1": Status.processed}
    await failed(db, "evt_2")
    assert await inbox.put(db, [read(event("evt_2"))]) == {"evt_2": Status.failed}


async def test_two_servers_that_store_the_same_events_at_once_store_them_once(
    db: Connection, other: Connection
) -> None:
    names = [f"evt_{n}" for n in range(20)]
    first, second = db.transaction(), other.transaction()
    await first.start()
    assert await inbox.put(db, [read(event(name)) for name in names]) == {}
    await second.start()
    ours = inbox.put(other, [read(event(name)) for name in reversed(names)])
    # The second waits for the first: whether they are stored is not known before it commits.
    await first.commit()
    assert await ours == dict.fromkeys(names, Status.pending)
    await second.commit()
    assert await db.fetchval("SELECT count(*) FROM webhook_payloads") == 20


async def test_the_envelope_is_in_the_ledger(db: Connection) -> None:
    body = event_json(
        *("evt_1", "customer.updated", {"id": "cus_1", "object": "customer"}),
        created=NOW,
        account="acct_1",
        livemode=True,
    )
    await inbox.put(db, [read(body)], source="reconcile")
    row = await row_of(db, "evt_1")
    assert row["stripe_created"] == datetime.fromtimestamp(NOW, UTC)
    assert {name: row[name] for name in ("account", "livemode", "object_type", "object_id", "customer", "source")} == {
        "account": "acct_1",
        "livemode": True,
        "object_type": "customer",
        "object_id": "cus_1",
        "customer": "cus_1",
        "source": "reconcile",
    }


async def test_a_body_that_json_b_refuses_is_shown_with_a_mark_in_its_place(db: Connection) -> None:
    await put(db, event_json("evt_1", obj={"id": "ch_1", "object": "charge", "description": "a\0b"}))
    [(payload,)] = await db.fetch("SELECT payload FROM webhook_event_payloads")
    assert json.loads(payload)["data"]["object"]["description"] == "a\ufffdb"


# ── Claims ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_claim_takes_the_oldest_due_events_in_stripes_order_and_no_lane_twice(
    db: Connection, other: Connection
) -> None:
    for at, customer in enumerate(("a", "b", "a", "c")):
        await put(db, event(f"evt_{at}", customer=f"cus_{customer}", created=NOW - at))
    number, mine = await inbox.claim(db, 3)
    assert [claimed.event.id for claimed in mine] == ["evt_2", "evt_1", "evt_0"]
    assert {(claimed.attempts, claimed.suspect, claimed.abandoned) for claimed in mine} == {(0, False, False)}
    await put(db, event("evt_4", customer="cus_a"))
    theirs_number, theirs = await inbox.claim(other, 10)
    assert [claimed.event.id for claimed in theirs] == ["evt_3"]
    assert theirs_number > number
    assert Counter((await statuses(db)).values()) == {"processing": 4, "pending": 1}


async def test_what_is_not_due_yet_is_not_claimed(db: Connection) -> None:
    await put(db, event("evt_1"), event("evt_2"))
    await failed(db, "evt_1", again_in=3600)
    _, batch = await inbox.claim(db, 10)
    assert [claimed.event.id for claimed in batch] == ["evt_2"]
    assert await inbox.claim(db, 0) == (0, [])


async def test_a_claim_from_a_moment_on_passes_over_what_was_due_before_and_says_where_the_queue_begins(
    db: Connection, other: Connection
) -> None:
    await put(db, event("evt_old"))
    await db.execute("UPDATE webhook_events SET next_try_at = now() - interval '1 hour'")
    await put(db, event("evt_new", customer="cus_2"))
    old, new = [(await row_of(db, name))["next_try_at"] for name in ("evt_old", "evt_new")]

    taken = await inbox.claim_since(db, new, 10)
    assert ([one.event.id for one in taken.events], taken.first_due) == (["evt_new"], new)
    taken = await inbox.claim_since(other, None, 10)
    assert ([one.event.id for one in taken.events], taken.first_due) == (["evt_old"], old)

    await db.execute("UPDATE webhook_events SET next_try_at = now() + interval '1 hour'")
    taken = await inbox.claim_since(db, new, 10)
    assert (taken.number, taken.events) == (0, [])
    assert taken.due_in is not None and 3500 < taken.due_in <= 3600
    assert taken.first_due > new, "nothing is due: the queue begins now"


async def test_what_the_last_holder_of_a_lane_settled_a_moment_ago_is_not_claimed_again(
    db: Connection, other: Connection
) -> None:
    await put(db, event("evt_1"), event("evt_2", customer="cus_2"))
    number, _ = await inbox.claim(db, 1)
    async with halfway_through_a_claim(db, other) as claiming:
        await inbox.succeed(db, number, [Settled("evt_1", Outcome.handled, 1, 1)])
        await inbox.unlock(db)
        _, claimed = await claiming
    assert [one.event.id for one in claimed] == ["evt_2"]


async def test_an_event_that_its_last_holder_moved_a_moment_ago_is_not_claimed_in_the_lane_that_it_was_in(
    db: Connection, other: Connection
) -> None:
    await put(db, event_json("evt_1", "invoice.paid", {"id": "x_1", "object": "x"}, created=NOW))
    number, _ = await inbox.claim(db, 1)
    moving = db.transaction()
    await moving.start()
    await inbox.move(db, number, {"evt_1": ("cus_1", lane_of("", "cus_1"))})
    async with halfway_through_a_claim(db, other) as claiming:
        await moving.commit()
        await inbox.unlock(db)
        # It holds the lane of the object, and the event is in the customer's, where others may be at work.
        assert await claiming == (0, [])
    _, [claimed] = await inbox.claim(db, 10)
    assert (claimed.event.customer, claimed.lane, claimed.abandoned) == ("cus_1", lane_of("", "cus_1"), False)


async def test_a_claim_that_takes_nothing_holds_nothing(db: Connection, other: Connection) -> None:
    await put(db, event("evt_1"))
    number, _ = await inbox.claim(db, 1)
    async with halfway_through_a_claim(db, other) as claiming:
        await inbox.succeed(db, number, [Settled("evt_1", Outcome.handled, 1, 1)])
        await inbox.unlock(db)
        assert await claiming == (0, [])
    await put(db, event("evt_2"))
    _, claimed = await inbox.claim(db, 10)
    assert [one.event.id for one in claimed] == ["evt_2"]


@contextlib.asynccontextmanager
async def halfway_through_a_claim(
    db: Connection, other: Connection
) -> AsyncIterator["asyncio.Task[tuple[int, list[Claimed]]]"]:
    """`other` claims: it has looked for what is due, and locks no lane before `db` lets go of its own."""
    await other.execute(_SLOW_LOCK)
    await db.execute("SELECT pg_advisory_lock(99)")
    claiming = asyncio.create_task(inbox.claim(other, 10))
    await until(lambda: db.fetchval("SELECT count(*) FROM pg_locks WHERE objid = 99 AND NOT granted"))
    try:
        yield claiming
    finally:
        await other.execute("RESET search_path; DROP SCHEMA slow CASCADE")


_SLOW_LOCK = """
CREATE SCHEMA slow;
CREATE FUNCTION slow.pg_try_advisory_lock(class integer, lane integer) RETURNS boolean LANGUAGE sql VOLATILE AS $$
    SELECT pg_advisory_xact_lock_shared(99);
    SELECT pg_catalog.pg_try_advisory_lock(class, lane);
$$;
SET search_path = slow, pg_catalog, public;
"""


async def test_a_claimed_event_carries_everything_that_was_stored_of_it(db: Connection) -> None:
    original = read(
        event_json("evt_1", "invoice.paid", {"id": "in_1", "object": "invoice"}, account="acct_1", created=NOW)
    )
    await inbox.put(db, [original])
    _, [claimed] = await inbox.claim(db, 1)
    assert claimed.event == original
    assert claimed.received == (await row_of(db, "evt_1"))["created_at"]


async def test_only_the_holder_of_a_claim_settles(db: Connection) -> None:
    await put(db, event("evt_1"), event("evt_2", customer="cus_2"))
    number, _ = await inbox.claim(db, 10)
    await inbox.unlock(db)
    newer, _ = await inbox.claim(db, 10)
    for event_id in ("evt_1", "evt_2"):
        with pytest.raises(ClaimLost):
            await inbox.fail(db, number, event_id, FAILURE, attempt=1, retry_in=1, microseconds=1)
        with pytest.raises(ClaimLost):
            await inbox.start(db, number, event_id, 1)
    with pytest.raises(ClaimLost):
        await inbox.succeed(db, number, [Settled("evt_1", Outcome.ignored, 1, 1)])
    await inbox.release(db, number, ["evt_1", "evt_2"])
    assert await statuses(db) == {"evt_1": "processing", "evt_2": "processing"}
    assert await db.fetchval("SELECT count(*) FROM webhook_failures") == 0

    await inbox.succeed(db, newer, [Settled("evt_1", Outcome.ignored, 1, 1)])
    with pytest.raises(ClaimLost):
        await inbox.succeed(db, newer, [Settled(name, Outcome.ignored, 1, 1) for name in ("evt_1", "evt_2")])


async def test_events_given_back_are_as_they_were(db: Connection) -> None:
    await put(db, event("evt_1"), event("evt_2", customer="cus_2"))
    number, _ = await inbox.claim(db, 10)
    await inbox.fail(db, number, "evt_2", FAILURE, attempt=1, retry_in=0, microseconds=1)
    await inbox.release(db, number, ["evt_1"])
    await inbox.unlock(db)
    before = await db.fetch("SELECT status, attempts, next_try_at FROM webhook_events ORDER BY event_id")

    number, batch = await inbox.claim(db, 10)
    assert len(batch) == 2
    await inbox.start(db, number, "evt_1", 1)
    await inbox.start(db, number, "evt_2", 2)
    await inbox.release(db, number, ["evt_1", "evt_2"])
    assert await db.fetch("SELECT status, attempts, next_try_at FROM webhook_events ORDER BY event_id") == before
    assert not await db.fetchval("SELECT count(*) FROM webhook_events WHERE started_at IS NOT NULL")


async def test_next_due_counts_down_to_what_waits_and_is_nothing_when_nothing_does(db: Connection) -> None:
    assert await inbox.next_due_in(db) is None
    await put(db, event("evt_1"))
    due = await inbox.next_due_in(db)
    assert due is not None and due <= 0
    await failed(db, "evt_1", again_in=100)
    due = await inbox.next_due_in(db)
    assert due is not None and 90 < due <= 100
    await db.execute("UPDATE webhook_events SET next_try_at = now()")
    await processed(db, "evt_1")
    assert await inbox.next_due_in(db) is None


# ── By hand ─────────────────────────────────────────────────────────────────────────────────────────────────


async def audits(db: Connection) -> list[tuple[str, dict[str, str | int], int]]:
    rows = await db.fetch("SELECT action, filters, count FROM webhook_audit ORDER BY id")
    return [(row["action"], json.loads(row["filters"]), row["count"]) for row in rows]


async def test_only_a_failed_event_is_retried_and_it_is_written_down(db: Connection) -> None:
    await put(db, event("evt_1"), event("evt_2"), event("evt_3"))
    await processed(db, "evt_1")
    await failed(db, "evt_2")
    with pytest.raises(EventUnknown):
        await inbox.retry(db, "evt_0")
    for event_id in ("evt_1", "evt_3"):
        with pytest.raises(EventNotFailed):
            await inbox.retry(db, event_id)
    await inbox.retry(db, "evt_2")
    row = await row_of(db, "evt_2")
    assert (row["status"], row["attempts"], row["failed_at"]) == ("pending", 0, None)
    assert await audits(db) == [("retry", {"event_id": "evt_2"}, 1)]


@pytest.fixture
async def mixed(db: Connection) -> Connection:
    """Events of all kinds: e1–e4 processed, e5–e7 dead, e8 waiting for its next try, e9 new."""
    kinds = {
        "e1": ("invoice.paid", "cus_1", ""),
        "e2": ("invoice.paid", "cus_2", "acct_1"),
        "e3": ("invoice.voided", "cus_1", ""),
        "e4": ("invoice.voided", "cus_2", ""),
        "e5": ("invoice.paid", "cus_1", ""),
        "e6": ("invoice.voided", "cus_2", "acct_1"),
        "e7": ("invoice.voided", "cus_3", ""),
        "e8": ("invoice.paid", "cus_3", ""),
        "e9": ("invoice.paid", "cus_3", ""),
    }
    for name, (event_type, customer, account) in kinds.items():
        obj = {"id": f"in_{name}", "object": "x", "customer": customer}
        await put(db, event_json(name, event_type, obj, created=NOW, account=account))
    await processed(db, "e1", "e2", "e3", "e4")
    await failed(db, "e5", "e6")
    await failed(db, "e7", fingerprint="beef")
    await failed(db, "e8", again_in=3600)
    for day, name in enumerate(kinds, 1):
        await db.execute(
            "UPDATE webhook_events SET created_at = $2 WHERE event_id = $1",
            name,
            datetime(2026, 1, day, tzinfo=UTC),
        )
    return db


_FILTERS: list[tuple[Filters, str | None, str]] = [
    (Filters(), None, "e5 e6 e7 e8"),
    (Filters(status="processed"), None, "e1 e2 e3 e4"),
    (Filters(status="dead"), None, "e5 e6 e7"),
    (Filters(status="retrying"), None, "e8"),
    (Filters(type="invoice.paid"), None, "e5 e8"),
    (Filters(customer="cus_2"), None, "e6"),
    (Filters(status="processed", customer="cus_2"), None, "e2 e4"),
    (Filters(object_id="in_e7"), None, "e7"),
    (Filters(account="acct_1"), None, "e6"),
    (Filters(account=""), None, "e5 e7 e8"),
    (Filters(since=datetime(2026, 1, 6, tzinfo=UTC)), None, "e6 e7 e8"),
    (Filters(until=datetime(2026, 1, 6, tzinfo=UTC)), None, "e5"),
    (Filters(status="processed", type="invoice.voided", customer="cus_1"), None, "e3"),
    (Filters(), "beef", "e7"),
    (Filters(type="invoice.paid"), "beef", ""),
]


@pytest.mark.parametrize(("filters", "fingerprint", "names"), _FILTERS)
async def test_a_replay_takes_what_its_filters_say_and_a_dry_run_counts_it_first(
    filters: Filters, fingerprint: str | None, names: str, mixed: Connection
) -> None:
    expected, before = set(names.split()), await statuses(mixed)
    assert await inbox.count_matching(mixed, filters, fingerprint) == len(expected)
    assert (await statuses(mixed), await audits(mixed)) == (before, [])

    assert await inbox.replay(mixed, filters, fingerprint) == len(expected)

    after = await statuses(mixed)
    assert {name for name in after if after[name] != before[name]} == expected
    assert {after[name] for name in expected} <= {"pending"}
    for name in expected:
        row = await row_of(mixed, name)
        assert (row["attempts"], row["outcome"], row["processed_at"], row["failed_at"]) == (
            0,
            None,
            None,
            None,
        )
    [(action, said, count)] = await audits(mixed)
    assert (action, count) == ("replay", len(expected))
    assert said == json.loads(
        json.dumps(
            {"status": "failed"}
            | {name: value for name, value in inbox.described(filters).items()}
            | ({"fingerprint": fingerprint} if fingerprint else {}),
            default=str,
        )
    )


async def test_a_long_replay_goes_chunk_by_chunk_and_takes_none_twice(
    db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "CHUNK", 4)
    names = [f"evt_{n:02}" for n in range(10)]
    await put(db, *(event(name, customer=name) for name in names))
    await processed(db, *names)
    heard: list[int] = []
    assert await inbox.replay(db, Filters(status="processed"), progress=heard.append) == 10
    assert heard == [4, 8, 10]


async def test_a_replay_leaves_alone_what_a_worker_is_just_claiming_and_waits_for_nobody(
    db: Connection, other: Connection
) -> None:
    names = [f"evt_{n}" for n in range(5)]
    await put(db, *(event(name, customer=name) for name in names))
    await failed(db, *names, again_in=0)
    # In the middle of a claim: it has the last of the rows, and comes to the others next.
    async with other.transaction():
        await other.execute("SELECT FROM webhook_events WHERE event_id = 'evt_4' FOR UPDATE")
        await db.execute("SET lock_timeout = '1s'")
        assert await inbox.replay(db, Filters(status="failed")) == 4
        await other.execute("SELECT FROM webhook_events FOR UPDATE")
    assert await statuses(db) == {**dict.fromkeys(names, "pending"), "evt_4": "failed"}


async def test_what_a_replay_or_a_cleanup_had_done_when_its_connection_broke_is_in_the_audit(
    db: Connection, other: Connection, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "CHUNK", 4)
    names = [f"evt_{n:02}" for n in range(10)]
    await put(db, *(event(name, customer=name) for name in names))
    await processed(db, *names)
    with pytest.raises(asyncpg.InterfaceError):
        await inbox.replay(other, Filters(status="processed"), progress=lambda done: other.terminate())
    assert list((await statuses(db)).values()).count("pending") == 4
    assert await audits(db) == [("replay", {"status": "processed"}, 4)]

    await db.execute("UPDATE webhook_events SET created_at = created_at - interval '40 days'")
    third = await database.connect(database_url, application="test cleanup")
    with pytest.raises(asyncpg.InterfaceError):
        await inbox.clean_up(third, 30, progress=lambda done: third.terminate())
    assert len(await statuses(db)) == 6
    assert (await audits(db))[1:] == [("cleanup", {"days": 30}, 4)]
    assert await inbox.clean_up(db, 30) == 2
    assert (await audits(db))[2:] == [("cleanup", {"days": 30}, 2)]


@pytest.mark.parametrize(("filters", "fingerprint", "names"), [one for one in _FILTERS if one[1] is None])
async def test_the_list_shows_what_its_filters_say_newest_first_page_by_page(
    filters: Filters, fingerprint: None, names: str, mixed: Connection
) -> None:
    if filters.status is None:
        filters = Filters(**{**inbox.described(filters), "status": "failed"})
    shown: list[str] = []
    position = None
    while page := await inbox.listed(mixed, filters, before=position, limit=2):
        shown += [row["event_id"] for row in page]
        position = page[-1]["created_at"], page[-1]["seq"]
    assert shown == sorted(names.split(), reverse=True)


async def test_the_list_without_filters_shows_everything_and_the_failed_list_each_with_its_last_error(
    mixed: Connection,
) -> None:
    assert [row["event_id"] for row in await inbox.listed(mixed, Filters(), limit=3)] == ["e9", "e8", "e7"]
    assert len(await inbox.listed(mixed, Filters(status="pending"))) == 1
    found = await inbox.failed(mixed, 3)
    assert [(row["event_id"], row["fingerprint"]) for row in found] == [
        ("e8", "f00d"),
        ("e7", "beef"),
        ("e6", "f00d"),
    ]


# ── Retention ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_pruning_takes_old_processed_events_and_never_another(mixed: Connection) -> None:
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    assert await inbox.prune(mixed, datetime(2026, 1, 3, tzinfo=UTC)) == 2
    assert set(await statuses(mixed)) == {"e3", "e4", "e5", "e6", "e7", "e8", "e9"}
    assert await inbox.prune(mixed, tomorrow) == 2
    assert set(await statuses(mixed)) == {"e5", "e6", "e7", "e8", "e9"}
    assert await inbox.prune(mixed, tomorrow) == 0
    assert len(await failures_of(mixed, "e5")) == 1


async def test_pruning_takes_the_bodies_along_and_what_is_left_keeps_its_own(
    db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "CHUNK", 2)
    names = [f"evt_{n}" for n in range(5)]
    await put(db, *(event(name) for name in (*names, "evt_new")))
    await processed(db, *names)
    heard: list[int] = []
    assert await inbox.prune(db, datetime.now(UTC), progress=heard.append) == 5
    assert heard == [2, 4, 5]
    [(left,)] = await db.fetch("SELECT event_id FROM webhook_events JOIN webhook_payloads USING (seq, created_at)")
    assert left == "evt_new"
    assert await db.fetchval("SELECT count(*) FROM webhook_payloads") == 1


async def test_what_a_cleanup_would_remove_is_counted_and_nothing_is_changed(db: Connection) -> None:
    assert await inbox.count_prunable(db, 0) == inbox.Prunable(0, 0, None, None)
    await put(db, event("evt_1"))
    await put(db, event("evt_2"), event("evt_3", "invoice.voided", "cus_2"))
    await processed(db, "evt_1", "evt_2")
    [first, last] = [(await row_of(db, name))["created_at"] for name in ("evt_1", "evt_2")]
    assert await inbox.count_prunable(db, 0) == inbox.Prunable(2, 2, first, last)
    await db.execute("DELETE FROM webhook_payloads WHERE created_at = $1", first)
    assert await inbox.count_prunable(db, 0) == inbox.Prunable(2, 1, first, last)
    assert await inbox.count_prunable(db, 1) == inbox.Prunable(0, 0, None, None)
    assert len(await statuses(db)) == 3
    assert await inbox.clean_up(db, 0) == 2


async def test_an_event_that_was_pruned_is_known_for_as_long_as_stripe_can_send_it_again(
    db: Connection,
) -> None:
    recent = int(datetime.now(UTC).timestamp()) - 86_400
    old = recent - 40 * 86_400
    await put(db, event("evt_recent", created=recent), event("evt_old", created=old))
    await processed(db, "evt_recent", "evt_old")
    assert await inbox.prune(db, datetime.now(UTC)) == 2

    known = await inbox.put(db, [read(event(name, created=recent)) for name in ("evt_recent", "evt_new")])
    assert known == {"evt_recent": Status.processed}
    assert set(await statuses(db)) == {"evt_new"}
    assert [name for (name,) in await db.fetch("SELECT event_id FROM webhook_tombstones")] == ["evt_recent"]

    await db.execute("UPDATE webhook_tombstones SET stripe_created = now() - interval '36 days'")
    await inbox.prune_tombstones(db)
    assert await db.fetchval("SELECT count(*) FROM webhook_tombstones") == 0


# ── Counts ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("folded", [False, True])
async def test_the_counts_are_what_counting_would_find_after_everything_that_can_happen(
    folded: bool, db: Connection
) -> None:
    for turn in range(3):
        await put(db, *(event(f"evt_{turn}_{n}", "invoice.paid" if n % 2 else "invoice.voided") for n in range(6)))
        await processed(db, f"evt_{turn}_0", f"evt_{turn}_1", f"evt_{turn}_2")
        await failed(db, f"evt_{turn}_3", f"evt_{turn}_4")
        if folded:
            await inbox.fold_counts(db)
    await inbox.retry(db, "evt_0_3")
    await inbox.replay(db, Filters(status="processed", type="invoice.voided"))
    await inbox.prune(db, datetime.now(UTC))
    if folded:
        await inbox.fold_counts(db)
        assert await db.fetchval("SELECT count(*) FROM webhook_count_changes") == 0

    counted = await db.fetch(
        """
        SELECT event_type, count(*) AS received, count(*) FILTER (WHERE status = 'processed') AS processed,
               count(*) FILTER (WHERE status = 'failed') AS failed,
               sum(processing_us)::bigint AS processing_us
        FROM webhook_events GROUP BY 1 ORDER BY 1
        """
    )
    said = sorted(await inbox.statistics(db, 7), key=lambda row: str(row["event_type"]))
    assert [_counts(row) for row in said] == [_counts(row) for row in counted]
    health = await inbox.health(db)
    assert (health["events_last_24h"], health["failed_events_last_24h"]) == (
        sum(row["received"] for row in counted),
        sum(row["failed"] for row in counted),
    )
    queue = await inbox.queue(db)
    waiting = await db.fetchval("SELECT count(*) FROM webhook_events WHERE status IN ('pending', 'processing')")
    assert (queue["backlog"], queue["dead"]) == (waiting, health["failed_events_last_24h"])


def _counts(row: asyncpg.Record) -> dict[str, object]:
    return {name: row[name] for name in ("event_type", "received", "processed", "failed", "processing_us")}
