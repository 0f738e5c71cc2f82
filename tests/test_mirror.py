"""`stripe_objects`: the latest state of every object, whatever arrives when, in whatever company, and how often."""

import asyncio
import json
import random
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import permutations, zip_longest
from typing import Any

import asyncpg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kamiyo import database, inbox, mirror, projections, rebuild, shapes
from kamiyo.database import Connection
from kamiyo.event import Event
from kamiyo.handlers import Registry
from kamiyo.inbox import Outcome
from kamiyo.mirror import ALL, State, state_of
from kamiyo.receive import ready_to_project
from kamiyo.simulator import API_VERSIONS, EVENT_TYPES, OBJECTS, SimulatedEvent, World, deliveries, lifecycle, single
from tests.conftest import MakeSettings, event_json, until, waiting_for_locks
from tests.turns import NOW, example, failures_of, put, read, row_of, work_off, worker_on

EVERY = frozenset({ALL})
RECEIVED = datetime(2026, 9, 21, tzinfo=UTC)

#: The rows by object and id, without the one column that says when we were told.
Objects = dict[tuple[str, str], dict[str, Any]]


async def objects(db: Connection) -> Objects:
    rows = await db.fetch("SELECT * FROM stripe_objects")
    return {
        (row["object"], row["id"]): {
            name: json.loads(value) if name == "data" else value for name, value in row.items() if name != "updated_at"
        }
        for row in rows
    }


def states(events: Iterable[Event]) -> list[State]:
    shown = [state_of(event, RECEIVED, projections.row_of(event, RECEIVED)) for event in events]
    return [state for state in shown if state is not None]


# ── The law ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Lives:
    """Some customers' lives side by side, charges and refunds included; each event in one API version for good."""

    world: World
    told: list[list[SimulatedEvent]]
    rng: random.Random
    mixed: bool

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        # How Hypothesis shows an example. Told in full, these lives fill pages.
        printer.text(f"<{len(self.told)} lives of seed {self.world.seed}, mixed {self.mixed}>")

    @property
    def events(self) -> list[SimulatedEvent]:
        return [event for life in self.told for event in life if event.type != "invoice.upcoming"]

    def in_order(self) -> list[list[Event]]:
        turns = zip_longest(*self.told)
        return [[self.worded(e) for e in turn if e and e.type != "invoice.upcoming"] for turn in turns]

    def in_disorder(self) -> list[list[Event]]:
        sent = [self.worded(event) for event in deliveries(self.events, self.rng)]
        batches = []
        while sent:
            size = self.rng.choice((1, 1, 2, 3, 5, 8, 20, 100))
            batches.append(sent[:size])
            sent = sent[size:]
        return batches

    def worded(self, event: SimulatedEvent) -> Event:
        return read(event.body(self.version(event)))

    def version(self, event: SimulatedEvent) -> str:
        return API_VERSIONS[zlib.crc32(event.id.encode()) % len(API_VERSIONS)] if self.mixed else API_VERSIONS[-1]


@st.composite
def lives(draw: st.DrawFn, *, flips: bool) -> Lives:
    seed, count, steps = draw(st.integers(0, 2**32)), draw(st.integers(1, 8)), draw(st.integers(1, 20))
    world, rng = World(seed, start=NOW), random.Random(seed)
    told = [lifecycle(world, rng, steps=steps, flips=flips) for _ in range(count)]
    return Lives(world, told, rng, draw(st.booleans()))


async def kept(db: Connection, batches: Sequence[Sequence[Event]]) -> Objects:
    """Store and project batch after batch in one transaction, which is undone again."""
    transaction = db.transaction()
    await transaction.start()
    try:
        for batch in batches:
            await inbox.put(db, list({event.id: event for event in batch}.values()))
            await mirror.project(db, states(batch), EVERY)
        return await objects(db)
    finally:
        await transaction.rollback()


@pytest.mark.parametrize("flips", [False, True], ids=["", "flips"])
@settings(max_examples=8)
@given(data=st.data())
async def test_any_order_any_duplicates_and_any_batches_end_alike_and_true_where_decided(
    flips: bool, data: st.DataObject, db: Connection
) -> None:
    told = data.draw(lives(flips=flips))
    straight = await kept(db, told.in_order())
    last: dict[tuple[str, str], SimulatedEvent] = {}
    gone = set()
    seconds: Counter[tuple[str, str, int]] = Counter()
    for event in told.events:
        place = event.object, event.object_id or ""
        seconds[*place, event.created] += 1
        if event.type.endswith(".deleted"):
            gone.add(place)
        if not event.stub:
            last[place] = event
    assert set(straight) == set(last)
    assert {place for place, row in straight.items() if row["deleted"]} == gone
    by_id = {event.id: event for event in told.events}
    for place, row in straight.items():
        event, latest = by_id[row["last_webhook_event_id"]], last[place]
        assert row["data"] == event.render(told.version(event))["data"]["object"]
        assert (row["api_version"], row["livemode"]) == (told.version(event), False)
        if row["order_evidence"] == "undecided":
            assert seconds[*place, latest.created] > 1, "it could have been decided"
        else:
            # Perhaps by another event that shows the same, in its own wording.
            assert event.render()["data"]["object"] == latest.render()["data"]["object"], event.type
    for _ in range(2):
        assert await kept(db, told.in_disorder()) == straight


@settings(max_examples=4)
@given(told=lives(flips=True), size=st.integers(1, 30))
async def test_workers_and_a_rebuild_come_to_the_same(
    told: Lives, size: int, db: Connection, database_url: str, settings: MakeSettings
) -> None:
    expected = await kept(db, told.in_order())
    worker = await worker_on(database_url, settings(KAMIYO_WORKER_BATCH=size, KAMIYO_MIRROR="all"))
    for batch in told.in_disorder():
        new = list({event.id: event for event in batch}.values())
        arrivals, rows = ready_to_project(new, Registry(), EVERY)
        assert {arrival.outcome for arrival in arrivals} == {None}
        await inbox.put_projected(db, arrivals, rows, microseconds=1)
        if told.rng.random() < 0.3:
            await worker.run_once(db)
    await work_off(worker, db)
    assert await objects(db) == expected
    assert await db.fetchval("SELECT count(*) FROM webhook_events WHERE outcome IS DISTINCT FROM 'projected'") == 0

    await db.execute("UPDATE stripe_objects SET data = '{}'")
    await rebuild.rebuild(db, mirrored=EVERY)
    assert await objects(db) == expected
    for table in ("stripe_objects", "webhook_events", "webhook_payloads", *_BILLING):
        await db.execute(f"DELETE FROM {table}")  # noqa: S608 - our own names


_BILLING = tuple(f"billing.{table}" for table in shapes.TABLES)


# ── What is kept ────────────────────────────────────────────────────────────────────────────────────────────


async def test_every_event_type_of_stripes_leaves_its_object(
    db: Connection, database_url: str, settings: MakeSettings
) -> None:
    worker = await worker_on(database_url, settings(KAMIYO_MIRROR="all"))
    events = [single(event_type, seed=at, now=NOW)[-1] for at, event_type in enumerate(EVENT_TYPES)]
    assert {event.object for event in events} == OBJECTS
    # Some things an account has only one of. Apart, they are all there.
    bodies = [read(event.body()) for event in events]
    await inbox.put(db, bodies)
    await work_off(worker, db)

    assert await db.fetchval("SELECT count(*) FROM webhook_events WHERE status <> 'processed'") == 0
    found = await objects(db)
    for event, body in zip(events, bodies, strict=True):
        row = found.get((event.object, event.object_id or body.customer or ""))
        if event.type == "invoice.upcoming":
            assert row is None
            continue
        assert row is not None, event.type
        if row["last_webhook_event_id"] == event.id:
            assert row["data"] == event.render()["data"]["object"], event.type
            assert row["deleted"] == event.type.endswith(".deleted"), event.type
        else:
            assert not event.object_id or event.object in ("capability", "reporting.report_type"), event.type


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("", set()),
        ("charge, refund", {"charge", "refund"}),
        ("charge.refunded,customer", {"charge", "customer"}),
    ],
)
async def test_only_what_is_named_is_kept_and_left_to_the_workers(
    names: str, expected: set[str], db: Connection, database_url: str, settings: MakeSettings
) -> None:
    chosen = settings(KAMIYO_MIRROR=names)
    worker = await worker_on(database_url, chosen)
    bodies = [
        event_json("evt_1", "charge.refunded"),
        event_json("evt_2", "charge.updated", {"id": "ch_2", "object": "charge"}),
        event_json("evt_3", "refund.created", {"id": "re_1", "object": "refund"}),
        event_json("evt_4", "customer.updated", example("customer", id="cus_1")),
    ]
    arrivals, rows = ready_to_project([read(body) for body in bodies], Registry(), chosen.mirrored)
    await inbox.put_projected(db, arrivals, rows, microseconds=1)
    left = {arrival.event.id for arrival in arrivals if arrival.outcome is None}
    assert await work_off(worker, db) == len(left)

    found = await objects(db)
    assert {name for name, _ in found} == expected
    assert {row["last_webhook_event_id"] for row in found.values()} == left
    assert (("charge", "ch_2") in found) == ("charge" in chosen.mirrored)
    rows_of = await db.fetch("SELECT event_id, outcome FROM webhook_events")
    outcomes: dict[str, str] = {event_id: outcome for event_id, outcome in rows_of}
    assert outcomes["evt_4"] == "projected"
    assert outcomes["evt_3"] == ("projected" if "refund" in expected else "ignored")


async def test_an_object_is_kept_whatever_its_text_holds(
    db: Connection, database_url: str, settings: MakeSettings
) -> None:
    worker = await worker_on(database_url, settings(KAMIYO_MIRROR="all", KAMIYO_FIRST_RETRY_DELAY=60))
    head = rb'{"id": "evt_%d", "object": "event", "type": "charge.updated", "created": 1790000000, "data": {"object": '
    for at, text in enumerate((rb"a\u0000b", rb"a\ud800b", rb"\ud83d\ude00 \u00e9", "żółć 美".encode(), rb"\\u0000")):
        shown = rb'{"id": "ch_%d", "object": "charge", "metadata": {"k\u0000": "' % at + text + rb'"}}}}'
        await put(db, head % at + shown)
    await put(db, head % 9 + b'{"id": "ch_9", "object": "charge", "amount": 1e999999}}}')
    await work_off(worker, db)

    found = await objects(db)
    said = [found["charge", f"ch_{at}"]["data"]["metadata"]["k\N{REPLACEMENT CHARACTER}"] for at in range(5)]
    assert said == ["a\N{REPLACEMENT CHARACTER}b", "a?b", "😀 é", "żółć 美", r"\u0000"]
    # What jsonb cannot hold fails by itself, and is seen.
    assert ("charge", "ch_9") not in found
    assert (await row_of(db, "evt_9"))["status"] == "failed"
    [failure] = await failures_of(db, "evt_9")
    assert failure["error_type"].endswith("NumericValueOutOfRangeError")


async def test_a_failing_handler_does_not_keep_its_object_from_being_kept(
    db: Connection, database_url: str, settings: MakeSettings
) -> None:
    own = Registry()

    @own.on("charge.succeeded")
    async def fails(event: Event, db: Connection) -> None:
        await db.execute("SELECT 1 / 0")

    worker = await worker_on(database_url, settings(KAMIYO_MIRROR="charge"), own)
    await put(db, event_json("evt_1", "charge.succeeded"))
    await worker.run_once(db)
    assert (await row_of(db, "evt_1"))["status"] == "failed"
    assert ("charge", "ch_1") in await objects(db)


# ── The ends of lives ───────────────────────────────────────────────────────────────────────────────────────


async def in_every_order(db: Connection, bodies: Sequence[bytes]) -> Objects:
    """What these events come to, which must be the same in every order."""
    events = [read(body) for body in bodies]
    expected = await kept(db, [events])
    for order in permutations(events):
        assert await kept(db, [[event] for event in order]) == expected
    return expected


async def test_a_deletion_that_only_says_gone_leaves_what_was_last_shown(db: Connection) -> None:
    ada = example("customer", id="cus_1", name="Ada")
    stub = example("deleted_customer", id="cus_1")
    found = await in_every_order(
        db,
        [
            event_json("evt_1", "customer.created", ada, created=NOW),
            event_json("evt_2", "customer.updated", {**ada, "name": "Bo"}, created=NOW + 1),
            event_json("evt_3", "customer.deleted", stub, created=NOW + 2),
        ],
    )
    row = found["customer", "cus_1"]
    assert (row["data"]["name"], row["deleted"], row["last_webhook_event_id"]) == ("Bo", True, "evt_2")

    alone = await in_every_order(
        db, [event_json(f"evt_{n}", "customer.deleted", stub, created=NOW + 2) for n in (1, 2)]
    )
    assert (alone["customer", "cus_1"]["data"], alone["customer", "cus_1"]["deleted"]) == (stub, True)


async def test_a_deletion_is_final_but_for_what_can_be_made_again_under_its_id(db: Connection) -> None:
    def told(kind: str) -> list[bytes]:
        shown = {"id": "SUMMER", "object": kind, "created": NOW, "name": "one"}
        return [
            event_json("evt_1", f"{kind}.created", shown, created=NOW),
            event_json("evt_2", f"{kind}.deleted", shown, created=NOW + 5),
            event_json("evt_3", f"{kind}.created", {**shown, "created": NOW + 9, "name": "two"}, created=NOW + 9),
        ]

    [coupon] = (await in_every_order(db, told("coupon"))).values()
    assert (coupon["data"]["name"], coupon["deleted"]) == ("two", False)
    [tax_id] = (await in_every_order(db, told("tax_id"))).values()
    assert (tax_id["data"]["name"], tax_id["deleted"]) == ("one", True)


async def test_what_is_still_changed_after_its_end_stays_deleted(db: Connection) -> None:
    ended = example("subscription", id="sub_1", status="canceled", ended_at=NOW)
    found = await in_every_order(
        db,
        [
            event_json("evt_1", "customer.subscription.created", {**ended, "status": "active", "ended_at": None}),
            event_json("evt_2", "customer.subscription.deleted", ended, created=NOW + 1),
            event_json("evt_3", "customer.subscription.updated", {**ended, "metadata": {"a": "b"}}, created=NOW + 2),
        ],
    )
    row = found["subscription", "sub_1"]
    assert (row["data"]["metadata"], row["deleted"]) == ({"a": "b"}, True)


# ── One second ──────────────────────────────────────────────────────────────────────────────────────────────


def charge(event_id: str, event_type: str, *, previous: dict[str, Any] | None = None, **shown: Any) -> bytes:
    value = {"id": "ch_1", "object": "charge", "receipt": None, **shown}
    return event_json(event_id, event_type, value, created=NOW, previous=previous)


async def test_previous_attributes_tell_which_of_one_second_is_the_latest(db: Connection) -> None:
    found = await in_every_order(
        db,
        [
            charge("evt_3", "charge.succeeded", fee=None),
            charge("evt_1", "charge.updated", fee=1, previous={"fee": None}),
            charge("evt_2", "charge.updated", fee=1, receipt="r", previous={"receipt": None}),
        ],
    )
    row = found["charge", "ch_1"]
    assert (row["data"]["receipt"], row["last_webhook_event_id"], row["order_evidence"]) == ("r", "evt_2", "decided")


async def test_where_nothing_tells_the_row_says_so_and_the_next_second_decides(db: Connection) -> None:
    tied = [charge("evt_1", "charge.succeeded", fee=1), charge("evt_2", "charge.captured", fee=2)]
    row = (await in_every_order(db, tied))["charge", "ch_1"]
    assert (row["last_webhook_event_id"], row["order_evidence"]) == ("evt_2", "undecided")
    later = event_json("evt_0", "charge.updated", {"id": "ch_1", "object": "charge"}, created=NOW + 1)
    row = (await in_every_order(db, [*tied, later]))["charge", "ch_1"]
    assert (row["last_webhook_event_id"], row["order_evidence"]) == ("evt_0", "decided")


async def test_what_has_no_id_is_one_of_its_account_and_its_ties_are_told_as_well(db: Connection) -> None:
    def balance(event_id: str, amount: int) -> bytes:
        return event_json(event_id, "balance.available", {"object": "balance", "available": amount}, created=NOW)

    row = (await in_every_order(db, [balance("evt_1", 5), balance("evt_2", 6), balance("evt_3", 5)]))["balance", ""]
    assert (row["last_webhook_event_id"], row["order_evidence"]) == ("evt_3", "undecided")
    row = (await in_every_order(db, [balance("evt_1", 5), balance("evt_2", 5)]))["balance", ""]
    assert (row["last_webhook_event_id"], row["order_evidence"]) == ("evt_2", "decided")


async def test_a_tie_with_an_event_whose_body_is_gone_is_undecided(
    db: Connection, database_url: str, settings: MakeSettings
) -> None:
    worker = await worker_on(database_url, settings(KAMIYO_MIRROR="all"))
    await put(db, charge("evt_2", "charge.succeeded", fee=1))
    await work_off(worker, db)
    assert await inbox.prune(db, datetime.now(UTC)) == 1
    for event_id in ("evt_1", "evt_3", "evt_4"):
        await put(db, charge(event_id, "charge.updated", fee=2))
        await work_off(worker, db)
        row = (await objects(db))["charge", "ch_1"]
        assert (row["last_webhook_event_id"], row["data"]["fee"], row["order_evidence"]) == ("evt_2", 1, "undecided")
    # Nor does a rebuild lose what only the row remembers.
    await rebuild.rebuild(db, mirrored=EVERY)
    assert (await objects(db))["charge", "ch_1"]["data"]["fee"] == 1


async def test_a_rebuild_makes_what_is_named_now_and_throws_away_nothing_else(
    db: Connection, database_url: str, settings: MakeSettings
) -> None:
    worker = await worker_on(database_url, settings(KAMIYO_MIRROR="charge, coupon, tax_id"))
    gone = {"id": "txi_1", "object": "tax_id", "deleted": True}
    await put(
        *(db, charge("evt_1", "charge.succeeded"), charge("evt_2", "charge.updated", fee=2)),
        event_json("evt_3", "refund.created", {"id": "re_1", "object": "refund"}),
        event_json("evt_4", "coupon.created", {"id": "SUMMER", "object": "coupon"}),
        event_json("evt_5", "customer.tax_id.deleted", gone),
    )
    await work_off(worker, db)
    before = await objects(db)
    assert set(before) == {("charge", "ch_1"), ("coupon", "SUMMER"), ("tax_id", "txi_1")}

    await db.execute("UPDATE stripe_objects SET data = '{}' WHERE object <> 'tax_id'")
    await rebuild.rebuild(db, mirrored=frozenset({"charge.updated", "refund"}))
    after = await objects(db)
    assert {name for name, _ in set(after) - set(before)} == {"refund"}
    assert after["charge", "ch_1"]["data"]["fee"] == 2
    assert after["coupon", "SUMMER"]["data"] == {}
    assert after["tax_id", "txi_1"] == before["tax_id", "txi_1"]


async def test_two_workers_that_write_one_object_at_once_do_not_overlook_the_tie(
    db: Connection, database_url: str
) -> None:
    bodies = [charge("evt_1", "charge.succeeded", fee=1), charge("evt_2", "charge.updated", fee=2, previous={"fee": 1})]
    events = [read(body) for body in bodies]
    await inbox.put(db, events)
    one, other = [await database.connect(database_url, application="test") for _ in range(2)]
    first = one.transaction()
    await first.start()
    await mirror.project(one, states(events[1:]), EVERY)
    second = asyncio.create_task(mirror.project(other, states(events[:1]), EVERY))
    await until(lambda: waiting_for_locks(db))
    await first.commit()
    await second
    row = (await objects(db))["charge", "ch_1"]
    assert (row["data"]["fee"], row["last_webhook_event_id"], row["order_evidence"]) == (2, "evt_2", "decided")
    await one.close()
    await other.close()


async def test_one_object_in_two_accounts_and_modes_is_four_rows(db: Connection) -> None:
    events = [
        read(event_json(None, "charge.succeeded", created=NOW, account=account, livemode=mode))
        for account in ("", "acct_1")
        for mode in (False, True)
    ]
    await mirror.project(db, states(events), EVERY)
    found = await db.fetch("SELECT account, livemode FROM stripe_objects WHERE id = 'ch_1'")
    assert len(found) == 4


async def test_the_database_refuses_nonsense(db: Connection) -> None:
    await mirror.project(db, states([read(charge("evt_1", "charge.succeeded"))]), EVERY)
    with pytest.raises(asyncpg.CheckViolationError):
        await db.execute("UPDATE stripe_objects SET order_evidence = 'perhaps'")
    with pytest.raises(asyncpg.PostgresError):
        await db.execute("UPDATE stripe_objects SET deleted = true")


def test_a_deletion_tells_nothing_of_other_objects() -> None:
    stub = {"id": "cus_1", "object": "customer", "deleted": True}
    assert states([read(event_json("evt_1", "customer.updated", stub))]) == []
    assert not mirror.wants(read(event_json("evt_1", "invoice.upcoming", example("invoice"))), EVERY)
    assert not mirror.wants(read(event_json("evt_1", "invoice.paid", example("invoice"))), frozenset())
    assert Outcome.projected.value == "projected"
