"""From bytes and a header to a receipt: what is promised, when, and what if the database will not."""

import asyncio
import contextlib
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeAlias

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kamiyo import database, inbox
from kamiyo import receive as receiving
from kamiyo.database import Connection, listening
from kamiyo.errors import DatabaseUnavailable, Overloaded, PayloadError, SecretMissing, SignatureError
from kamiyo.event import lane_of, parse
from kamiyo.handlers import Registry
from kamiyo.receive import Message, Receipt, Receiver
from kamiyo.signature import sign
from tests.conftest import (
    DEADLINE,
    SECRET,
    Log,
    MakeSettings,
    NewDatabase,
    event_json,
    fresh_id,
    locks_waited_for,
    noop,
    rows_written,
    settings_for,
    until,
    waiting_for_locks,
)

OpenReceiver: TypeAlias = Callable[..., "contextlib.AbstractAsyncContextManager[Receiver]"]

#: A type that the receivers below have a handler for: its events wait for a worker, and there is none here.
HANDLED = "order.shipped"


@contextlib.asynccontextmanager
async def opened(url: str, *, running: bool = True, **changes: Any) -> AsyncIterator[Receiver]:
    """A receiver on the database at `url`; stopped, with what waits committed, when the block ends."""
    registry = Registry()
    registry.on(HANDLED)(noop)
    pool = await database.open_pool(url, size=4, application="receiver", idle_limit=60)
    receiver = Receiver(pool, settings_for(url, **changes), registry)
    task = asyncio.create_task(receiver.run()) if running else None
    try:
        yield receiver
    finally:
        receiver.close()
        if task is not None:
            await task
        pool.terminate()


@pytest.fixture
async def receiver(database_url: str) -> AsyncIterator[Receiver]:
    async with opened(database_url) as receiver:
        yield receiver


def receive(receiver: Receiver, body: bytes) -> Awaitable[Receipt]:
    """Hand `body` over, rightly signed."""
    return receiver.receive(body, sign(body, SECRET, int(time.time())))


def customer_event(event_id: str, customer: str, **fields: Any) -> bytes:
    return event_json(event_id, "customer.updated", {"id": customer, "object": "customer", "created": 1, **fields})


async def commit(receiver: Receiver) -> None:
    """Commit what waits, and be done. Last in a gather(): the tasks before it have begun to wait by then."""
    receiver.close()
    await receiver.run()


async def one_too_many(receiver: Receiver, body: bytes) -> "asyncio.Task[None]":
    """See `body` refused, then let the receiver run, in the task returned. Last in a gather(), as above."""
    with pytest.raises(Overloaded):
        await receive(receiver, body)
    return asyncio.create_task(receiver.run())


async def stored(db: Connection) -> dict[str, str]:
    """Status of every event there is, by id."""
    return {event_id: status for event_id, status in await db.fetch("SELECT event_id, status FROM webhook_events")}


# ── The promise ───────────────────────────────────────────────────────────────────────────────────────────


async def test_when_the_receipt_is_there_anyone_can_see_the_event_and_its_bytes(
    receiver: Receiver, db: Connection
) -> None:
    body = b' {"id":"evt_1", "type":"order.shipped",\n"data":{"object":{"x":"\\u0000\\ud83d"}}}'
    assert await receive(receiver, body) == Receipt("evt_1", HANDLED, Message.received)
    row, failures = await inbox.one(db, "evt_1")
    assert (row["status"], row["source"], row["body"], failures) == ("pending", "webhook", body, [])


async def test_a_copy_is_known_and_the_first_body_stays(receiver: Receiver, db: Connection) -> None:
    first, second = event_json("evt_1", HANDLED), event_json("evt_1", HANDLED, extra="another body")
    said = [(await receive(receiver, body)).message for body in (first, second)]
    assert said == [Message.received, Message.already_received]
    assert (await inbox.one(db, "evt_1"))[0]["body"] == first

    await db.execute("UPDATE webhook_events SET status = 'processing'")
    assert (await receive(receiver, first)).message == Message.already_received
    await db.execute("UPDATE webhook_events SET status = 'failed', failed_at = now()")
    assert (await receive(receiver, first)).message == Message.already_received
    await db.execute(
        "UPDATE webhook_events SET status = 'processed', outcome = 'handled', failed_at = NULL, next_try_at = NULL"
    )
    assert (await receive(receiver, first)).message == Message.already_processed
    assert await db.fetchval("SELECT count(*) FROM webhook_payloads") == 1


async def test_a_late_copy_of_an_event_that_was_cleaned_up_is_known_for_what_it_is(
    receiver: Receiver, db: Connection
) -> None:
    body = event_json("evt_1")
    await receive(receiver, body)
    await db.execute("UPDATE webhook_events SET created_at = now() - interval '2 days'")
    assert await inbox.prune(db, (await db.fetchval("SELECT now()"))) == 1
    assert (await receive(receiver, body)).message == Message.already_processed
    assert await stored(db) == {}


async def test_a_copy_that_comes_while_its_event_is_cleaned_up_is_known_for_what_it_is(
    receiver: Receiver, db: Connection
) -> None:
    gone, stays = customer_event("evt_gone", "cus_1"), event_json("evt_stays", HANDLED)
    await asyncio.gather(receive(receiver, gone), receive(receiver, stays))
    async with db.transaction():
        assert await inbox.prune(db, await db.fetchval("SELECT now() + interval '1 minute'")) == 1
        group = asyncio.gather(*(receive(receiver, body) for body in (gone, stays, event_json("evt_new", HANDLED))))
        await until(lambda: db.fetchval(_WAITING))
    assert [receipt.message for receipt in await group] == [
        Message.already_processed,
        Message.already_received,
        Message.received,
    ]
    assert await stored(db) == {"evt_stays": "pending", "evt_new": "pending"}
    assert await db.fetchval("SELECT count(*) FROM webhook_payloads") == 2
    counted = await db.fetch("SELECT event_type, total_events FROM webhook_statistics")
    assert [tuple(row) for row in counted] == [(HANDLED, 2)]


#: How many of the receivers' sessions wait for somebody.
_WAITING = """
SELECT count(*) FROM pg_locks WHERE NOT granted AND pid IN (
    SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'receiver')
"""


async def test_a_forged_or_senseless_body_is_refused_and_nothing_is_written(receiver: Receiver, db: Connection) -> None:
    for body, header, error in (
        (event_json(), None, SignatureError),
        (event_json(), "nonsense", SignatureError),
        (event_json(), sign(event_json(), "whsec_wrong", int(time.time())), SignatureError),
        (b"[]", sign(b"[]", SECRET, int(time.time())), PayloadError),
        (b"{}", sign(b"{}", SECRET, int(time.time())), PayloadError),
    ):
        with pytest.raises(error):
            await receiver.receive(body, header)
    assert await rows_written(db) == {}


async def test_without_a_secret_the_door_is_shut_before_a_byte_is_read(database_url: str) -> None:
    async with opened(database_url, STRIPE_WEBHOOK_SECRET=" , ") as receiver:
        with pytest.raises(SecretMissing):
            receiver.ready()
        with pytest.raises(SignatureError):
            await receive(receiver, event_json())


# ── The group commit ──────────────────────────────────────────────────────────────────────────────────────


async def test_deliveries_that_wait_share_a_commit(receiver: Receiver, db: Connection) -> None:
    await asyncio.gather(*(receive(receiver, event_json(f"evt_{n}", HANDLED)) for n in range(300)))
    commits = Counter(xmin for (xmin,) in await db.fetch("SELECT xmin::text FROM webhook_events"))
    assert sum(commits.values()) == 300
    assert len(commits) <= 3


async def test_of_many_that_wait_half_goes_ahead_so_that_neither_we_nor_postgresql_wait_for_the_other(
    database_url: str, db: Connection
) -> None:
    async with opened(database_url, running=False) as receiver:
        many = [receive(receiver, event_json(f"evt_{n}", HANDLED)) for n in range(40)]
        await asyncio.gather(*many, commit(receiver))
    commits = await db.fetch("SELECT count(*) FROM webhook_events GROUP BY created_at ORDER BY created_at")
    assert [count for (count,) in commits] == [20, 20]


async def test_the_same_event_over_two_connections_at_once_is_stored_once_and_both_are_told_the_truth(
    database_url: str, db: Connection
) -> None:
    async with opened(database_url, running=False) as receiver:
        bodies = [event_json("evt_1", HANDLED), event_json("evt_1", HANDLED), event_json("evt_2", HANDLED)]
        *receipts, _ = await asyncio.gather(*(receive(receiver, body) for body in bodies), commit(receiver))
        assert [receipt.message for receipt in receipts if receipt] == [
            Message.received,
            Message.already_received,
            Message.received,
        ]
    assert await stored(db) == {"evt_1": "pending", "evt_2": "pending"}


async def test_two_servers_that_get_the_same_events_store_each_once_and_both_tell_the_truth(
    database_url: str, db: Connection
) -> None:
    ids = [f"evt_{n}" for n in range(200)]
    bodies = {event_id: event_json(event_id, HANDLED) for event_id in ids}
    async with locks_waited_for(db), opened(database_url) as one, opened(database_url) as other:
        answers = await asyncio.gather(
            *(receive(one, bodies[event_id]) for event_id in ids),
            *(receive(other, bodies[event_id]) for event_id in reversed(ids)),
        )
    said: dict[str, list[str]] = {event_id: [] for event_id in ids}
    for receipt in answers:
        said[receipt.event_id].append(receipt.message)
    assert all(sorted(pair) == ["Event already received", "Event received"] for pair in said.values())


async def test_two_servers_that_get_the_same_events_in_opposite_order_do_not_wait_for_each_other_in_a_ring(
    database_url: str, db: Connection
) -> None:
    ids = [f"evt_{n}" for n in range(100, 200)]
    bodies = {event_id: event_json(event_id, HANDLED) for event_id in ids}
    other_db = await database.connect(database_url, application="test")

    async def both_wait() -> bool:
        return await waiting_for_locks(other_db) == 2

    async with locks_waited_for(other_db), opened(database_url) as one, opened(database_url) as other:
        # Someone is in the middle of storing the one in the middle: each of the two gets there from its own end,
        # and goes on only when the other is there as well.
        held = db.transaction()
        await held.start()
        await db.execute(
            "INSERT INTO webhook_events (event_id, event_type, stripe_created, lane, next_try_at) "
            "VALUES ('evt_150', 'x', now(), 1, now())"
        )
        upwards = asyncio.gather(*(receive(one, bodies[event_id]) for event_id in ids))
        downwards = asyncio.gather(*(receive(other, bodies[event_id]) for event_id in reversed(ids)))
        await until(both_wait)
        await held.rollback()
        receipts = [*await upwards, *await downwards]
    assert Counter(receipt.message for receipt in receipts) == {Message.received: 100, Message.already_received: 100}
    await other_db.close()


async def test_a_copy_that_another_server_takes_long_to_commit_costs_nobody_the_answer(
    receiver: Receiver, db: Connection
) -> None:
    bodies = [event_json(f"evt_{number}", HANDLED) for number in range(3)]
    await receive(receiver, event_json("evt_before", HANDLED))
    async with db.transaction():
        await inbox.put(db, [parse(bodies[1], received=time.time())])
        group = asyncio.gather(*(receive(receiver, body) for body in bodies))

        async def longer_than_a_billing_row_is_waited_for() -> bool:
            waiting = f"{_WAITING} AND clock_timestamp() - waitstart > interval '400 ms'"
            return group.done() or bool(await db.fetchval(waiting))

        await until(longer_than_a_billing_row_is_waited_for)
    assert [receipt.message for receipt in await group] == [
        Message.received,
        Message.already_received,
        Message.received,
    ]


async def test_a_client_that_gives_up_takes_neither_its_event_nor_its_neighbours_out_of_the_group(
    database_url: str, db: Connection
) -> None:
    async with opened(database_url, running=False) as receiver:
        leaving = asyncio.ensure_future(receive(receiver, event_json("evt_1", HANDLED)))

        async def give_up() -> None:
            leaving.cancel()

        staying, _, _, gone = await asyncio.gather(
            *(receive(receiver, event_json("evt_2", HANDLED)), give_up(), commit(receiver), leaving),
            return_exceptions=True,
        )
        assert isinstance(staying, Receipt) and staying.message == Message.received
        assert isinstance(gone, asyncio.CancelledError)
    assert set(await stored(db)) == {"evt_1", "evt_2"}


async def test_a_stop_commits_what_waits_and_takes_nothing_more(database_url: str, db: Connection) -> None:
    async with opened(database_url, running=False) as receiver:

        async def stop() -> None:
            receiver.close()
            with pytest.raises(Overloaded):
                await receive(receiver, event_json())
            await receiver.run()

        *receipts, _ = await asyncio.gather(*(receive(receiver, event_json()) for _ in range(5)), stop())
        assert {receipt.message for receipt in receipts if receipt} == {Message.received}
    assert len(await stored(db)) == 5


async def test_an_error_that_nobody_thought_of_costs_only_the_event_that_it_is_about(
    receiver: Receiver, db: Connection, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_projected = inbox.put_projected

    async def stumbles(db: Connection, arrivals: Sequence[inbox.Arrival], *rest: Any, **named: Any) -> inbox.Stored:
        if any(arrival.event.id == "evt_odd" for arrival in arrivals):
            raise ZeroDivisionError("jenny@example.com")
        return await put_projected(db, arrivals, *rest, **named)

    monkeypatch.setattr(inbox, "put_projected", stumbles)
    ids = ("evt_1", "evt_odd", "evt_2")
    told = await asyncio.gather(*(receive(receiver, event_json(name, HANDLED)) for name in ids), return_exceptions=True)
    said = [answer.message if isinstance(answer, Receipt) else type(answer) for answer in told]
    assert said == [Message.received, DatabaseUnavailable, Message.received]
    lines = [line for line in log() if line["event"] == "receiver_failed"]
    assert {line["error"] for line in lines} == {"ZeroDivisionError"}
    assert re.fullmatch(r"receive\.py:\d+", str(lines[0]["place"]))
    assert "jenny@example.com" not in str(log())
    monkeypatch.setattr(inbox, "put_projected", put_projected)
    assert (await receive(receiver, event_json("evt_odd", HANDLED))).message == Message.received
    assert set(await stored(db)) == set(ids)


# ── Too much ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_more_than_can_wait_is_refused_at_once_and_what_waits_is_stored(
    database_url: str, db: Connection
) -> None:
    async with opened(database_url, running=False, KAMIYO_MAX_WAITING=3) as receiver:
        *_, running = await asyncio.gather(
            receive(receiver, event_json("evt_0")),
            receive(receiver, event_json("evt_1")),
            receive(receiver, event_json("evt_2")),
            one_too_many(receiver, event_json("evt_3")),
        )
        assert (await receive(receiver, event_json("evt_3"))).message == Message.received
        receiver.close()
        await running
    assert set(await stored(db)) == {"evt_0", "evt_1", "evt_2", "evt_3"}


async def test_the_bytes_that_wait_are_bounded_and_given_back_after_each_commit(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiving, "MOST_BYTES_WAITING", 25_000)
    large = event_json(obj={"note": "x" * 10_000}, event_id="evt_1")
    async with opened(database_url, running=False) as receiver:
        *_, running = await asyncio.gather(
            receive(receiver, large), receive(receiver, large), one_too_many(receiver, large)
        )
        for _ in range(5):
            await receive(receiver, large)
        receiver.close()
        await running


# ── The database will not ─────────────────────────────────────────────────────────────────────────────────


async def test_a_commit_that_does_not_come_in_time_is_given_up_and_the_next_copy_is_new(
    database_url: str, db: Connection
) -> None:
    body = event_json("evt_1", HANDLED)

    async def nobody_waits() -> bool:
        waiting = "SELECT count(*) FROM pg_locks WHERE relation = 'webhook_events'::regclass AND NOT granted"
        return bool(await db.fetchval(waiting) == 0)

    async with opened(database_url, KAMIYO_COMMIT_TIMEOUT=0.2) as receiver:
        async with db.transaction():
            await db.execute("LOCK TABLE webhook_events")
            with pytest.raises(DatabaseUnavailable):
                await receive(receiver, body)
            await until(nobody_waits)
        assert await stored(db) == {}
    # By another one, whose patience is longer than it takes to connect on a busy machine.
    async with opened(database_url) as receiver:
        assert (await receive(receiver, body)).message == Message.received


async def test_a_delivery_is_answered_in_time_even_while_nobody_commits_at_all(database_url: str) -> None:
    # So it is from the start of a server until it has reached its database once.
    async with opened(database_url, running=False, KAMIYO_COMMIT_TIMEOUT=0.1) as receiver:
        with pytest.raises(DatabaseUnavailable):
            async with asyncio.timeout(5):
                await receive(receiver, event_json())


async def test_without_a_database_every_delivery_is_refused_and_none_waits_for_ever() -> None:
    async with opened("postgresql://nobody@/nothing?host=/nonexistent", KAMIYO_COMMIT_TIMEOUT=0.5) as receiver:
        async with asyncio.timeout(DEADLINE):
            answers = await asyncio.gather(
                *(receive(receiver, event_json()) for _ in range(20)), return_exceptions=True
            )
        assert {type(answer) for answer in answers} == {DatabaseUnavailable}


async def test_a_connection_that_is_cut_is_made_again(receiver: Receiver, db: Connection) -> None:
    await receive(receiver, event_json("evt_1"))
    for n in range(3):
        cut = await db.fetchval(
            "SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name = 'receiver'"
        )
        assert cut >= 1

        async def again(event_id: str = f"evt_again_{n}") -> Receipt | None:
            # Refused at most until the cut is noticed: what Stripe does then is to send it again.
            with contextlib.suppress(DatabaseUnavailable):
                return await receive(receiver, event_json(event_id))
            return None

        assert (await until(again)) is not None
    assert set(await stored(db)) == {"evt_1", "evt_again_0", "evt_again_1", "evt_again_2"}


async def test_who_waits_while_the_connection_breaks_is_committed_by_the_next_one(
    receiver: Receiver, db: Connection
) -> None:
    blocked = (
        "SELECT pid FROM pg_locks WHERE NOT granted AND relation = 'webhook_events'::regclass "
        "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    async with locks_waited_for(db), db.transaction():
        await db.execute("LOCK TABLE webhook_events IN ACCESS EXCLUSIVE MODE")
        first = asyncio.ensure_future(receive(receiver, event_json("evt_1")))
        session = await until(lambda: db.fetchval(blocked))
        second = asyncio.ensure_future(receive(receiver, event_json("evt_2")))
        await asyncio.sleep(0)  # it has joined the line
        await db.execute("SELECT pg_terminate_backend($1, 5000)", session)
        with pytest.raises(DatabaseUnavailable):
            await first
    assert (await second).message == Message.received
    assert set(await stored(db)) == {"evt_2"}


async def test_a_server_that_slept_through_the_making_of_partitions_makes_them_when_the_first_event_comes(
    new_database: NewDatabase,
) -> None:
    url = new_database()
    db = await database.connect(url, application="test")
    partitions = await db.fetch(
        "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'webhook_payloads'::regclass"
    )
    for (name,) in partitions:
        await db.execute(f"DROP TABLE {name}")
    async with opened(url) as receiver:
        answers = await asyncio.gather(*(receive(receiver, event_json(event_type=HANDLED)) for _ in range(20)))
    assert {receipt.message for receipt in answers} == {Message.received}
    assert await db.fetchval("SELECT count(*) FROM webhook_payloads") == 20
    await db.close()


# ── Projected on arrival, or left to the workers ──────────────────────────────────────────────────────────


async def test_an_event_that_needs_only_its_billing_row_is_processed_when_it_is_acknowledged(
    receiver: Receiver, db: Connection
) -> None:
    await receive(receiver, customer_event("evt_1", "cus_1", email="jenny@example.com"))
    row = await db.fetchrow("SELECT status, outcome, attempts, processed_at FROM webhook_events")
    assert row is not None
    assert (row["status"], row["outcome"], row["attempts"]) == ("processed", "projected", 1)
    assert row["processed_at"] is not None
    assert await db.fetchval("SELECT email FROM billing.customers WHERE id = 'cus_1'") == "jenny@example.com"


async def test_an_event_that_nobody_asked_for_is_ignored_on_arrival(receiver: Receiver, db: Connection) -> None:
    await receive(receiver, event_json("evt_1", "charge.succeeded"))
    assert tuple(*await db.fetch("SELECT status, outcome FROM webhook_events")) == ("processed", "ignored")


async def test_an_event_with_a_handler_is_left_to_the_workers_and_they_are_woken(
    receiver: Receiver, database_url: str, db: Connection
) -> None:
    heard = asyncio.Event()
    async with listening(database_url, heard.set):
        await receive(receiver, event_json("evt_1", HANDLED))
        async with asyncio.timeout(DEADLINE):
            await heard.wait()
    assert await stored(db) == {"evt_1": "pending"}


async def test_while_a_worker_has_the_customer_in_hand_their_next_event_waits_its_turn(
    receiver: Receiver, db: Connection
) -> None:
    async with db.transaction():
        assert await db.fetchval("SELECT pg_try_advisory_xact_lock(1800432, $1)", lane_of("", "cus_1"))
        await receive(receiver, customer_event("evt_1", "cus_1"))
        await receive(receiver, customer_event("evt_2", "cus_2"))
    assert await stored(db) == {"evt_1": "pending", "evt_2": "processed"}


async def test_a_person_who_holds_a_billing_row_for_long_holds_up_no_acknowledgement(
    receiver: Receiver, db: Connection
) -> None:
    await receive(receiver, customer_event("evt_1", "cus_1"))
    async with db.transaction():
        await db.execute("SELECT FROM billing.customers WHERE id = 'cus_1' FOR UPDATE")
        async with asyncio.timeout(5):
            await receive(receiver, customer_event("evt_2", "cus_1", email="new@example.com"))
        assert await stored(db) == {"evt_1": "processed", "evt_2": "pending"}


@given(
    st.lists(
        st.sampled_from(
            [
                {"name": "\0"},
                {"name": "\ud800"},
                {"metadata": {"a\0": "b"}},
                {"metadata": {"\udfff": "\udfff"}},
                {"balance": 2**63},
                {"balance": -(2**70)},
                {"balance": 1.5},
                {"created": 10**15},
                {"email": ["not", "a", "string"]},
                {"delinquent": "perhaps"},
                {"metadata": []},
                {"id": ""},
                {"invoice_settings": 7},
                {"deleted": True},
            ]
        ),
        min_size=1,
        max_size=4,
    )
)
@hypothesis_settings(max_examples=40)
async def test_an_event_the_tables_refuse_keeps_no_other_from_being_stored(
    receiver: Receiver, db: Connection, poisons: list[dict[str, Any]]
) -> None:
    bodies = {}
    for poison in [*poisons, {}]:
        event_id, customer = fresh_id(), {"id": fresh_id("cus"), "object": "customer", "created": 1, **poison}
        bodies[event_id] = event_json(event_id, "customer.updated", customer)
    receipts = await asyncio.gather(*(receive(receiver, body) for body in bodies.values()))
    assert [receipt.message for receipt in receipts] == [Message.received] * len(bodies)
    kept = await db.fetch(
        "SELECT e.event_id, p.body FROM webhook_events e JOIN webhook_payloads p USING (seq) WHERE event_id = ANY ($1)",
        list(bodies),
    )
    assert {event_id: body for event_id, body in kept} == bodies


async def test_two_states_of_one_object_in_one_group_leave_the_later_one(database_url: str, db: Connection) -> None:
    async with opened(database_url, running=False) as receiver:
        bodies = [
            event_json(
                f"evt_{at}",
                "customer.updated",
                {"id": "cus_1", "object": "customer", "name": f"at {at}"},
                created=at,
            )
            for at in (1002, 1003, 1001)
        ]
        await asyncio.gather(*(receive(receiver, body) for body in bodies), commit(receiver))
    assert await db.fetchval("SELECT name FROM billing.customers") == "at 1003"
    assert set((await stored(db)).values()) == {"processed"}


async def test_the_body_is_shown_as_json_for_people_even_where_jsonb_could_not_hold_it(
    receiver: Receiver, db: Connection
) -> None:
    await receive(receiver, event_json("evt_1", obj={"id": "ch_1", "note": "a\0b\ud800"}))
    shown = json.loads(await db.fetchval("SELECT payload FROM webhook_event_payloads WHERE event_id = 'evt_1'"))
    assert shown["data"]["object"] == {"id": "ch_1", "note": "a\ufffdb\ufffd"}


async def test_settings_are_those_the_receiver_was_made_with(settings: MakeSettings, database_url: str) -> None:
    async with opened(database_url, KAMIYO_SIGNATURE_TOLERANCE=10, STRIPE_WEBHOOK_SECRET="whsec_a,whsec_b") as receiver:
        body, now = event_json(), int(time.time())
        assert (await receiver.receive(body, sign(body, "whsec_b", now))).message == Message.received
        with pytest.raises(SignatureError, match="too_old"):
            await receiver.receive(body, sign(body, "whsec_a", now - 12))
        with pytest.raises(SignatureError, match="no_match"):
            await receiver.receive(body, sign(body, SECRET, now))
