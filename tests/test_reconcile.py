"""Stories of the second door: events that Stripe has, and that never came."""

import contextlib
import json
import time
from collections.abc import AsyncIterator

import pytest

from kamiyo import database, inbox
from kamiyo.database import Connection, Pool
from kamiyo.event import parse
from kamiyo.handlers import Registry
from kamiyo.reconcile import Compared, reconcile
from kamiyo.simulator import CURRENT_API_VERSION, STORIES, World
from kamiyo.stripe_api import StripeApi, StripeKeyMissing, StripeRefused, StripeUnavailable
from kamiyo.worker import Worker
from tests.conftest import Log, MakeSettings
from tests.stripe_server import KEY, StripeServer, stripe_server


@pytest.fixture
async def stripe() -> AsyncIterator[StripeServer]:
    async with stripe_server() as server:
        yield server


@contextlib.asynccontextmanager
async def asking(url: str, settings: MakeSettings, stripe: StripeServer, key: str = KEY) -> AsyncIterator[StripeApi]:
    pool = await database.open_pool(url, size=4, application="reconcile", idle_limit=60)
    try:
        api = StripeApi(pool, settings(STRIPE_SECRET_KEY=key, STRIPE_API_BASE=stripe.base, KAMIYO_STRIPE_API_RATE=100))
        yield api
        await api.close()
    finally:
        pool.terminate()


def pool_of(api: StripeApi) -> Pool:
    return api._pool


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


async def test_a_comparison_that_breaks_off_keeps_what_it_found_and_starts_again(
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
        done = await reconcile(pool_of(api), api, registry=Registry())
    assert done is not None
    assert first + done.added == await db.fetchval("SELECT count(*) FROM webhook_events")


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
