"""Stories of the second door: events that Stripe has, and that never came."""

import asyncio
import contextlib
import json
import os
import random
import sys
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, cast
from urllib.parse import parse_qs

import pytest

from kamiyo import alerts, database, inbox
from kamiyo.database import Connection, Pool
from kamiyo.event import parse
from kamiyo.handlers import GUIDE_TYPES, Registry
from kamiyo.projections import table_of
from kamiyo.reconcile import Compared, keep_reconciling, reconcile
from kamiyo.simulator import CURRENT_API_VERSION, STORIES, World
from kamiyo.stripe_api import StripeApi, StripeKeyMissing, StripeRefused, StripeUnavailable
from kamiyo.worker import Worker
from tests.conftest import ROOT, Log, MakeSettings, event_json, until
from tests.stripe_server import KEY, StripeServer, stripe_server


@pytest.fixture
async def stripe() -> AsyncIterator[StripeServer]:
    async with stripe_server() as server:
        yield server


@contextlib.asynccontextmanager
async def asking(
    url: str, settings: MakeSettings, stripe: StripeServer, key: str = KEY, keys: dict[str, str] | None = None
) -> AsyncIterator[StripeApi]:
    pool = await database.open_pool(url, size=4, application="reconcile", idle_limit=60)
    more = {"STRIPE_SECRET_KEYS": json.dumps(keys)} if keys else {}
    try:
        api = StripeApi(
            pool,
            settings(STRIPE_SECRET_KEY=key, STRIPE_API_BASE=stripe.base, KAMIYO_STRIPE_API_RATE=100, **more),
        )
        yield api
        await api.close()
    finally:
        pool.terminate()


def pool_of(api: StripeApi) -> Pool:
    return api._pool


async def missed_incident(db: Connection) -> alerts.Incident | None:
    return next((one for one in await alerts.find(db) if one.key == "missed"), None)


def a_life(seed: int, ago: int = 3600) -> tuple[World, list[dict[str, object]]]:
    """A customer's sign-up that long ago, and its events newest first, as Stripe lists them."""
    world = World(seed, start=int(time.time()) - ago)
    events = [event.render(CURRENT_API_VERSION) for event in STORIES["signup"](world)]
    return world, events[::-1]


async def test_what_never_came_is_taken_in_and_makes_the_tables_true(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    world, stripe.events = a_life(1)
    delivered = stripe.events[-1]
    await inbox.put(db, [parse(json.dumps(delivered).encode(), received=time.time())])

    async with asking(database_url, settings, stripe) as api:
        done = await reconcile(pool_of(api), api, since=int(time.time()) - 7200, registry=Registry())
        assert done is not None
        assert (done.looked_at, done.missed > 0) == (len(stripe.events), True)
        worker = Worker(pool_of(api), database_url, settings(), Registry())
        async with pool_of(api).acquire() as own:
            while await worker.run_once(own):
                pass
        again = await reconcile(pool_of(api), api, since=int(time.time()) - 7200, registry=Registry())

    assert again == Compared(len(stripe.events), 0, 0)
    by_source = await db.fetch("SELECT source, count(*) FROM webhook_events GROUP BY source")
    sources = {source: count for source, count in by_source}
    assert sources == {"webhook": 1, "reconcile": done.added}
    truth = world.truth()
    for table in ("customers", "subscriptions", "invoices"):
        ids = {row_id for (row_id,) in await db.fetch(f"SELECT id FROM billing.{table}")}  # noqa: S608 - names of ours
        assert ids == truth[table].keys()


async def test_the_next_comparison_goes_on_where_the_last_one_ended_less_an_hour(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    async with asking(database_url, settings, stripe) as api:
        await reconcile(pool_of(api), api, registry=Registry())
        ended = await db.fetchval("SELECT extract(epoch FROM compared_to)::bigint FROM webhook_reconciliation")
        await reconcile(pool_of(api), api, registry=Registry())
    assert f"created[gte]={ended - 3600}" in stripe.asked[-1].replace("%5B", "[").replace("%5D", "]")


async def test_a_comparison_that_breaks_off_keeps_what_it_found_and_goes_on_there(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    stripe.events = [event for seed in range(20) for event in a_life(seed)[1]]
    stripe.events.sort(key=lambda event: event["created"], reverse=True)
    assert len(stripe.events) > 200, "it takes several pages"

    class Killed(Exception):
        pass

    def killed(looked_at: int) -> None:
        raise Killed

    async with asking(database_url, settings, stripe) as api:
        with pytest.raises(Killed):
            await reconcile(pool_of(api), api, registry=Registry(), progress=killed)
        first = await db.fetchval("SELECT count(*) FROM webhook_events")
        assert first > 0
        assert await db.fetchval("SELECT compared_to FROM webhook_reconciliation") is None
        found = await db.fetchval("SELECT found FROM webhook_reconciliation")
        # What is missing is told from the first page on, and not only when all is through.
        assert (await inbox.queue(db))["missed"] == found > 0
        done = await reconcile(pool_of(api), api, registry=Registry())
    assert done is not None
    assert first + done.added == await db.fetchval("SELECT count(*) FROM webhook_events")
    asked = [parse_qs(query) for query in stripe.asked]
    assert asked[1]["starting_after"] == [stripe.events[99]["id"]], "it goes on behind the page that it had"
    assert [query.get("starting_after") for query in asked].count(None) == 2, "what came since is a second window"


async def test_a_busy_stripe_is_asked_again_and_a_broken_one_fails_nothing(
    database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    _, stripe.events = a_life(2)
    stripe.faults = [429, 500]
    async with asking(database_url, settings, stripe) as api:
        done = await reconcile(pool_of(api), api, registry=Registry())
        assert done is not None
        assert done.looked_at == len(stripe.events)
        stripe.faults = [500] * 100
        with pytest.raises(StripeUnavailable):
            await api.read("/v1/events", {"created": {"gte": 0, "lte": 1}, "limit": 1}, patience=1)


async def test_the_budget_is_one_for_all_who_ask(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    await db.execute("INSERT INTO webhook_api_budget DEFAULT VALUES ON CONFLICT DO NOTHING")
    async with asking(database_url, settings, stripe) as api:
        await db.execute("UPDATE webhook_api_budget SET tokens = 0, filled_at = now() + interval '1 hour'")
        with pytest.raises(StripeUnavailable):
            await api.read("/v1/events", {"created": {"gte": 0, "lte": 1}, "limit": 1}, patience=0.2)
    assert stripe.asked == []


async def test_a_wrong_key_is_said_without_saying_the_key(
    database_url: str, settings: MakeSettings, stripe: StripeServer, log: Log
) -> None:
    async with asking(database_url, settings, stripe, key="sk_test_wrong") as api:
        with pytest.raises(StripeRefused) as refused:
            await reconcile(pool_of(api), api, registry=Registry())
    assert "STRIPE_SECRET_KEY" in str(refused.value)
    assert "sk_test" not in str(refused.value) + json.dumps(log())


def test_without_a_key_stripe_is_not_asked(settings: MakeSettings) -> None:
    with pytest.raises(StripeKeyMissing, match="STRIPE_SECRET_KEY is not set"):
        StripeApi(None, settings())  # type: ignore[arg-type]  # it does not get as far as using the pool


async def test_of_two_processes_one_compares(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    async with asking(database_url, settings, stripe) as one, asking(database_url, settings, stripe) as other:
        assert await reconcile(pool_of(one), one, registry=Registry(), at_least_every=900) is not None
        assert await reconcile(pool_of(other), other, registry=Registry(), at_least_every=900) is None
    assert len(stripe.asked) == 1


async def test_what_a_thin_event_has_told_is_not_missing(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    _, stripe.events = a_life(11)
    told = [event for event in stripe.events if event["type"] == "invoice.paid"]
    bodies = [
        {
            "id": f"evt_65{number}",
            "object": "v2.core.event",
            "type": f"v1.{event['type']}",
            "created": "2026-11-01T00:00:00Z",
            "snapshot_event": event["id"],
        }
        for number, event in enumerate(told)
    ]
    await inbox.put(db, [parse(json.dumps(body).encode(), received=time.time()) for body in bodies])
    async with asking(database_url, settings, stripe) as api:
        compared = await reconcile(pool_of(api), api)
    assert compared is not None and told
    here = {event_id for (event_id,) in await db.fetch("SELECT event_id FROM webhook_events")}
    assert not here & {event["id"] for event in told}
    assert compared.added == len(here) - len(bodies) > 0

    # Where objects are mirrored, only the snapshot shows them. It is taken in, and was not missed for that.
    async with asking(database_url, settings, stripe) as api:
        again = await reconcile(pool_of(api), api, mirrored=frozenset({"all"}))
    assert again is not None and again.missed == 0
    here = {event_id for (event_id,) in await db.fetch("SELECT event_id FROM webhook_events")}
    assert {event["id"] for event in told} <= here


# ── Killed at any step ────────────────────────────────────────────────────────────────────────────────────

_COMPARE = """
import asyncio, sys
from kamiyo import database
from kamiyo.handlers import GUIDE_TYPES, Registry
from kamiyo.projections import table_of
from kamiyo.reconcile import reconcile
from kamiyo.settings import Settings
from kamiyo.stripe_api import StripeApi
async def main():
    settings = Settings(_env_file=None)
    url = settings.database_url.get_secret_value()
    pool = await database.open_pool(url, size=4, application="killed", idle_limit=60)
    await reconcile(pool, StripeApi(pool, settings), registry=Registry())
asyncio.run(main())
"""


async def test_a_process_that_is_killed_at_any_step_loses_nothing_counts_nothing_twice_and_is_gone_on_with(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    stripe.events = [event for seed in range(25) for event in a_life(seed)[1]]
    stripe.events.sort(key=lambda event: (event["created"], event["id"]), reverse=True)
    pages = [stripe.events[at : at + 100] for at in range(0, len(stripe.events), 100)]
    assert len(pages) > 3

    @contextlib.asynccontextmanager
    async def comparing(permits: int) -> AsyncIterator[tuple[Process, asyncio.Semaphore]]:
        """A process that compares, and is killed when the block ends; so many more pages are answered."""
        stripe.pages = asyncio.Semaphore(permits)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _COMPARE),
            env=os.environ
            | {"DATABASE_URL": database_url, "STRIPE_SECRET_KEY": KEY, "STRIPE_API_BASE": stripe.base}
            | {"KAMIYO_STRIPE_API_RATE": "100", "PYTHONPATH": str(ROOT)},
        )
        try:
            yield process, stripe.pages
        finally:
            # Also of a story that fails: left alone it would ask on, and hold the tests' output open.
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        gone = "SELECT count(*) = 0 FROM pg_stat_activity WHERE application_name = 'killed'"
        await until(lambda: db.fetchval(gone))

    async def asked(pages: int) -> None:
        await until(lambda: _value(len(stripe.asked) >= pages))

    async def stands() -> tuple[int, str | None]:
        row = await db.fetchrow("SELECT found, after_event FROM webhook_reconciliation")
        return (row["found"], row["after_event"]) if row is not None else (0, None)

    async with comparing(0):  # killed while the first page is on its way
        await asked(1)
    assert await stands() == (0, None)
    # Killed in the middle of a page's transaction, its events put in and not committed.
    async with comparing(2) as (process, pages_left):
        await asked(4)
        first = await db.fetchval("SELECT count(*) FROM webhook_events")
        assert (await stands())[1] == pages[1][-1]["id"]
        async with db.transaction():
            await db.fetch("SELECT FROM webhook_reconciliation FOR UPDATE")
            pages_left.release()
            waits = "SELECT count(*) > 0 FROM pg_stat_activity WHERE application_name = 'killed' AND "
            other = await database.connect(database_url, application="test")
            await until(lambda: other.fetchval(waits + "wait_event_type = 'Lock'"))
            await other.close()
            process.kill()  # before the lock is gone, or it might get as far as its commit
            await process.wait()
    assert await db.fetchval("SELECT count(*) FROM webhook_events") == first
    assert (await stands())[1] == pages[1][-1]["id"]

    stripe.pages = None
    already = len(stripe.asked)
    async with asking(database_url, settings, stripe) as api:
        done = await reconcile(pool_of(api), api, registry=Registry())
        again = await reconcile(pool_of(api), api, registry=Registry())
    assert done is not None and again is not None
    assert parse_qs(stripe.asked[already])["starting_after"] == [pages[1][-1]["id"]]
    missing = [event for event in stripe.events if table_of(parse(json.dumps(event).encode(), received=0))]
    assert await db.fetchval("SELECT count(*) FROM webhook_events") == len(missing)
    deliverable = sum(event["type"] in GUIDE_TYPES for event in missing)
    assert (done.added, again) == (len(missing) - first, Compared(again.looked_at, 0, 0))
    told = await db.fetchval("SELECT found + missed FROM webhook_reconciliation")
    assert told == 0, "the second comparison found nothing"
    assert done.missed < deliverable, "some had been found before"


async def _value(value: bool) -> bool:
    return value


async def test_all_that_a_broken_comparison_found_is_told_when_it_is_through(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    stripe.events = sorted(
        (event for seed in range(20) for event in a_life(seed)[1]), key=lambda event: event["created"], reverse=True
    )

    def broken(looked_at: int) -> None:
        raise ConnectionResetError

    async with asking(database_url, settings, stripe) as api:
        with pytest.raises(ConnectionResetError):
            await reconcile(pool_of(api), api, registry=Registry(), progress=broken)
        done = await reconcile(pool_of(api), api, registry=Registry())
    assert done is not None
    everything = sum(event["type"] in GUIDE_TYPES for event in stripe.events)
    # The window that came after it found nothing more; all the same, all is told.
    incident = await missed_incident(db)
    missed = await db.fetchval("SELECT missed FROM webhook_reconciliation")
    assert missed == everything and incident is not None and f"{everything} events" in incident.body


async def test_what_stripe_has_forgotten_is_not_gone_on_behind(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    _, stripe.events = a_life(1)
    await db.execute(
        "INSERT INTO webhook_reconciliation (account, livemode, run, started_at, heard_at, window_from, window_to, "
        "after_event) VALUES ('', false, 1, now(), now(), now() - interval '3 days', now(), 'evt_forgotten')"
    )
    async with asking(database_url, settings, stripe) as api:
        done = await reconcile(pool_of(api), api, registry=Registry())
    assert done is not None and done.looked_at == len(stripe.events)


async def test_text_that_utf_8_cannot_write_keeps_nothing_from_being_fetched(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    _, stripe.events = a_life(1)
    signed_up = next(event for event in stripe.events if event["type"] == "customer.created")
    data = cast(dict[str, Any], signed_up["data"])
    data["object"]["metadata"] = {"note": "a smile, cut in two: \ud83d"}
    async with asking(database_url, settings, stripe) as api:
        done = await reconcile(pool_of(api), api, registry=Registry())
        assert done is not None and done.looked_at == len(stripe.events)
        worker = Worker(pool_of(api), database_url, settings(), Registry())
        async with pool_of(api).acquire() as own:
            while await worker.run_once(own):
                pass
    [row] = await db.fetch(
        "SELECT status, body FROM webhook_events JOIN webhook_payloads USING (seq, created_at) WHERE event_id = $1",
        signed_up["id"],
    )
    assert row["status"] == "processed"
    assert rb"cut in two: \ud83d" in row["body"]


async def test_an_error_that_nobody_thought_of_does_not_end_the_comparing(
    database_url: str, settings: MakeSettings, stripe: StripeServer, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stumbles(**_: object) -> None:
        raise ZeroDivisionError("nobody thought of this")

    async with asking(database_url, settings, stripe) as api:
        monkeypatch.setattr(api, "events", stumbles)
        comparing = asyncio.create_task(keep_reconciling(pool_of(api), api, random.Random(0)))

        async def it_failed() -> bool:
            return comparing.done() or any(line["event"] == "reconcile_failed" for line in log())

        await until(it_failed)
        assert not comparing.done()
        comparing.cancel()


# ── Where the cursor goes ─────────────────────────────────────────────────────────────────────────────────


async def test_a_look_back_by_hand_does_not_move_the_cursor_over_what_nobody_compared(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    _, old = a_life(1, ago=10 * 3600)
    stripe.events = old
    cursor = "SELECT extract(epoch FROM compared_to)::bigint FROM webhook_reconciliation"
    async with asking(database_url, settings, stripe) as api:
        await reconcile(pool_of(api), api, since=int(time.time()) - 3600, registry=Registry())
        assert await db.fetchval(cursor) is None, "71 hours before that were never looked at"
        done = await reconcile(pool_of(api), api, registry=Registry())
        assert done is not None and done.added > 0
        long_ago = int(time.time()) - 5 * 3600
        await db.execute("UPDATE webhook_reconciliation SET compared_to = to_timestamp($1)", long_ago)
        await reconcile(pool_of(api), api, since=int(time.time()) - 1800, registry=Registry())
        assert await db.fetchval(cursor) == long_ago
        await reconcile(pool_of(api), api, since=long_ago, registry=Registry())
        assert await db.fetchval(cursor) > long_ago


async def test_whoever_takes_a_comparison_over_goes_on_and_the_other_writes_nothing_more(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    stripe.events = [event for seed in range(20) for event in a_life(seed)[1]]
    stripe.events.sort(key=lambda event: event["created"], reverse=True)
    stripe.pages = asyncio.Semaphore(1)
    async with asking(database_url, settings, stripe) as one, asking(database_url, settings, stripe) as other:
        slow = asyncio.create_task(reconcile(pool_of(one), one, registry=Registry()))
        await until(lambda: _value(len(stripe.asked) >= 2))
        # By the clock it is in another's hands; by hand it is taken out of them.
        assert await reconcile(pool_of(other), other, registry=Registry(), at_least_every=900) is None
        quick = asyncio.create_task(reconcile(pool_of(other), other, registry=Registry()))
        await until(lambda: _value(len(stripe.asked) >= 3))
        for _ in range(20):
            stripe.pages.release()
        done = await quick
        assert await slow is None
    assert done is not None
    assert parse_qs(stripe.asked[2])["starting_after"] == [stripe.events[99]["id"]]
    # One page was read by both; whoever lost its turn asked for no more.
    [begin] = parse_qs(stripe.asked[0])["created[gte]"]
    of_first_window = [query for query in stripe.asked if parse_qs(query)["created[gte]"] == [begin]]
    assert len(of_first_window) == -(-len(stripe.events) // 100) + 1
    wanted = [event for event in stripe.events if table_of(parse(json.dumps(event).encode(), received=0))]
    assert await db.fetchval("SELECT count(*) FROM webhook_events") == len(wanted)


# ── Many accounts, both modes ─────────────────────────────────────────────────────────────────────────────

LIVE, MEMBER = "rk_live_of_the_tests", "rk_test_of_a_member"


async def test_every_account_is_compared_with_the_key_that_opens_it_and_its_events_are_filed_under_it(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer, log: Log
) -> None:
    stripe.keys = {KEY: "", LIVE: "", MEMBER: "acct_member"}
    worlds = {}
    for seed, whose in enumerate([("", False), ("", True), ("acct_member", False), ("acct_connected", False)]):
        # The same life, so the same ids, in each: what keeps them apart is whose they are.
        worlds[whose], events = a_life(7)
        stripe.events_of[whose] = [{**event, "id": f"{event['id']}_{seed}", "livemode": whose[1]} for event in events]
    seen = [("evt_connected", "acct_connected", False), ("evt_left", "acct_left", False), ("evt_live", "acct_x", True)]
    for event_id, account, livemode in seen:
        body = event_json(event_id, "account.updated", {"id": account, "object": "account"}, account=account)
        await inbox.put(db, [replace(parse(body, received=0), livemode=livemode)])

    keys = {"acct_member": MEMBER}
    async with asking(database_url, settings, stripe, key=f"{KEY},{LIVE}", keys=keys) as api:
        done = await reconcile(pool_of(api), api, registry=Registry())
        assert done is not None and sorted(done.refused) == ["acct_left", "acct_x"]
        worker = Worker(pool_of(api), database_url, settings(), Registry())
        async with pool_of(api).acquire() as own:
            while await worker.run_once(own):
                pass
        # A connected account that has left is asked again after a day, and keeps nobody else waiting.
        await db.execute(
            "UPDATE webhook_reconciliation SET started_at = started_at - interval '1 hour', "
            "heard_at = heard_at - interval '1 hour'"
        )
        before = len(stripe.asked)
        again = await reconcile(pool_of(api), api, registry=Registry(), at_least_every=900)
    assert again is not None and again == Compared(again.looked_at, 0, 0)
    assert len(stripe.asked) - before == 4

    for account, livemode in worlds:
        truth = worlds[account, livemode].truth()
        for table in ("customers", "subscriptions", "invoices"):
            rows = await db.fetch(
                f"SELECT id FROM billing.{table} WHERE account = $1 AND livemode = $2",  # noqa: S608 - names of ours
                *(account, livemode),
            )
            assert {row_id for (row_id,) in rows} == truth[table].keys()
    bodies = await db.fetch(
        "SELECT account, livemode, payload ->> 'account' AS said FROM webhook_events JOIN webhook_event_payloads "
        "USING (event_id) WHERE source = 'reconcile'"
    )
    assert {(row["account"], row["said"]) for row in bodies} == {
        *{("", None), ("acct_member", "acct_member"), ("acct_connected", "acct_connected")}
    }
    told = [line for line in log() if line["event"] == "reconcile_refused"]
    assert sorted(line["account"] for line in told) == ["acct_left", "acct_x"]
    assert await missed_incident(db) is None, "the comparison after it found nothing"
    await db.execute("UPDATE webhook_reconciliation SET missed = 3 WHERE account = 'acct_connected'")
    incident = await missed_incident(db)
    assert incident is not None and "3 events" in incident.body and "of acct_connected" in incident.body


async def test_one_account_whose_key_is_refused_is_said_and_the_others_are_compared(
    db: Connection, database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    _, stripe.events = a_life(3)
    async with asking(database_url, settings, stripe, key="sk_test_wrong", keys={"acct_b": KEY, "acct_a": "x"}) as api:
        with pytest.raises(StripeRefused, match="STRIPE_SECRET_KEY") as refused:
            await reconcile(pool_of(api), api, registry=Registry())
    assert "sk_test" not in str(refused.value)
    assert {account for (account,) in await db.fetch("SELECT account FROM webhook_events")} == {"acct_b"}


async def test_a_mode_without_a_key_is_not_read_with_the_other_modes(
    database_url: str, settings: MakeSettings, stripe: StripeServer
) -> None:
    async with asking(database_url, settings, stripe) as api:
        assert api.reaches("acct_1", False) and not api.reaches("acct_1", True)
        with pytest.raises(StripeRefused, match="No key of live mode is set for one's own account"):
            await api.read("/v1/events", livemode=True)
        with pytest.raises(StripeRefused, match="No key of live mode is set for acct_1"):
            await api.read("/v1/events", account="acct_1", livemode=True)
    assert stripe.asked == []
