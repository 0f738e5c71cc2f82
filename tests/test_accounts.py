"""Stories of many accounts and two modes in one system: whose an event is, and that nothing of theirs ever mixes."""

import asyncio
import json
import random
import time
from dataclasses import replace
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from kamiyo import database, inbox, reads, rebuild
from kamiyo.audit import audit
from kamiyo.backfill import backfill
from kamiyo.cli.main import app as command_line
from kamiyo.database import Connection
from kamiyo.event import Event
from kamiyo.handlers import Registry
from kamiyo.projections import Read
from kamiyo.simulator import CURRENT_API_VERSION, STORIES, World
from kamiyo.stripe_api import StripeApi
from kamiyo.web import create_app
from tests.conftest import ADMIN, PREFIX, MakeSettings, event_json, running_client, settled, signed
from tests.stripe_server import KEY, stripe_server
from tests.turns import NOW, example, read, work_off, worker_on

PLATFORM, CONNECT, MEMBER, PLAIN = ("whsec_platform", "whsec_connect", "whsec_member", "whsec_plain")
SECRETS = json.dumps({"platform": PLATFORM, "connect": ["whsec_old", CONNECT], "acct_member": MEMBER})

#: Every account and mode of the first story, and how Stripe says so on an event.
EVERYBODY: dict[tuple[str, bool], dict[str, Any]] = {
    ("", False): {"livemode": False},
    ("", True): {"livemode": True},
    ("acct_1", False): {"livemode": False, "account": "acct_1", "context": "acct_1"},
    ("acct_1", True): {"livemode": True, "account": "acct_1"},
    ("acct_2", True): {"livemode": True, "context": "acct_platform/acct_2"},
}

_ROWS = """
SELECT account, livemode, kind, id,
       facts - '{account,livemode,last_webhook_event_id,last_webhook_updated_at}'::text[] AS facts
FROM (SELECT account, livemode, 'customer' AS kind, id, to_jsonb(b) AS facts FROM billing.customers AS b
      UNION ALL SELECT account, livemode, 'subscription', id, to_jsonb(b) FROM billing.subscriptions AS b
      UNION ALL SELECT account, livemode, 'invoice', id, to_jsonb(b) FROM billing.invoices AS b
      UNION ALL SELECT account, livemode, 'payment_method', id, to_jsonb(b) FROM billing.payment_methods AS b) AS b
"""


async def rows_of_each(db: Connection) -> dict[tuple[str, bool], dict[tuple[str, str], str]]:
    """The billing rows of each account and mode, without whose they are and which event made them."""
    found: dict[tuple[str, bool], dict[tuple[str, str], str]] = {}
    for row in await db.fetch(_ROWS):
        found.setdefault((row["account"], row["livemode"]), {})[row["kind"], row["id"]] = row["facts"]
    return found


@pytest.mark.parametrize("on_arrival", [True, False], ids=["projected on arrival", "by the workers"])
async def test_one_life_in_five_accounts_and_modes_is_five_lives_whatever_order_they_come_in(
    on_arrival: bool, database_url: str, db: Connection, settings: MakeSettings
) -> None:
    world = World(5, start=1_790_000_000)
    life = [event.render(CURRENT_API_VERSION) for event in STORIES["dunning"](world)]
    # In acct_1's live mode the last half has not happened: every row there must show the life as it was then.
    bodies = [
        json.dumps({**event, **said, "id": f"{event['id']}_{n}"}).encode()
        for n, (whose, said) in enumerate(EVERYBODY.items())
        for event in (life[: len(life) // 2] if whose == ("acct_1", True) else life)
    ]
    random.Random(1).shuffle(bodies)
    if on_arrival:
        changes = {"STRIPE_WEBHOOK_SECRET": PLAIN, "KAMIYO_WORKER": True}
        async with running_client(create_app(settings(**changes))) as client:
            for at in range(0, len(bodies), 40):
                posts = [
                    client.post(f"{PREFIX}/stripe", content=b, headers=signed(b, PLAIN)) for b in bodies[at : at + 40]
                ]
                assert {answer.status_code for answer in await asyncio.gather(*posts)} == {200}
            for body in bodies:
                await settled(db, read(body).id, "processed")
    else:
        ran: list[tuple[str, bool, str | None]] = []
        registry = Registry()

        @registry.on("invoice.payment_failed")
        async def note(event: Event, db: Connection) -> None:
            ran.append((event.account, event.livemode, event.object_id))

        await inbox.put(db, [read(body) for body in bodies])
        worker = await worker_on(database_url, settings(), registry)
        await work_off(worker, db)
        worker.pool.terminate()
        failed = [event["data"]["object"]["id"] for event in life if event["type"] == "invoice.payment_failed"]
        assert failed and sorted(ran) == sorted(
            (*whose, object_id)
            for whose in EVERYBODY
            for object_id in (
                [
                    event["data"]["object"]["id"]
                    for event in life[: len(life) // 2]
                    if event["type"] == "invoice.payment_failed"
                ]
                if whose == ("acct_1", True)
                else failed
            )
        )

    each = await rows_of_each(db)
    assert each.keys() == EVERYBODY.keys()
    whole = each["", False]
    assert all(each[whose] == whole for whose in EVERYBODY if whose != ("acct_1", True))
    assert each["acct_1", True] != whole

    # The tables made again from the events are the same, row for row.
    await rebuild.rebuild(db)
    assert await rows_of_each(db) == each


async def test_two_that_contradict_each_other_in_two_accounts_are_no_tie(
    db: Connection, database_url: str, settings: MakeSettings
) -> None:
    def said(name: str, **whose: Any) -> bytes:
        made = {"id": "cus_1", "object": "customer", "name": name, "created": 1}
        return event_json(None, "customer.updated", made, created=1_790_000_000, **whose)

    bodies = [said("Ada"), said("Bela", account="acct_1"), said("Cyd", livemode=True), said("Dan", context="acct_2")]
    await inbox.put(db, [read(body) for body in bodies])
    worker = await worker_on(database_url, settings(), Registry())
    await work_off(worker, db)
    worker.pool.terminate()
    rows = await db.fetch("SELECT name, order_evidence FROM billing.customers ORDER BY name")
    assert [tuple(row) for row in rows] == [(name, "decided") for name in ("Ada", "Bela", "Cyd", "Dan")]


async def test_what_stripes_api_said_of_an_object_is_kept_and_shown_in_its_account_and_mode_alone(
    db: Connection,
) -> None:
    names = {("", False): "Ada", ("", True): "Bela", ("acct_1", True): "Cyd"}
    told = [
        Read(
            *("customer", "cus_1", account, livemode),
            *(json.dumps({"id": "cus_1", "object": "customer", "name": name}).encode(), NOW, "audit"),
        )
        for (account, livemode), name in names.items()
    ]
    gone = replace(told[2], body=b'{"id": "cus_1", "object": "customer", "deleted": true}', second=NOW + 10)
    for heard in (told, [gone]):
        async with db.transaction():
            result = await reads.apply(db, heard)
        assert (result.held_up, result.unreadable) == ([], [])

    async def shown() -> dict[tuple[str, bool], tuple[str, bool]]:
        rows = await db.fetch("SELECT account, livemode, name, deleted_at FROM billing.customers WHERE id = 'cus_1'")
        return {(row["account"], row["livemode"]): (row["name"], row["deleted_at"] is not None) for row in rows}

    each = await shown()
    assert each == {whose: (name, whose == ("acct_1", True)) for whose, name in names.items()}
    await rebuild.rebuild(db)
    assert await shown() == each


async def test_a_backfill_and_an_audit_read_one_account_in_one_mode_with_its_own_key_and_touch_no_other(
    db: Connection, database_url: str, settings: MakeSettings
) -> None:
    live, member = "rk_live_of_the_tests", "rk_live_of_a_member"
    pool = await database.open_pool(database_url, size=10, application="test", idle_limit=60)
    async with stripe_server() as stripe:
        stripe.keys = {KEY: "", live: "", member: "acct_member"}
        keyed = {"STRIPE_SECRET_KEY": f"{KEY},{live}", "STRIPE_SECRET_KEYS": json.dumps({"acct_member": member})}
        changes = {**keyed, "STRIPE_API_BASE": stripe.base, "KAMIYO_STRIPE_API_RATE": 100}
        in_mode = {mode: StripeApi(pool, settings(**changes), livemode=mode) for mode in (True, False)}

        def show(account: str, livemode: bool, name: str) -> None:
            stripe.show(example("customer", id="cus_1", name=name, livemode=livemode), account=account)

        names = {("", False): "Ada", ("", True): "Bela", ("acct_member", True): "Cyd"}
        for (account, livemode), name in names.items():
            show(account, livemode, name)
            await backfill(pool, in_mode[livemode], ["customers"], account=account)
        rows = await db.fetch("SELECT account, livemode, name FROM billing.customers")
        assert {(row["account"], row["livemode"]): row["name"] for row in rows} == names

        # An account that has a key of live mode alone is not read with it in test mode.
        show("acct_member", True, "Dan")
        stripe.ahead = 5
        done = await audit(pool, in_mode[True], share=1, account="acct_member", repair=True, pause=noop_pause)
        assert [(one.account, one.livemode, one.mended) for one in done.findings] == [("acct_member", True, True)]
        nothing = await audit(pool, in_mode[False], share=1, account="acct_member", pause=noop_pause)
        assert nothing.checked == 0
        for api in in_mode.values():
            await api.close()
    pool.terminate()
    rows = await db.fetch("SELECT account, livemode, name FROM billing.customers")
    changed = {**names, ("acct_member", True): "Dan"}
    assert {(row["account"], row["livemode"]): row["name"] for row in rows} == changed


async def noop_pause() -> None:
    """Nothing is on its way that would be worth waiting for."""


async def test_a_twin_endpoints_event_is_the_twin_of_one_in_the_same_account_and_mode_only(
    database_url: str, db: Connection, settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    # Not before the twin's endpoint delivers for the first time, however long that takes to come.
    made, second = {"id": "cus_1", "object": "customer", "created": 1}, int(time.time()) + 600

    def said(event_id: str, **whose: Any) -> bytes:
        return event_json(event_id, "customer.created", made, created=second, **whose)

    doors = {"STRIPE_WEBHOOK_SECRETS": SECRETS, "STRIPE_SHADOW_WEBHOOK_SECRET": "whsec_twin"}
    async with running_client(create_app(settings(**doors, STRIPE_ACCOUNT_ID="acct_own"))) as client:
        for path, secret, bodies in (
            # The twin's organisation names one's own account, the other endpoint does not.
            ("stripe?shadow=1", "whsec_twin", [said("evt_4", context="acct_own"), said("evt_5", account="acct_2")]),
            ("stripe", CONNECT, [said("evt_1"), said("evt_2", account="acct_1"), said("evt_3", livemode=True)]),
        ):
            for body in bodies:
                answer = await client.post(f"{PREFIX}/{path}", content=body, headers=signed(body, secret))
                assert answer.status_code == 200
        crossed = await client.post(f"{PREFIX}/stripe?shadow=1", content=body, headers=signed(body, CONNECT))
        assert crossed.status_code == 400, "a named endpoint's secret does not open the twin's door"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", database_url)
    done = await asyncio.to_thread(CliRunner().invoke, command_line, ["upgrade-report", "--json", "--grace", "0"])
    said_of_it = json.loads(done.stdout)
    pairs = said_of_it["types"]["customer.created"]
    assert (said_of_it["pairs"], pairs["alike"]) == (1, 1)
    assert (pairs["without_twin"]["count"], pairs["without_real"]["count"]) == (2, 1)


# ── A secret for each endpoint ────────────────────────────────────────────────────────────────────────────


async def test_each_event_is_stored_under_the_name_of_the_endpoint_that_signed_it(
    database_url: str, db: Connection, settings: MakeSettings
) -> None:
    named = {"STRIPE_WEBHOOK_SECRET": PLAIN, "STRIPE_WEBHOOK_SECRETS": SECRETS, "STRIPE_ACCOUNT_ID": "acct_own"}
    kinds: list[tuple[str, str, str, dict[str, Any]]] = [
        (PLATFORM, "platform", "", {}),
        (CONNECT, "connect", "acct_1", {"account": "acct_1"}),
        (PLAIN, "webhook", "acct_1", {"context": "acct_1"}),
        # An endpoint of another account of one's own: its events name nobody.
        (MEMBER, "acct_member", "acct_member", {}),
        # An organisation's endpoint names the own account as well.
        (CONNECT, "connect", "", {"context": "acct_own"}),
    ]
    deliveries: list[tuple[bytes, str, str, str]] = []
    for n in range(40):
        made: dict[str, Any] = {"id": f"cus_{n}", "object": "customer", "created": 1}
        secret, source, account, said = kinds[n % 5]
        deliveries.append((event_json(f"evt_{n}", "customer.created", made, **said), secret, source, account))
    async with running_client(create_app(settings(**named))) as client:
        # At once, so that endpoints share groups and none gets another's name.
        posts = [
            client.post(f"{PREFIX}/stripe", content=body, headers=signed(body, secret))
            for body, secret, _, _ in deliveries
        ]
        answers = await asyncio.gather(*posts)
        assert {answer.json()["message"] for answer in answers} == {"Event received"}
        body = deliveries[0][0]
        for secret in (CONNECT, PLAIN):  # the same event by another endpoint
            again = await client.post(f"{PREFIX}/stripe", content=body, headers=signed(body, secret))
            assert again.json()["message"] == "Event already processed"
        forged = await client.post(f"{PREFIX}/stripe", content=body, headers=signed(body, "platform"))
        assert forged.status_code == 400
    rows = await db.fetch("SELECT event_id, source, account FROM webhook_events")
    assert {tuple(row) for row in rows} == {
        (f"evt_{n}", source, account) for n, (_, _, source, account) in enumerate(deliveries)
    }
    customers = await db.fetch("SELECT id, account FROM billing.customers")
    assert {tuple(row) for row in customers} == {
        (f"cus_{n}", account) for n, (_, _, _, account) in enumerate(deliveries)
    }


# ── Filters ───────────────────────────────────────────────────────────────────────────────────────────────

_ASKED = [
    ({"account": "acct_1"}, {"evt_connect", "evt_org"}),
    ({"account": "own"}, {"evt_own", "evt_live"}),
    ({"context": "acct_p/acct_1"}, {"evt_org"}),
    ({"context": "acct_1"}, set()),
    ({"livemode": "true"}, {"evt_live", "evt_org"}),
    ({"livemode": "false"}, {"evt_own", "evt_connect"}),
    ({"livemode": "true", "account": "own"}, {"evt_live"}),
]


@pytest.fixture
async def failed_events(db: Connection, quiet_client: httpx.AsyncClient) -> httpx.AsyncClient:
    """A client of a system with one failed event of each kind."""
    for event_id, said in (
        ("evt_own", {}),
        ("evt_live", {"livemode": True}),
        ("evt_connect", {"account": "acct_1"}),
        ("evt_org", {"livemode": True, "context": "acct_p/acct_1"}),
    ):
        await inbox.put(db, [read(event_json(event_id, "charge.failed", **said))])
    await db.execute("UPDATE webhook_events SET status = 'failed', failed_at = now(), next_try_at = NULL")
    return quiet_client


async def test_events_are_listed_and_run_again_by_account_context_and_mode(
    failed_events: httpx.AsyncClient, db: Connection
) -> None:
    for filters, wanted in _ASKED:
        answer = await failed_events.get(f"{PREFIX}/events", params=filters, headers=ADMIN)
        assert {event["event_id"] for event in answer.json()["events"]} == wanted, filters
        counted = await failed_events.post(
            f"{PREFIX}/events/replay", params={**filters, "dry_run": "true"}, headers=ADMIN
        )
        assert counted.json()["matched_count"] == len(wanted), filters
    [org] = (await failed_events.get(f"{PREFIX}/events?context=acct_p/acct_1", headers=ADMIN)).json()["events"]
    assert (org["account"], org["context"], org["livemode"]) == ("acct_1", "acct_p/acct_1", True)
    answer = await failed_events.post(f"{PREFIX}/events/replay?account=own&livemode=false", headers=ADMIN)
    assert answer.json()["replayed_count"] == 1
    assert await db.fetchval("SELECT event_id FROM webhook_events WHERE status = 'pending'") == "evt_own"
    audit = await db.fetchval("SELECT filters FROM webhook_audit")
    assert json.loads(audit) == {"status": "failed", "account": "", "livemode": False}
    for nonsense in ("livemode=maybe", "context=%00", f"account={'x' * 300}"):
        assert (await failed_events.get(f"{PREFIX}/events?{nonsense}", headers=ADMIN)).status_code == 422


async def test_the_command_line_has_the_same_filters(
    failed_events: httpx.AsyncClient, database_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", database_url)
    runner = CliRunner()

    async def said(*words: str) -> str:
        done = await asyncio.to_thread(runner.invoke, command_line, words)
        assert done.exit_code == 0, done.output
        return done.output

    everything = await said("events", "list")
    assert "account" in everything and "own" in everything and "live" in everything
    for filters, wanted in _ASKED:
        options = [
            option
            for name, value in filters.items()
            for option in (
                ["--livemode" if value == "true" else "--testmode"] if name == "livemode" else [f"--{name}", value]
            )
        ]
        listed = await said("events", "list", *options)
        assert {f"evt_{kind}" for kind in ("own", "live", "connect", "org") if f"evt_{kind}" in listed} == wanted
        assert f"{len(wanted)} failed events match" in await said("replay", "--dry-run", *options)
    shown = await said("events", "show", "evt_org", "--no-payload")
    assert "acct_p/acct_1" in shown and "webhook" in shown
