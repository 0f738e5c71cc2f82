"""Stories of the audit: rows that are not as Stripe has them are told, and mended; those that only look so are not."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from kamiyo import audit as auditing
from kamiyo import inbox
from kamiyo.audit import AT_LEAST, PRIVATE, Audited, Verdict, audit, sizes
from kamiyo.cli.main import app as command_line
from kamiyo.database import Connection
from kamiyo.errors import KamiyoError
from kamiyo.event import lane_of
from kamiyo.shapes import COLUMNS
from kamiyo.simulator import STORIES, World, lifecycle
from kamiyo.worker import Worker
from tests.conftest import MakeSettings, event_json, until
from tests.stripe_server import KEY, StripeServer, stripe_server
from tests.test_backfill import asking, show_world
from tests.turns import NOW, billing, example, put, work_off, worker_on


@pytest.fixture
async def stripe() -> AsyncIterator[StripeServer]:
    async with stripe_server() as server:
        yield server


@pytest.fixture
async def worker(database_url: str, settings: MakeSettings) -> Worker:
    return await worker_on(database_url, settings())


class Ask:
    """An audit of all rows, whose second looks come when `meanwhile` is over."""

    def __init__(self, url: str, settings: MakeSettings, stripe: StripeServer) -> None:
        self._where = url, settings, stripe

    async def __call__(
        self, meanwhile: Callable[[], Awaitable[object]] = lambda: asyncio.sleep(0), **how: Any
    ) -> Audited:
        async with asking(*self._where) as (pool, api):
            return await audit(pool, api, **{"share": 1.0, "pause": meanwhile, **how})


@pytest.fixture
def ask(database_url: str, settings: MakeSettings, stripe: StripeServer) -> Ask:
    return Ask(database_url, settings, stripe)


def told(done: Audited) -> dict[str, set[str]]:
    """What is told: which columns of which object."""
    return {finding.id: {one.column for one in finding.differences} for finding in done.findings}


async def known(db: Connection, worker: Worker, stripe: StripeServer, *objects: dict[str, Any]) -> None:
    """Stripe has these objects, and has told us of them an hour ago."""
    stripe.show(*objects)
    kinds = {"payment_method": "payment_method.updated", "subscription": "customer.subscription.updated"}
    for one in objects:
        kind = kinds.get(one["object"], f"{one['object']}.updated")
        await put(db, event_json(None, kind, one, created=int(time.time()) - 3600))
    await work_off(worker, db)


# ── What is told ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_rows_that_are_true_are_not_told_whatever_lives_they_had(
    db: Connection, worker: Worker, stripe: StripeServer, ask: Ask
) -> None:
    world, rng = World(8, start=NOW - 90 * 86400), random.Random(8)
    STORIES["churn"](world)  # ends with a card detached and the customer deleted
    world.delete_draft(world.create_invoice(world.create_customer(), 500))
    for _ in range(8):
        lifecycle(world, rng, steps=10)
    await put(db, *(event.body() for event in world.events))
    await work_off(worker, db)
    show_world(stripe, world)
    for invoice in world.invoices.values():
        if invoice.deleted_at is not None:
            stripe.forget("invoice", invoice.id)  # a draft that was deleted is a 404

    done = await ask()
    assert (done.findings, done.unsettled) == ([], 0)
    assert done.checked == len(await billing(db)) == len(stripe.paths)
    ended = {
        table for (table, _), row in (await billing(db)).items() if row.get("deleted_at") or row.get("detached_at")
    }
    assert ended == {"customers", "invoices", "payment_methods"}


async def test_a_row_that_somebody_wrote_to_is_told_by_its_columns_and_mended(
    db: Connection, worker: Worker, stripe: StripeServer, ask: Ask
) -> None:
    await known(
        *(db, worker, stripe),
        example("customer", id="cus_1", email="ada@example.com", metadata={"plan": "gold"}),
        example("subscription", id="sub_1", customer="cus_1", status="active"),
        example("invoice", id="in_1", customer="cus_1", status="open"),
        example("payment_method", id="pm_1", customer="cus_1"),
    )
    before = await billing(db)
    await db.execute("UPDATE billing.customers SET email = 'x', metadata = '{}'")
    await db.execute("UPDATE billing.subscriptions SET status = 'past_due', current_period_end = now(), items = '[]'")
    await db.execute("UPDATE billing.invoices SET status = 'void', amount_due = 1")
    await db.execute("DELETE FROM billing.payment_methods")

    wrong = {
        "cus_1": {"email", "metadata"},
        "sub_1": {"status", "current_period_end", "items"},
        "in_1": {"status", "amount_due"},
    }
    done = await ask()
    assert (told(done), done.checked) == (wrong, 3), "a row that is not there is for the backfill"
    assert not any(finding.mended for finding in done.findings)
    [status] = [one for finding in done.findings for one in finding.differences if one.column == "status"][:1]
    assert (status.ours, status.stripes, status.private) == ("past_due", "active", False)

    done = await ask(repair=True)
    assert told(done) == wrong and all(finding.mended for finding in done.findings)
    after = await billing(db)
    for place, row in after.items():
        assert {name: value for name, value in row.items() if name in COLUMNS[place[0]]} == {
            name: value for name, value in before[place].items() if name in COLUMNS[place[0]]
        }
        assert row["last_webhook_event_id"] == "audit"
    assert [tuple(row) for row in await db.fetch("SELECT action, count FROM webhook_audit")] == [("audit repair", 3)]
    assert (await ask()).findings == []


async def test_a_customer_that_stripe_deleted_is_told_and_mended_and_a_404_is_only_told(
    db: Connection, worker: Worker, stripe: StripeServer, ask: Ask
) -> None:
    await known(
        *(db, worker, stripe),
        example("customer", id="cus_gone", name="Ada"),
        example("customer", id="cus_404"),
        example("invoice", id="in_404"),
        example("customer", id="cus_odd"),
    )
    stripe.show(
        {"id": "cus_gone", "object": "customer", "deleted": True}, example("customer", id="cus_odd", balance="much")
    )
    stripe.forget("customer", "cus_404")
    stripe.forget("invoice", "in_404")
    done = await ask(repair=True)
    assert {one.id: (one.verdict, one.mended) for one in done.findings} == {
        "cus_gone": (Verdict.differs, True),
        "cus_404": (Verdict.gone, False),
        "in_404": (Verdict.gone, False),
        "cus_odd": (Verdict.unreadable, False),
    }
    rows = await billing(db)
    assert rows["customers", "cus_gone"]["name"] == "Ada"
    assert [name for (_, name), row in rows.items() if row.get("deleted_at")] == ["cus_gone"]


async def test_what_a_repair_had_mended_when_it_was_ended_is_written_down(
    db: Connection, worker: Worker, stripe: StripeServer, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auditing, "_CHUNK", 1)
    await known(db, worker, stripe, *(example("customer", id=f"cus_{number}", name="Ada") for number in (1, 2)))
    await db.execute("UPDATE billing.customers SET name = 'x'")
    # The second one's lane is a worker's, for as long as it takes.
    await db.execute("SELECT pg_advisory_lock(1800432, $1)", lane_of("", "cus_2"))
    repairing = asyncio.create_task(ask(repair=True))
    await until(lambda: db.fetchval("SELECT true FROM billing.customers WHERE name = 'Ada'"))
    repairing.cancel()
    await asyncio.wait([repairing])
    assert [tuple(row) for row in await db.fetch("SELECT action, count FROM webhook_audit")] == [("audit repair", 1)]
    names = {name: row["name"] for (_, name), row in (await billing(db)).items()}
    assert names == {"cus_1": "Ada", "cus_2": "x"}


async def test_what_only_the_database_refuses_is_told_and_all_others_are_mended(
    db: Connection, worker: Worker, stripe: StripeServer, ask: Ask
) -> None:
    await known(db, worker, stripe, *(example("customer", id=f"cus_{number}", name="Ada") for number in range(5)))
    await db.execute("UPDATE billing.customers SET name = 'x'")
    await db.execute("ALTER TABLE billing.customers ADD CONSTRAINT of_the_owners CHECK (id <> 'cus_3' OR name = 'x')")
    try:
        done = await ask(repair=True)
    finally:
        await db.execute("ALTER TABLE billing.customers DROP CONSTRAINT of_the_owners")
    assert {one.id for one in done.findings if not one.mended} == {"cus_3"} and len(done.findings) == 5
    assert [str(one) for one in done.refused] == ["customers cus_3 by audit (23514, of_the_owners)"]
    assert {name: row["name"] for (_, name), row in (await billing(db)).items() if row["name"] != "Ada"} == {
        "cus_3": "x"
    }


async def test_a_row_that_is_deleted_while_others_are_mended_is_told_no_more_and_does_not_come_back(
    db: Connection, worker: Worker, stripe: StripeServer, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("cus_1", "cus_2", "cus_404")
    await known(db, worker, stripe, *(example("customer", id=name, name="Ada") for name in names))
    await db.execute("UPDATE billing.customers SET name = 'x' WHERE id <> 'cus_404'")
    stripe.forget("customer", "cus_404")
    begin = inbox.audit

    async def begin_after_an_erasure(*what: Any) -> int:
        await db.execute("DELETE FROM billing.customers WHERE id <> 'cus_1'")
        return await begin(*what)

    monkeypatch.setattr(inbox, "audit", begin_after_an_erasure)
    done = await ask(repair=True)
    assert [(one.id, one.mended) for one in done.findings] == [("cus_1", True)]
    assert {name for _, name in await billing(db)} == {"cus_1"}


# ── What only looks so ──────────────────────────────────────────────────────────────────────────────────────────


async def test_an_event_that_comes_between_two_looks_is_no_difference(
    db: Connection, worker: Worker, stripe: StripeServer, ask: Ask
) -> None:
    ada, bo = (example("customer", id=name, name="before") for name in ("cus_ada", "cus_bo"))
    await known(db, worker, stripe, ada, bo)
    # At Stripe both have changed, one of them twice. Its events are on their way; that of the other never comes.
    stripe.show({**ada, "name": "after"}, {**bo, "name": "after"})
    minute_ago = int(time.time()) - 60
    arriving = [
        event_json(None, "customer.updated", {**ada, "name": "between"}, created=minute_ago),
        event_json(None, "customer.updated", {**ada, "name": "after"}, created=minute_ago + 1),
    ]

    async def one_arrives() -> None:
        if arriving:
            await put(db, arriving.pop(0))
            await work_off(worker, db)

    done = await ask(one_arrives)
    assert (told(done), done.unsettled, arriving) == ({"cus_bo": {"name"}}, 0, [])


async def test_an_object_with_an_event_in_line_is_left_for_later(
    db: Connection, worker: Worker, stripe: StripeServer, ask: Ask
) -> None:
    ada = example("customer", id="cus_ada", name="before")
    await known(db, worker, stripe, ada)
    stripe.show({**ada, "name": "after"})
    await put(db, event_json(None, "customer.updated", {**ada, "name": "after"}, created=int(time.time()) - 60))
    done = await ask(repair=True)
    assert (done.findings, done.unsettled) == ([], 1)
    await work_off(worker, db)
    assert (await ask()).unsettled == 0


async def test_an_answer_that_is_older_than_the_row_proves_nothing_and_overwrites_nothing(
    db: Connection, worker: Worker, stripe: StripeServer, ask: Ask
) -> None:
    ada = example("customer", id="cus_ada", name="before")
    stripe.show(ada)
    # Told of a change in the very second in which Stripe is asked, or a later one.
    await put(db, event_json(None, "customer.updated", {**ada, "name": "after"}, created=int(time.time()) + 60))
    await work_off(worker, db)
    done = await ask(repair=True)
    assert (done.findings, done.unsettled) == ([], 1)
    assert (await billing(db))["customers", "cus_ada"]["name"] == "after"
    assert await db.fetchval("SELECT count(*) FROM webhook_reads") == 0


async def test_a_final_state_is_told_and_not_mended(
    db: Connection, worker: Worker, stripe: StripeServer, ask: Ask
) -> None:
    await known(db, worker, stripe, example("invoice", id="in_1", status="paid"))
    stripe.show(example("invoice", id="in_1", status="open"))
    done = await ask(repair=True)
    assert [(one.id, one.mended) for one in done.findings] == [("in_1", False)]
    assert (await billing(db))["invoices", "in_1"]["status"] == "paid"


# ── Which rows ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_share_is_drawn_anew_each_time_and_small_tables_are_looked_at_all_the_same(
    db: Connection, worker: Worker, stripe: StripeServer, ask: Ask
) -> None:
    customers = [example("customer", id=f"cus_{number:03}") for number in range(400)]
    await known(db, worker, stripe, *customers, example("invoice", id="in_1"))
    assert await sizes(db, "", False, 0.1) == {
        **{"customers": (40, 0.1), "subscriptions": (0, 1.0), "invoices": (1, 1.0), "payment_methods": (0, 1.0)}
    }
    drawn = []
    for _ in range(2):
        before = len(stripe.paths)
        await ask(share=0.1)
        drawn.append(set(stripe.paths[before:]) - {"/v1/invoices/in_1"})
        assert len(stripe.paths) - len(drawn[-1]) - before == 1
        assert AT_LEAST <= len(drawn[-1]) <= 80
    assert drawn[0] != drawn[1]


# ── As a command ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_command_tells_scripts_and_people_and_shows_no_customers_data(
    db: Connection, database_url: str, worker: Worker, stripe: StripeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (
        *(("DATABASE_URL", database_url), ("STRIPE_SECRET_KEY", KEY), ("STRIPE_API_BASE", stripe.base)),
        ("KAMIYO_STRIPE_API_RATE", "100"),
    ):
        monkeypatch.setenv(name, value)

    async def run(*words: str) -> Result:
        return await asyncio.to_thread(CliRunner().invoke, command_line, list(words))

    await known(
        *(db, worker, stripe),
        example("customer", id="cus_1", name="Ada", email="ada@example.com"),
        example("subscription", id="sub_1", customer="cus_1", status="active"),
    )
    assert (await run("audit", "--sample", "100%")).exit_code == 0
    await db.execute("UPDATE billing.customers SET email = 'bo@example.com'")
    await db.execute("UPDATE billing.subscriptions SET status = 'past_due'")

    people = await run("audit", "--sample", "100%", "--wait", "0")
    assert people.exit_code == 1
    for words in ("sub_1", "past_due", "active", "email", "(customer's data)", "2 rows compared: 2 are not"):
        assert words in people.stdout
    scripts = await run("audit", "--sample", "100%", "--wait", "0", "--json")
    assert scripts.exit_code == 1
    first, second, last = (json.loads(line) for line in scripts.stdout.splitlines())
    assert (first["id"], first["verdict"], first["differences"]) == ("cus_1", "differs", [{"column": "email"}])
    assert second["differences"] == [{"column": "status", "ours": "past_due", "stripe": "active"}]
    assert last == {"checked": 2, "differing": 2, "mended": 0, "unsettled": 0}
    assert "example.com" not in people.stdout + scripts.stdout + scripts.stderr

    refused = await run("audit", "--show-values")
    assert refused.exit_code == 2 and "only on a terminal" in refused.stderr
    for share in ("0%", "101%", "5", "much%"):
        assert (await run("audit", "--sample", share)).exit_code == 2

    mended = await run("audit", "--sample", "100%", "--wait", "0", "--repair")
    assert mended.exit_code == 0 and "2 mended" in mended.stdout
    filled = await run("backfill", "all", "--json")
    lines = [json.loads(line) for line in filled.stdout.splitlines()]
    assert {line["collection"]: line["objects"] for line in lines} == {
        **{"customers": 1, "subscriptions": 1, "invoices": 0, "payment_methods": 0}
    }
    monkeypatch.setenv("STRIPE_SECRET_KEY", "")
    for command in (["backfill", "all"], ["audit"]):
        without = await run(*command)
        assert isinstance(without.exception, KamiyoError) and "STRIPE_SECRET_KEY" in str(without.exception)


def test_every_column_that_is_private_exists_and_ids_and_states_are_not() -> None:
    columns = {column for columns in COLUMNS.values() for column in columns}
    assert columns >= PRIVATE
    assert not PRIVATE & {"status", "customer", "price", "currency", "created", "deleted_at"}
