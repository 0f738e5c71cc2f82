"""Whatever arrives when, in whatever company, how often and in whatever version: the billing tables end alike.

And they end true, equal to what the simulated Stripe last said of each object, where they say they are decided.
"""

import asyncio
import contextlib
import json
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import permutations, zip_longest
from typing import Any

import pytest
from hypothesis import Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kamiyo import database, inbox, projections, rebuild, shapes, ties
from kamiyo.database import Connection
from kamiyo.event import Event
from kamiyo.handlers import Registry
from kamiyo.inbox import Outcome
from kamiyo.projections import Read, Row
from kamiyo.receive import ready_to_project
from kamiyo.shapes import TABLES
from kamiyo.simulator import API_VERSIONS, SimulatedEvent, World, deliveries, lifecycle, thin
from kamiyo.simulator.terms import DAY
from tests.conftest import MakeSettings, event_json, examples, fresh_id, until
from tests.turns import NOW, Tables, billing, example, read, work_off, worker_on

Batch = list[Event]


@dataclass
class Lives:
    """Some customers' lives side by side, each in true order, and the dice for everything else."""

    world: World
    told: list[list[SimulatedEvent]]
    rng: random.Random

    @property
    def events(self) -> list[SimulatedEvent]:
        return [event for life in self.told for event in life]

    def in_order(self) -> list[Batch]:
        """Batch by batch the next event of each life: every object sees its events one by one."""
        return [[self.worded(event) for event in turn if event] for turn in zip_longest(*self.told)]

    def in_disorder(self) -> list[Batch]:
        """Any order, any duplicates, any versions, any batches."""
        sent = [self.worded(event) for event in deliveries(self.events, self.rng)]
        batches = []
        while sent:
            size = self.rng.choice((1, 1, 2, 3, 5, 8, 20, 100))
            batches.append(sent[:size])
            sent = sent[size:]
        return batches

    def worded(self, event: SimulatedEvent) -> Event:
        return read(event.body(self.rng.choice(API_VERSIONS)))

    def truth(self) -> Tables:
        return {(table, id_): row for table, rows in self.world.truth().items() for id_, row in rows.items()}


@st.composite
def lives(draw: st.DrawFn, *, flips: bool) -> Lives:
    """Up to twelve lives. With `flips` a second can hold a change and its undoing."""
    seed, count, steps = draw(st.integers(0, 2**32)), draw(st.integers(1, 12)), draw(st.integers(1, 25))
    world, rng = World(seed, start=NOW, payments=False), random.Random(seed)
    return Lives(world, [lifecycle(world, rng, steps=steps, flips=flips) for _ in range(count)], rng)


@dataclass
class Projected:
    """What a run came to: the tables, and the events that were superseded when they were applied."""

    tables: Tables = field(default_factory=dict)
    superseded: set[str] = field(default_factory=set)


async def projected(db: Connection, batches: Sequence[Batch]) -> Projected:
    """Store and project batch after batch in one transaction, which is undone again."""
    result = Projected()
    transaction = db.transaction()
    await transaction.start()
    try:
        for batch in batches:
            await inbox.put(db, list({event.id: event for event in batch}.values()))
            rows = [(event, await _row(db, event)) for event in batch]
            result.superseded |= await ties.project(db, [(event, row) for event, row in rows if row])
        result.tables = await billing(db)
    finally:
        await transaction.rollback()
    return result


async def _row(db: Connection, event: Event) -> Row | None:
    received = await db.fetchval("SELECT created_at FROM webhook_events WHERE event_id = $1", event.id)
    return projections.row_of(event, received)


def but_for_the_clock(tables: Tables) -> Tables:
    """Every column but the one that says when we were told."""
    return {
        place: {name: value for name, value in row.items() if name != "last_webhook_updated_at"}
        for place, row in tables.items()
    }


def untrue(tables: Tables, truth: Tables) -> list[Any]:
    """Where decided rows say something else than Stripe did last."""
    assert set(tables) == set(truth)
    return [
        (place, name, tables[place][name], value)
        for place, row in truth.items()
        for name, value in row.items()
        if tables[place][name] != value and tables[place]["order_evidence"] == "decided"
    ]


def undecided(tables: Tables) -> list[tuple[str, str]]:
    return [place for place, row in tables.items() if row["order_evidence"] == "undecided"]


# ── The law ─────────────────────────────────────────────────────────────────────────────────────────────────


@examples(14)
@given(lives=lives(flips=False))
async def test_any_order_any_duplicates_any_versions_and_any_batches_end_in_the_truth(
    lives: Lives, db: Connection
) -> None:
    straight = await projected(db, lives.in_order())
    assert untrue(straight.tables, lives.truth()) == []
    assert undecided(straight.tables) == []
    assert straight.superseded == set(), "in order, nothing is late"
    for _ in range(2):
        shuffled = await projected(db, lives.in_disorder())
        assert but_for_the_clock(shuffled.tables) == but_for_the_clock(straight.tables)


@examples(14)
@given(lives=lives(flips=True))
async def test_a_change_and_its_undoing_in_one_second_end_alike_and_nobody_guesses(
    lives: Lives, db: Connection
) -> None:
    straight = await projected(db, lives.in_order())
    assert untrue(straight.tables, lives.truth()) == []
    by_object = defaultdict(list)
    for event in lives.events:
        by_object[event.object_id].append(event)
    for _, object_id in undecided(straight.tables):
        assert _goes_round(by_object[object_id]), "it could have been decided"
    for _ in range(2):
        shuffled = await projected(db, lives.in_disorder())
        assert but_for_the_clock(shuffled.tables) == but_for_the_clock(straight.tables)


def _goes_round(told: Sequence[SimulatedEvent]) -> bool:
    """Whether some second of an object, told in true order, comes back to a state that it had left."""
    seconds: dict[int, list[Any]] = defaultdict(list)
    for event in told:
        row = projections.row_of(read(event.body()), inbox._DAWN)
        before = projections.row_before(read(event.body()), inbox._DAWN)
        if row is not None:
            path = seconds[event.created]
            path += [one.values for one in (before, row) if one and (not path or path[-1] != one.values)]
    return any(len(set(path)) < len(path) for path in seconds.values())


@examples(6)
@given(lives=lives(flips=False))
async def test_told_backwards_every_event_but_the_last_state_is_superseded(lives: Lives, db: Connection) -> None:
    backwards = Lives(lives.world, [list(reversed(life)) for life in lives.told], lives.rng)
    result = await projected(db, backwards.in_order())
    for event in lives.events:
        row = projections.row_of(read(event.body()), inbox._DAWN)
        if row is None or row.is_stub:
            continue
        stands = result.tables[row.table, row.id]
        told = {**stands, **_as_plain(row)}
        if told != stands:
            assert event.id in result.superseded
        elif row.rank == stands["last_event_rank"]:
            assert event.id not in result.superseded


def _as_plain(row: Row) -> dict[str, Any]:
    pairs = zip(shapes.COLUMNS[row.table], row.values, strict=True)
    return {name: json.loads(value) if name in ("metadata", "items") else value for name, value in pairs}


# ── What the rank alone has to tell ─────────────────────────────────────────────────────────────────────────


@st.composite
def crowds(draw: st.DrawFn) -> Lives:
    """So many lives that nearly every kind of end and of step forward is among them."""
    seed = draw(st.integers(0, 2**32))
    world, rng = World(seed, start=NOW, payments=False), random.Random(seed)
    return Lives(world, [lifecycle(world, rng, steps=rng.randint(1, 25)) for _ in range(30)], rng)


def as_it_is(count: int) -> hypothesis_settings:
    """So many examples, none made smaller: a crowd is one number, and its lives say nothing of its neighbours'."""
    return hypothesis_settings(examples(count), phases=(Phase.reuse, Phase.generate))


#: The columns that say that a life is over, and the states in which it is: Stripe's documentation of each object.
_OVER = ("deleted_at", "detached_at")
_FINAL = ("paid", "void", "canceled", "incomplete_expired")


def is_over(fact: object) -> bool:
    return getattr(fact, "status", None) in _FINAL or any(getattr(fact, name, None) is not None for name in _OVER)


@as_it_is(3)
@given(lives=crowds())
async def test_a_final_state_is_never_left_though_a_clock_says_that_what_was_before_came_later(
    lives: Lives, db: Connection
) -> None:
    ended = {event.object_id for event in lives.events if is_over(event.after)}

    def late(event: SimulatedEvent) -> SimulatedEvent:
        # Of what ended, all that was told before, by a clock a year ahead. No second has both, so no tie decides.
        if event.object_id in ended and not is_over(event.after):
            return replace(event, created=event.created + 366 * DAY)
        # A subscription's end is told by its type and by its state: some deletions are lost, and a change follows.
        lost = event.type == "customer.subscription.deleted" and lives.rng.random() < 0.5
        return replace(event, type="customer.subscription.updated") if lost else event

    sent = [lives.worded(late(event)) for event in lives.events]
    lives.rng.shuffle(sent)
    result = await projected(db, [sent[:200], sent[200:201], sent[201:]])
    assert untrue(result.tables, lives.truth()) == []
    assert undecided(result.tables) == []


@as_it_is(12)
@given(lives=crowds())
def test_in_one_second_where_nothing_says_what_was_before_no_state_stands_that_is_surely_past(lives: Lives) -> None:
    told: dict[tuple[str, str], list[ties.Observation]] = defaultdict(list)
    for happened in lives.events:
        event = lives.worded(replace(happened, created=NOW, before=None))
        row = projections.row_of(event, inbox._DAWN)
        if row is not None:
            told[row.table, row.id].append(ties.Observation(event, row, None))
    for place, true in lives.truth().items():
        seen = told[place]
        stands = ties.decide(lives.rng.sample(seen, len(seen)))
        assert progress(place[0], _as_plain(stands)) == progress(place[0], true), place
        if len({one.row.values for one in seen}) > 1:
            firsts = {one.row.event_id for one in seen if one.event.type.endswith((".created", ".attached"))}
            assert stands.event_id not in firsts, place


def progress(table: str, row: dict[str, Any]) -> tuple[Any, ...]:
    """What of a row only goes forward, so that the furthest of one second is the last."""
    over = [row[name] is not None for name in _OVER if name in row]
    if table == "invoices":
        # Of tries to pay it, there are only ever more.
        return *over, row["status"], row["attempt_count"]
    if table == "subscriptions":
        # It is incomplete only at first, and nothing follows an end. What is between comes and goes.
        return (row["status"] if row["status"] in ("incomplete", *_FINAL) else "going on",)
    return tuple(over)


# ── Snapshots, thin events, and what Stripe's API says ──────────────────────────────────────────────────────


@dataclass
class Api:
    """Stripe's API beside some lives: what a read shows that began in some second, or a little later."""

    lives: Lives
    at: dict[str, list[tuple[int, SimulatedEvent]]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        for event in self.lives.events:
            if event.object_id is not None and projections.table_of_type(event.object):
                self.at[event.object_id].append((event.created, event))

    def read(self, event: SimulatedEvent, source: str) -> Read:
        """The object of an event, asked for once its second was over: soon, or much later."""
        told, rng = self.at[event.object_id or ""], self.lives.rng
        second = rng.choice([event.created + 1, rng.choice(told)[0] + 1, told[-1][0] + 1, told[-1][0] + 9])
        second = max(second, event.created + 1)
        # All of the seconds before, in true order; and whatever part of its own second.
        seen = [one for created, one in told if created < second]
        seen += [one for created, one in told if created == second][: rng.randint(0, 3)]
        ended = event.created if event.type in projections._LAST_TYPES else None
        ids = (event.object, event.object_id or "", event.account, event.livemode)
        return Read(*ids, self._shown(seen[-1]), second, source, ended)

    def _shown(self, last: SimulatedEvent) -> bytes:
        if last.type == "invoice.deleted":
            return b""  # 404
        if last.type == "customer.deleted":
            return json.dumps({"id": last.object_id, "object": "customer", "deleted": True}).encode()
        return json.dumps(last.render()["data"]["object"]).encode()

    def may_be_thin_alone(self, event: SimulatedEvent) -> bool:
        # Of what is deleted Stripe only says that: what it was, nobody would know who was not told before.
        last = self.at[event.object_id or ""][-1][1]
        return last.type not in ("customer.deleted", "invoice.deleted")


@examples(6)
@given(lives=lives(flips=True))
async def test_thin_events_and_snapshots_in_any_mixture_and_order_end_in_the_truth_and_so_does_a_rebuild(
    lives: Lives, db: Connection
) -> None:
    straight = await projected(db, lives.in_order())
    api = Api(lives)
    transaction = db.transaction()
    await transaction.start()
    try:
        for event in deliveries(lives.events, lives.rng, duplicates=0.1):
            kinds = lives.rng.choice(["snapshot", "thin", "snapshot and thin", "thin and snapshot"])
            about = api.at.get(event.object_id or "")
            for kind in kinds.split(" and "):
                if about and kind == "thin" and (kinds != "thin" or api.may_be_thin_alone(event)):
                    named = read(json.dumps(thin(event)).encode())
                    await inbox.put(db, [named])
                    told = await projections.keep_reads(db, [api.read(event, named.id)])
                    rows = [row for row in map(projections.row_of_read, told) if row]
                    superseded = await ties.project_rows(db, rows)
                    assert superseded <= {row.event_id for row in rows}
                else:
                    snapshot = lives.worded(event)
                    await inbox.put(db, [snapshot])
                    row = await _row(db, snapshot)
                    await ties.project(db, [(snapshot, row)] if row else [])
        tables = await billing(db)
        assert untrue(tables, lives.truth()) == []
        assert set(undecided(tables)) <= set(undecided(straight.tables)), "a read never makes it worse"
        await db.execute("UPDATE billing.invoices SET status = 'wrong'")
        await rebuild.rebuild(db)
        assert await billing(db) == tables
    finally:
        await transaction.rollback()


@pytest.mark.parametrize("wholly", [True, False], ids=["whole seconds", "parts of seconds"])
@examples(6)
@given(lives=lives(flips=False))
async def test_what_retention_takes_meanwhile_makes_nothing_untrue_and_neither_does_a_rebuild_from_what_is_left(
    wholly: bool, lives: Lives, db: Connection
) -> None:
    mark = len(lives.world.events)
    for customer, fact in list(lives.world.customers.items()):
        if fact.deleted_at is None:
            lives.world.wait(DAY)
            lives.world.delete_customer(customer, stub=True)
    lives.told.append(lives.world.events[mark:])
    together: dict[tuple[str | None, int] | str, list[str]] = defaultdict(list)
    for event in lives.events:
        together[(event.object_id, event.created) if wholly else event.id].append(event.id)
    applied: set[str] = set()

    async def clean_up(share: float) -> None:
        # As a cleanup does while the others wait for another try, or are dead.
        for told in together.values():
            if applied.issuperset(told) and lives.rng.random() < share:
                await db.execute("DELETE FROM webhook_events WHERE event_id = ANY ($1)", told)

    transaction = db.transaction()
    await transaction.start()
    try:
        for event in deliveries(lives.events, lives.rng, duplicates=0):
            snapshot = lives.worded(event)
            await inbox.put(db, [snapshot])
            row = await _row(db, snapshot)
            await ties.project(db, [(snapshot, row)] if row else [])
            applied.add(event.id)
            if lives.rng.random() < 0.2:
                await clean_up(0.2)
        tables = await billing(db)
        assert untrue(tables, lives.truth()) == []
        for _ in range(2):
            await rebuild.rebuild(db)
            again = await billing(db)
            assert untrue(again, lives.truth()) == []
            assert again == tables or not wholly
            await clean_up(0.5)
    finally:
        await transaction.rollback()


# ── The same through every door ─────────────────────────────────────────────────────────────────────────────


@examples(6)
@given(lives=lives(flips=True), size=st.integers(1, 30))
async def test_workers_and_arrivals_come_to_what_the_projection_comes_to(
    lives: Lives, size: int, db: Connection, database_url: str, settings: MakeSettings
) -> None:
    expected = but_for_the_clock((await projected(db, lives.in_order())).tables)
    worker = await worker_on(database_url, settings(KAMIYO_WORKER_BATCH=size))
    for on_arrival in (0.0, 0.5, 1.0):
        for batch in lives.in_disorder():
            new = list({event.id: event for event in batch}.values())
            if lives.rng.random() < on_arrival:
                arrivals, rows = ready_to_project(new, Registry())
                await inbox.put_projected(db, arrivals, rows, microseconds=1)
            else:
                await inbox.put(db, new)
            if lives.rng.random() < 0.3:
                await worker.run_once(db)
        await work_off(worker, db)

        tables = await billing(db)
        assert but_for_the_clock(tables) == expected
        assert await db.fetchval("SELECT count(*) FROM webhook_events WHERE status <> 'processed'") == 0
        told_at = {
            event_id: int(at.timestamp())
            for event_id, at in await db.fetch("SELECT event_id, created_at FROM webhook_events")
        }
        for row in tables.values():
            # Later only where a copy came while the first still waited, and was projected on arrival.
            assert row["last_webhook_updated_at"] >= told_at[row["last_webhook_event_id"]]

        # The tables can be thrown away: what they say is a function of the stored events.
        await db.execute("UPDATE billing.invoices SET status = 'wrong'")
        await rebuild.rebuild(db)
        assert but_for_the_clock(await billing(db)) == but_for_the_clock(tables)
        for table in ("webhook_events", "webhook_payloads", *(f"billing.{name}" for name in TABLES)):
            await db.execute(f"DELETE FROM {table}")  # noqa: S608 - our own names


# ── Told one by one ─────────────────────────────────────────────────────────────────────────────────────────


def _ring() -> tuple[str, list[bytes]]:
    """Created, changed and changed back within one second: only all three together tell which was last."""
    ada = example("customer", id=fresh_id("cus"), name="Ada")
    bo = {**ada, "name": "Bo"}
    return ada["id"], [
        event_json(fresh_id("evt_m"), "customer.created", ada, created=NOW),
        event_json(fresh_id("evt_a"), "customer.updated", bo, previous={"name": "Ada"}, created=NOW),
        event_json(fresh_id("evt_z"), "customer.updated", ada, previous={"name": "Bo"}, created=NOW),
    ]


@pytest.mark.parametrize("door", ["workers", "arrivals"])
async def test_evidence_that_comes_late_counts_as_if_it_had_come_first(
    door: str, db: Connection, database_url: str, settings: MakeSettings
) -> None:
    worker = await worker_on(database_url, settings())
    for order in permutations(range(3)):
        object_id, bodies = _ring()
        for at in order:
            event = read(bodies[at])
            if door == "arrivals":
                arrivals, rows = ready_to_project([event], Registry())
                assert arrivals[0].outcome is Outcome.projected
                await inbox.put_projected(db, arrivals, rows, microseconds=1)
            else:
                await inbox.put(db, [event])
            await work_off(worker, db)
        [row] = (await billing(db, [object_id])).values()
        assert (row["name"], row["order_evidence"]) == ("Ada", "decided"), order


async def test_an_undecided_row_is_decided_by_the_next_second(
    db: Connection, database_url: str, settings: MakeSettings
) -> None:
    worker = await worker_on(database_url, settings())
    object_id, [_, there, back] = _ring()
    await inbox.put(db, [read(there), read(back)])
    await work_off(worker, db)
    assert undecided(await billing(db)) == [("customers", object_id)]

    cy = example("customer", id=object_id, name="Cy")
    await inbox.put(db, [read(event_json(None, "customer.updated", cy, previous={"name": "Ada"}, created=NOW + 1))])
    await work_off(worker, db)
    row = (await billing(db))["customers", object_id]
    assert (row["name"], row["order_evidence"]) == ("Cy", "decided")


async def test_events_of_one_second_are_weighed_even_when_another_of_them_waits_or_has_failed(
    db: Connection, database_url: str, settings: MakeSettings
) -> None:
    own = Registry()

    @own.on("customer.updated")
    async def fails(event: Event, db: Connection) -> None:
        raise ValueError("not today")

    worker = await worker_on(database_url, settings(), own)
    object_id, bodies = _ring()
    await inbox.put(db, [read(body) for body in bodies])
    await work_off(worker, db)
    row = (await billing(db))["customers", object_id]
    assert (row["name"], row["order_evidence"]) == ("Ada", "decided")


async def test_a_rebuild_keeps_what_only_the_row_still_remembers_of_a_deleted_customer(
    db: Connection, database_url: str, settings: MakeSettings
) -> None:
    worker = await worker_on(database_url, settings())
    ada = example("customer", id="cus_1", name="Ada")
    gone = example("deleted_customer", id="cus_1")
    for turn, (kind, shown) in enumerate((("customer.created", ada), ("customer.deleted", gone))):
        await inbox.put(db, [read(event_json(None, kind, shown, created=NOW + turn))])
        await work_off(worker, db)
        if kind == "customer.created":
            assert await inbox.prune(db, datetime.now(UTC)) == 1
    before = await billing(db)
    assert before["customers", "cus_1"]["name"] == "Ada"

    assert await rebuild.rebuild(db) == 1
    assert await billing(db) == before


async def test_a_rebuild_keeps_what_a_deleted_customer_was_though_an_older_event_outlived_the_newer_one(
    db: Connection, database_url: str, settings: MakeSettings
) -> None:
    worker = await worker_on(database_url, settings())
    story = (
        ("customer.created", example("customer", id="cus_1", currency=None)),
        ("customer.updated", example("customer", id="cus_1", currency="usd")),
        ("customer.deleted", example("deleted_customer", id="cus_1")),
    )
    for turn, (kind, shown) in enumerate(story):
        await inbox.put(db, [read(event_json(None, kind, shown, created=NOW + turn))])
        await work_off(worker, db)
    # As a cleanup does while the first one waits for another try.
    await db.execute("DELETE FROM webhook_events WHERE event_type = 'customer.updated'")
    before = await billing(db)
    await rebuild.rebuild(db)
    assert await billing(db) == before


@pytest.mark.parametrize("turn", [-1, 0], ids=["a second before", "the same second"])
async def test_an_event_that_comes_after_the_one_it_preceded_was_cleaned_up_takes_nothing_back_from_what_is_deleted(
    turn: int, db: Connection, database_url: str, settings: MakeSettings
) -> None:
    worker = await worker_on(database_url, settings())
    ada, bo = (example("customer", id="cus_1", name=name) for name in ("Ada", "Bo"))
    first = read(event_json("evt_z", "customer.updated", ada, previous={"name": "?"}, created=NOW + turn))
    second = read(event_json("evt_a", "customer.updated", bo, previous={"name": "Ada"}, created=NOW))
    gone = read(event_json(None, "customer.deleted", example("deleted_customer", id="cus_1"), created=NOW + 1))
    await inbox.put(db, [first, second])
    await work_off(worker, db)
    await inbox.put(db, [gone])
    await work_off(worker, db)
    deleted = (await billing(db))["customers", "cus_1"]
    assert (deleted["name"], deleted["deleted_at"], deleted["last_shown_event_id"]) == ("Bo", NOW + 1, "evt_a")

    await db.execute("DELETE FROM webhook_events WHERE event_id = ANY ($1)", [first.id, second.id])
    await inbox.put(db, [first])
    await work_off(worker, db)
    # Of one second nobody can tell any more which was later.
    evidence = "decided" if turn else "undecided"
    assert (await billing(db))["customers", "cus_1"] == {**deleted, "order_evidence": evidence}


async def test_what_was_before_a_deletion_is_told_by_a_later_event_though_the_deletion_itself_was_cleaned_up(
    db: Connection, database_url: str, settings: MakeSettings
) -> None:
    worker = await worker_on(database_url, settings())
    gone = read(event_json(None, "customer.deleted", example("deleted_customer", id="cus_1"), created=NOW + 9))
    await inbox.put(db, [gone])
    await work_off(worker, db)
    await db.execute("DELETE FROM webhook_events WHERE event_id = $1", gone.id)
    for name, turn in (("Bo", 2), ("Ada", 1)):
        ada = example("customer", id="cus_1", name=name)
        await inbox.put(db, [read(event_json(None, "customer.updated", ada, created=NOW + turn))])
        await work_off(worker, db)
        row = (await billing(db))["customers", "cus_1"]
        assert (row["name"], row["deleted_at"], row["last_webhook_event_id"]) == ("Bo", NOW + 9, gone.id)


@pytest.mark.parametrize("kind", ["customer", "customer.subscription", "invoice", "payment_method"])
async def test_what_stands_goes_on_to_stand_in_doubt_where_its_event_was_cleaned_up_before_others_of_its_second_ran(
    kind: str, db: Connection, database_url: str, settings: MakeSettings
) -> None:
    object_type = kind.rpartition(".")[2]
    shown = example(object_type, customer="cus_1")
    worker = await worker_on(database_url, settings())
    last = {**shown, "metadata": {"note": "1"}}
    await inbox.put(
        db, [read(event_json("evt_last", f"{kind}.updated", last, previous={"metadata": {"note": None}}, created=NOW))]
    )
    await work_off(worker, db)
    [stood] = (await billing(db)).values()
    await db.execute("DELETE FROM webhook_events")
    # The same again tells nothing else.
    await inbox.put(db, [read(event_json("evt_same", f"{kind}.updated", last, created=NOW))])
    await work_off(worker, db)
    assert list((await billing(db)).values()) == [stood]
    for name in ("evt_1", "evt_2", "evt_3"):
        await inbox.put(db, [read(event_json(name, f"{kind}.updated", {**shown, "metadata": {}}, created=NOW))])
        await work_off(worker, db)
        assert list((await billing(db)).values()) == [{**stood, "order_evidence": "undecided"}]
    await rebuild.rebuild(db)
    assert list((await billing(db)).values()) == [{**stood, "order_evidence": "undecided"}]


async def test_what_is_left_of_a_contested_second_decides_nothing_when_another_of_its_events_comes(
    db: Connection, database_url: str, settings: MakeSettings
) -> None:
    worker = await worker_on(database_url, settings())

    async def tell(event_id: str, before: str, now: str) -> dict[str, Any]:
        shown = example("customer", id="cus_1", name=now)
        await inbox.put(
            db, [read(event_json(event_id, "customer.updated", shown, previous={"name": before}, created=NOW))]
        )
        await work_off(worker, db)
        return (await billing(db))["customers", "cus_1"]

    # Ada became Bo, then Cy, then Dee; what lies between is told last, when the end is gone.
    await tell("evt_end", "Cy", "Dee")
    contested = await tell("evt_first", "Ada", "Bo")
    assert contested["order_evidence"] == "undecided"
    assert contested["contested_by"] == ["evt_end", "evt_first"]
    await db.execute("DELETE FROM webhook_events WHERE event_id = 'evt_end'")
    assert await tell("evt_between", "Bo", "Cy") == contested


async def test_a_rebuild_is_not_surer_than_the_row_was_where_the_event_that_contests_it_was_cleaned_up(
    db: Connection, database_url: str, settings: MakeSettings
) -> None:
    object_id, [_, there, back] = _ring()
    await inbox.put(db, [read(there), read(back)])
    await work_off(await worker_on(database_url, settings()), db)
    before = await billing(db)
    assert undecided(before) == [("customers", object_id)]
    stands = before["customers", object_id]["last_webhook_event_id"]
    await db.execute("DELETE FROM webhook_events WHERE event_id <> $1", stands)
    assert await rebuild.rebuild(db) == 1
    assert await billing(db) == before


async def test_what_comes_in_while_a_deletion_is_merged_still_tells_what_the_object_was(
    db: Connection, database_url: str, settings: MakeSettings
) -> None:
    invoice = example("invoice", id="in_1", status="draft", customer="cus_1")
    gone = Read("invoice", "in_1", "", False, b"", NOW + 10, "evt_thin", ended=NOW + 5)
    await projections.keep_reads(db, [gone])
    row = projections.row_of_read(gone)
    assert row is not None and row.is_stub

    async def merge() -> None:
        async with db.transaction():
            await ties.project_rows(db, [row])

    other = await database.connect(database_url, application="test door")
    async with other.transaction():
        # It may look at whatever it likes, and write when the other one has.
        await other.execute("LOCK TABLE billing.invoices IN SHARE ROW EXCLUSIVE MODE")
        merging = asyncio.create_task(merge())
        waiting = "SELECT count(*) FROM pg_locks WHERE relation = 'billing.invoices'::regclass AND NOT granted"
        await until(lambda: other.fetchval(waiting))
        late = read(event_json("evt_late", "invoice.created", invoice, created=NOW))
        await inbox.put_projected(other, *ready_to_project([late], Registry()), microseconds=1)
    await other.close()
    await merging
    await work_off(await worker_on(database_url, settings()), db)
    merged = (await billing(db))["invoices", "in_1"]
    assert (merged["customer"], merged["total"], merged["deleted_at"]) == ("cus_1", invoice["total"], NOW + 5)


async def test_a_cleanup_in_the_middle_of_a_rebuild_takes_no_row_with_it(
    db: Connection, database_url: str, settings: MakeSettings
) -> None:
    mirrored = frozenset({"all"})
    worker = await worker_on(database_url, settings(KAMIYO_MIRROR="all"))
    await inbox.put(db, [read(event_json(None, "customer.created", example("customer", id="cus_1"), created=NOW))])
    await work_off(worker, db)
    before = await billing(db), await db.fetch("SELECT * FROM stripe_objects")
    assert [len(rows) for rows in before] == [1, 1]
    other = await database.connect(database_url, application="test cleanup")
    async with other.transaction():
        # It has forgotten the first rows when it comes to the reads, and makes none again before it gets them.
        await other.execute("LOCK TABLE webhook_reads")
        rebuilding = asyncio.create_task(rebuild.rebuild(db, mirrored=mirrored))
        waiting = "SELECT count(*) FROM pg_locks WHERE relation = 'webhook_reads'::regclass AND NOT granted"
        await until(lambda: other.fetchval(waiting))
        assert await inbox.prune(other, datetime.now(UTC)) == 1
    await other.close()
    assert await rebuilding == 1
    assert (await billing(db), await db.fetch("SELECT * FROM stripe_objects")) == before


async def tables_wanted(db: Connection, table: str) -> int:
    """How many sessions wait for a lock on this table."""
    return int(
        await db.fetchval("SELECT count(*) FROM pg_locks WHERE relation = $1::text::regclass AND NOT granted", table)
    )


@contextlib.asynccontextmanager
async def connections(url: str, *names: str) -> AsyncIterator[list[Connection]]:
    opened = [await database.connect(url, application=f"test {name}") for name in names]
    try:
        yield [*opened]
    finally:
        for connection in opened:
            await connection.close()


async def test_a_rebuild_and_a_worker_that_merges_a_deletion_never_wait_for_each_other(
    db: Connection, database_url: str, settings: MakeSettings
) -> None:
    worker = await worker_on(database_url, settings())
    renewed = example("subscription", id="sub_1", customer="cus_2")
    gone = example("deleted_customer", id="cus_1")
    told = (("customer.subscription.updated", renewed), ("customer.deleted", gone))
    await inbox.put(db, [read(event_json(None, kind, shown, created=NOW)) for kind, shown in told])
    # Should there be a ring, it is the rebuild that is ended; in a transaction of the caller's it does not begin anew.
    await db.execute("SET deadlock_timeout = '10ms'")

    async def rebuilt() -> int:
        async with db.transaction():
            return await rebuild.rebuild(db)

    async with connections(database_url, "worker", "gate") as (hand, gate):
        async with gate.transaction():
            await gate.execute("LOCK TABLE billing.customers IN SHARE ROW EXCLUSIVE MODE")
            rebuilding = asyncio.create_task(rebuilt())
            await until(lambda: tables_wanted(gate, "billing.customers"))
            working = asyncio.create_task(worker.run_once(hand))

            async def both() -> bool:
                return await tables_wanted(gate, "billing.customers") == 2

            await until(both)
        assert (await rebuilding, await working) == (2, 2)
    assert {name for _, name in await billing(db)} == {"sub_1", "cus_1"}


async def test_a_rebuild_that_is_ended_because_it_and_a_handler_waited_for_each_other_begins_anew(
    db: Connection, database_url: str, settings: MakeSettings
) -> None:
    await inbox.put(db, [read(event_json(None, "customer.created", example("customer", id="cus_1"), created=NOW))])
    await work_off(await worker_on(database_url, settings()), db)
    before = await billing(db)
    await db.execute("SET deadlock_timeout = '10ms'")
    async with connections(database_url, "handler", "gate") as (handler, gate), handler.transaction():
        await handler.execute("SET deadlock_timeout = '1min'")
        await handler.execute("SELECT FROM billing.subscriptions FOR UPDATE")
        async with gate.transaction():
            await gate.execute("LOCK TABLE billing.customers IN SHARE ROW EXCLUSIVE MODE")
            rebuilding = asyncio.create_task(rebuild.rebuild(db))
            await until(lambda: tables_wanted(gate, "billing.customers"))
            asking = asyncio.create_task(handler.execute("SELECT FROM billing.customers FOR UPDATE"))

            async def both() -> bool:
                return await tables_wanted(gate, "billing.customers") == 2

            await until(both)
        await asking
    assert await rebuilding == 1
    assert await billing(db) == before
