"""Stripe does not give what is to be read: events wait for it or are dead with the reason, in nobody's way."""

import asyncio
import json
import os
import sys

import pytest

from kamiyo import alerts, inbox, reads
from kamiyo.database import Connection
from kamiyo.event import Event
from kamiyo.handlers import Registry
from tests.conftest import ROOT, SECRET, Log, MakeSettings, event_json, until
from tests.stripe_server import HANGS, KEY, StripeServer
from tests.thin.conftest import house, pair, thin_json, waiting
from tests.turns import billing, example, failures_of, no_lanes_held, put, row_of, statuses


async def test_while_stripe_is_away_events_wait_nothing_fails_and_people_can_see_it(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    ada = example("customer", id="cus_1", name="Ada")
    stripe.show(ada)
    stripe.faults = [500]
    await put(db, thin_json("v1.customer.updated", ada, "evt_65a"), event_json("evt_other"))
    async with house(database_url, settings, stripe) as here:
        await here.worker.run_once(db)
        assert (await inbox.queue(db))["waiting_reads"] == 1
        assert await here.reader.run_once() == 1
        assert (await inbox.queue(db))["circuit_open"] == 1
        assert await here.reader.run_once() == 0, "nobody begins anything while the circuit is open"
        assert await waiting(db) == ["evt_65a"]
        await db.execute("UPDATE webhook_api_budget SET open_until = now()")
        await db.execute("UPDATE webhook_events SET read_try_at = now() WHERE read_try_at IS NOT NULL")
        await here.work(db)
        assert (await inbox.queue(db))["circuit_open"] == 0
    assert len(stripe.paths) == 2
    assert await statuses(db) == {"evt_65a": "processed", "evt_other": "processed"}
    assert await db.fetchval("SELECT count(*) FROM webhook_failures") == 0


async def test_a_thin_event_that_cannot_be_made_ready_has_failed_alone_and_those_beside_it_go_on(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, stumbled = reads.wanted, list[str]()

    def stumble(event: Event, *, handled: bool) -> bool:
        if event.id == "evt_65odd":
            stumbled.append(event.id)
            raise TypeError("nobody thought of this")
        return wanted(event, handled=handled)

    monkeypatch.setattr(reads, "wanted", stumble)
    ada = example("customer", id="cus_1", name="Ada")
    stripe.show(ada)
    odd = thin_json("v1.customer.updated", example("customer", id="cus_2"), "evt_65odd")
    await put(db, odd, thin_json("v1.customer.updated", ada, "evt_65a"), event_json("evt_other"))
    async with house(database_url, settings, stripe, KAMIYO_FIRST_RETRY_DELAY=3600) as here:
        await here.work(db)
    assert await statuses(db) == {"evt_65odd": "failed", "evt_65a": "processed", "evt_other": "processed"}
    assert [(row["error_type"], row["retry_count"]) for row in await failures_of(db, "evt_65odd")] == [("TypeError", 1)]
    assert len(stumbled) == 2, "with the others, and alone"


async def test_twins_need_no_stripe_that_answers(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    snapshot, thin = pair("invoice.paid", example("invoice", id="in_1", status="paid"))
    stripe.faults = [500]
    async with house(database_url, settings, stripe) as here:
        await put(db, thin, thin_json("v1.customer.updated", example("customer", id="cus_1"), "evt_65a"))
        await here.worker.run_once(db)
        await db.execute(
            "UPDATE webhook_events SET read_try_at = now() + interval '1 hour' WHERE event_id = 'evt_65thin'"
        )
        await here.reader.run_once()
        # Half a second would be over before this story is, on a busy machine.
        await db.execute("UPDATE webhook_api_budget SET open_until = now() + interval '1 hour'")
        await db.execute("UPDATE webhook_events SET read_try_at = now() WHERE read_try_at IS NOT NULL")
        await put(db, snapshot)
        await here.work(db)
        assert (await inbox.queue(db))["circuit_open"] == 1
    assert await waiting(db) == ["evt_65a"]
    assert (await row_of(db, "evt_65thin"))["outcome"] == "paired"
    assert stripe.paths == ["/v1/customers/cus_1"]


async def test_one_object_that_stripe_is_slow_with_keeps_no_other_waiting(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    objects = [example("customer", id=f"cus_{number}") for number in range(20)]
    stripe.show(*objects)
    stripe.faults = [HANGS]
    await put(db, *(thin_json("v1.customer.updated", one) for one in objects))
    async with house(database_url, settings, stripe) as here:
        while await here.worker.run_once(db):
            pass
        reading = asyncio.create_task(here.reader.run())

        async def one_is_left() -> bool:
            return len(await waiting(db)) == 1

        await until(one_is_left)

        async def nothing_is_held() -> bool:
            return not await db.fetchval(
                "SELECT count(*) FROM pg_stat_activity "
                "WHERE datname = current_database() AND application_name = 'house' AND state <> 'idle'"
            ) and await no_lanes_held(db)

        await until(nothing_is_held)
        # While it is being asked for nobody else takes it; and should its reader die, that is over in seconds.
        await db.execute(
            "UPDATE webhook_events SET read_try_at = now() + interval '1 second' WHERE read_due_at IS NOT NULL"
        )
        await here.reader.renew()
        left = (
            "SELECT extract(epoch FROM read_try_at - now())::float8 FROM webhook_events WHERE read_due_at IS NOT NULL"
        )
        assert 10 < await db.fetchval(left) < 16
        reading.cancel()
        await asyncio.wait([reading])
        await db.execute("UPDATE webhook_events SET read_try_at = now() WHERE read_try_at IS NOT NULL")
        await here.work(db)
    assert set((await statuses(db)).values()) == {"processed"}


async def test_a_process_that_is_killed_while_it_reads_leaves_its_events_to_the_next(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    ada = example("customer", id="cus_1", name="Ada")
    stripe.show(ada)
    stripe.faults = [HANGS]
    variables = {
        "DATABASE_URL": database_url,
        "STRIPE_WEBHOOK_SECRET": SECRET,
        "STRIPE_SECRET_KEY": KEY,
        "STRIPE_API_BASE": stripe.base,
        "KAMIYO_RECONCILE": "false",
    }
    await put(db, thin_json("v1.customer.updated", ada, "evt_65a"))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kamiyo", "worker"),
        env=os.environ | variables,
        cwd=ROOT,
        stderr=asyncio.subprocess.DEVNULL,
    )

    async def asked() -> bool:
        return bool(stripe.paths)

    await until(asked)
    process.kill()
    await process.wait()
    assert await waiting(db) == ["evt_65a"]
    assert await db.fetchval("SELECT read_try_at < now() + interval '16 seconds' FROM webhook_events")
    await db.execute("UPDATE webhook_events SET read_try_at = now()")
    async with house(database_url, settings, stripe) as here:
        await here.work(db)
    row = await row_of(db, "evt_65a")
    assert (row["status"], row["attempts"], row["suspect"]) == ("processed", 1, False)
    assert (await billing(db))["customers", "cus_1"]["name"] == "Ada"


async def test_what_the_key_is_refused_for_is_asked_for_once_and_is_in_nobodys_way(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    customers = [{"id": f"cus_{number}", "object": "customer"} for number in range(30)]
    invoices = [example("invoice", id=f"in_{number}") for number in range(20)]
    stripe.show(*invoices)
    stripe.forbidden = {"/v1/customers"}
    await put(db, *(thin_json(f"v1.{one['object']}.updated", one) for one in [*customers, *invoices]))
    async with house(database_url, settings, stripe) as here:
        await here.work(db)
        refused = [path for path in stripe.paths if path.startswith("/v1/customers")]
        assert len(refused) <= 8, "what was asked for at the same time"
        assert len(await waiting(db)) == 30
        assert await db.fetchval(
            "SELECT bool_and(read_try_at > now() + interval '40 s') FROM webhook_events WHERE thin "
            "AND read_try_at IS NOT NULL"
        )
    assert {event_id for event_id, status in (await statuses(db)).items() if status == "failed"} == set()


async def test_a_refused_key_keeps_events_waiting_and_is_told_until_it_is_mended(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer, log: Log
) -> None:
    ada = example("customer", id="cus_1", name="Ada")
    stripe.show(ada, example("invoice", id="in_1"))
    stripe.forbidden = {"/v1/customers"}
    await put(db, thin_json("v1.customer.updated", ada, "evt_65a"))
    async with house(database_url, settings, stripe) as here:
        await here.work(db)
        assert await waiting(db) == ["evt_65a"]
        # Another kind of object is answered; that mends nothing for this one.
        await put(db, thin_json("v1.invoice.updated", {"id": "in_1", "object": "invoice"}, "evt_65i"))
        await here.work(db)
        told = {one.key: one for one in await alerts.find(db)}
        assert "GET /v1/customers in test mode (403)" in told["stripe_refuses"].body
        late = "UPDATE webhook_events SET read_due_at = now() - interval '6 minutes' WHERE read_due_at IS NOT NULL"
        await db.execute(late)
        assert "evt_65a" in {one.key: one for one in await alerts.find(db)}["reads_overdue"].body
        assert (await inbox.queue(db))["oldest_unread_seconds"] > 300
        assert (await inbox.health(db))["status"] == "healthy", "this system does what it should"

        stripe.forbidden = set()
        await db.execute("UPDATE webhook_events SET read_try_at = now() WHERE read_try_at IS NOT NULL")
        await here.work(db)
        assert await alerts.find(db) == []
    assert await statuses(db) == {"evt_65a": "processed", "evt_65i": "processed"}
    assert "sk_test" not in json.dumps(log())


async def test_an_object_that_stripe_will_never_give_makes_its_event_dead_with_the_reason(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    own = Registry()

    @own.on("v2.money.moved")
    async def nothing(event: Event, db: Connection) -> None: ...

    stripe.faults = [400]
    about = {"id": "mm_1", "object": "v2.money"}
    await put(db, thin_json("v2.money.moved", about, "evt_65a"))
    async with house(database_url, settings, stripe, own) as here:
        await here.work(db)
        row = await row_of(db, "evt_65a")
        assert (row["status"], row["next_try_at"]) == ("failed", None)
        [failure] = await db.fetch("SELECT error_type, error_message FROM webhook_failures")
        assert failure["error_type"] == "StripeRefused"
        assert "/v1/v2.moneys/mm_1" in failure["error_message"]
        stripe.objects["", "v2.money", "mm_1"] = about
        await inbox.retry(db, "evt_65a")
        await here.work(db)
    assert (await row_of(db, "evt_65a"))["outcome"] == "handled"
