"""A twin endpoint on another API version: verified, kept apart, compared; never an event."""

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from kamiyo import alerts, database, handlers, inbox, shadow, telemetry
from kamiyo.cli.main import app as command_line
from kamiyo.database import Connection
from kamiyo.errors import SettingsError
from kamiyo.reconcile import Compared, reconcile
from kamiyo.settings import load_settings
from kamiyo.shadow import KEPT_DAYS, ShadowReceiver, is_shadow
from kamiyo.simulator import API_VERSIONS, CURRENT_API_VERSION, STORIES, SimulatedEvent, World
from kamiyo.stripe_api import StripeApi
from kamiyo.web import create_app
from tests.conftest import (
    ADMIN,
    DEADLINE,
    PREFIX,
    SECRET,
    Log,
    MakeSettings,
    event_json,
    noop,
    running_client,
    serving,
    signed,
    until,
)
from tests.stripe_server import KEY, stripe_server
from tests.turns import NOW, billing, example, read

SHADOW = f"{PREFIX}/stripe?shadow=1"
SHADOW_SECRET = "whsec_of_the_twin"
OLD, NEW = API_VERSIONS[0], CURRENT_API_VERSION

_Change = Callable[[dict[str, Any]], None]
Report = Callable[..., Awaitable[Result]]

_HANDLERS = """
from kamiyo import Event, on


@on("customer.subscription.updated")
async def write_down(event: Event, db) -> None:
    await db.execute("INSERT INTO webhook_audit (action, filters, count) VALUES ('handled', '{}', 1)")
"""


def twin(event: SimulatedEvent, change: _Change | None = None) -> bytes:
    """What the twin endpoint gets of an event: the same in the new version, under an id of its own."""
    payload = event.render(NEW) | {"id": f"{event.id}_twin"}
    if change is not None:
        change(payload["data"]["object"])
    return json.dumps(payload).encode()


def shadowed(client: httpx.Client, body: bytes, secret: str = SHADOW_SECRET) -> httpx.Response:
    return client.post(SHADOW, content=body, headers=signed(body, secret))


@pytest.fixture
def report(database_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Report:
    """`await report("--json")` runs `kamiyo upgrade-report` on the clean database."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", database_url)

    async def run(*arguments: str) -> Result:
        return await asyncio.to_thread(CliRunner().invoke, command_line, ["upgrade-report", *arguments])

    return run


async def test_two_versions_of_one_story_are_compared_field_by_field_and_only_one_is_counted(
    database_url: str, db: Connection, report: Report, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(_HANDLERS)
    # It begins after the twin's endpoint has delivered for the first time, however long a server takes to start.
    world = World(21, start=int(time.time()) + 600)
    events = STORIES["upgrade"](world)
    told = {event.type: event for event in events}
    dearer, unreadable = told["invoice.paid"], told["payment_method.attached"]
    left_out = told["customer.subscription.created"]
    changes: dict[str, _Change] = {
        dearer.id: lambda invoice: invoice.update(total=invoice["total"] + 1),
        unreadable.id: lambda method: method["card"].update(exp_month=[]) or method.update(created="yesterday"),
    }
    twins = [twin(event, changes.get(event.id)) for event in events if event is not left_out]
    # A type that only the new version has, and a copy of everything.
    twins.append(event_json("evt_only_there", "customer.tax_id.created", created=world.now, api_version=NEW))
    copies = [*twins, *twins]
    random.Random(3).shuffle(copies)

    variables = {"STRIPE_SHADOW_WEBHOOK_SECRET": SHADOW_SECRET, "KAMIYO_HANDLERS": "mine"}
    with serving(database_url, folder=tmp_path, **variables) as served, httpx.Client(base_url=served.url) as client:

        def tell(bodies: list[bytes]) -> Iterator[tuple[int, str]]:
            for body in bodies:
                answer = shadowed(client, body)
                yield answer.status_code, answer.json()["message"]

        answers = await asyncio.to_thread(lambda: list(tell(copies)))
        assert {status for status, _ in answers} == {200}
        assert sum(message == "Shadow event received" for _, message in answers) == len(twins)
        assert sum(message == "Shadow event already received" for _, message in answers) == len(twins)

        def tell_real() -> list[httpx.Response]:
            bodies = [event.body(OLD) for event in events]
            return [client.post(f"{PREFIX}/stripe", content=body, headers=signed(body)) for body in bodies]

        assert {answer.status_code for answer in await asyncio.to_thread(tell_real)} == {200}

        async def all_processed() -> bool:
            return not await db.fetchval("SELECT count(*) FROM webhook_events WHERE status <> 'processed'")

        await until(all_processed)
        metrics = (await asyncio.to_thread(client.get, "/metrics")).text
        statistics = (await asyncio.to_thread(client.get, f"{PREFIX}/statistics", headers=ADMIN)).json()

    # Of the twins nothing is an event: not in the ledger, not counted, not handled, not in the tables.
    assert await db.fetchval("SELECT count(*) FROM webhook_events") == len(events)
    assert statistics["summary"]["total_events"] == len(events)
    received = [line for line in metrics.splitlines() if line.startswith("webhook_received_total{")]
    assert sum(float(line.split()[-1]) for line in received) == len(events)
    assert "webhook_rejected_total{" not in metrics
    updates = sum(event.type == "customer.subscription.updated" for event in events)
    assert await db.fetchval("SELECT count(*) FROM webhook_audit WHERE action = 'handled'") == updates
    tables = await billing(db)
    truth = {(table, id_): row for table, rows in world.truth().items() for id_, row in rows.items()}
    assert {place: {name: tables[place][name] for name in row} for place, row in truth.items()} == truth

    handlers.on("customer.subscription.updated")(noop)
    done = await report("--json", "--grace", "0")
    assert done.exit_code == 1
    said = json.loads(done.stdout)
    assert said["changes"] is True
    assert said["versions"] == {"real": {OLD: said["pairs"]}, "shadow": {NEW: said["pairs"]}}
    assert said["pairs"] == len(events) - 1
    assert {name for name, one in said["types"].items() if one["changes"]} == {
        "invoice.paid",
        "payment_method.attached",
        "customer.subscription.created",
    }
    assert {name: one["only"] for name, one in said["types"].items() if one["only"]} == {
        "customer.tax_id.created": "shadow",
        "customer.subscription.created": "real",
    }
    assert said["types"]["customer.subscription.created"]["without_twin"]["examples"] == [left_out.id]

    paid = said["types"]["invoice.paid"]
    number = sum(event.type == "invoice.paid" for event in events)
    assert (paid["pairs"], paid["alike"]) == (number, number - 1)
    assert paid["fields"]["billing.invoices.total"] == {
        "agree": number - 1,
        "differ": 1,
        "examples": [f"{dearer.id} {dearer.id}_twin"],
    }
    # Basil moved it, and the projection reads it in both places.
    assert paid["fields"]["billing.invoices.subscription"] == {"agree": number, "differ": 0}
    [refused] = said["types"]["payment_method.attached"]["unreadable"]
    assert (refused["side"], refused["why"].rpartition("$.")[2]) == ("shadow", "data.object.created`")

    # What handlers would see: fields that are gone, and where they are now.
    updated = said["types"]["customer.subscription.updated"]
    assert updated["handled"] is True and updated["alike"] == updated["pairs"]
    seen = {(one["what"], one["path"]) for one in updated["shape"]}
    assert {("gone", "current_period_end"), ("new", "items.data[].current_period_end")} <= seen
    assert not any(what == "value" for what, _ in seen)

    # And in words, without anything of a customer's.
    words = await report("--grace", "0")
    assert words.exit_code == 1
    for expected in ("billing.invoices.total", f"{dearer.id} {dearer.id}_twin", "current_period_end: gone"):
        assert expected in words.stdout
    assert "hosted_invoice_url: gone" not in words.stdout
    facts = {fact.email for fact in world.customers.values()} | {fact.name for fact in world.customers.values()}
    assert not any(fact in words.stdout + done.stdout for fact in facts if fact)


async def test_each_door_takes_only_what_its_own_endpoint_signed_and_nobody_is_alerted_of_the_twin(
    database_url: str, db: Connection, settings: MakeSettings, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    alerted: list[str] = []
    monkeypatch.setattr(alerts.Signatures, "refused", lambda self, reason, body: alerted.append(reason))
    rejected = telemetry.REJECTED.labels("signature_no_match")
    before = rejected._value.get()
    app = create_app(settings(STRIPE_SHADOW_WEBHOOK_SECRET=SHADOW_SECRET, KAMIYO_WORKER=False))
    async with running_client(app) as client:

        async def post(query: str, secret: str) -> tuple[int, str]:
            body = event_json()
            answer = await client.post(f"{PREFIX}/stripe{query}", content=body, headers=signed(body, secret))
            return answer.status_code, answer.json().get("detail") or answer.json()["message"]

        for query in ("?shadow=1", "?shadow=true", "?shadow", "?version=endive&shadow=1"):
            assert await post(query, SHADOW_SECRET) == (200, "Shadow event received"), query
            assert await post(query, SECRET) == (400, "Invalid signature"), query
        assert alerted == []
        assert rejected._value.get() == before
        for query in ("", "?shadow=0", "?version=endive"):
            assert await post(query, SECRET) == (200, "Event received"), query
            assert await post(query, SHADOW_SECRET) == (400, "Invalid signature"), query
        assert alerted == ["no_match"] * 3
        assert rejected._value.get() == before + 3

        body = b'{"id": "evt_1"}'
        answer = await client.post(SHADOW, content=body, headers=signed(body, SHADOW_SECRET))
        assert (answer.status_code, answer.json()) == (400, {"detail": "Invalid payload"})
    assert await db.fetchval("SELECT count(*) FROM webhook_shadow_events") == 4
    assert await db.fetchval("SELECT count(*) FROM webhook_events") == 3
    assert [line["reason"] for line in log() if line["event"] == "shadow_refused"] == [
        *["signature_no_match"] * 4,
        "payload",
    ]


async def test_without_a_secret_of_its_own_the_twins_door_is_shut(quiet_client: httpx.AsyncClient) -> None:
    body = event_json()
    answer = await quiet_client.post(SHADOW, content=body, headers=signed(body))
    assert (answer.status_code, answer.json()) == (503, {"detail": "Webhook secret not configured"})
    assert answer.headers["Retry-After"] == "60"


def test_one_secret_cannot_open_both_doors() -> None:
    one = "whsec_one"
    with pytest.raises(SettingsError, match=r"^STRIPE_SHADOW_WEBHOOK_SECRET: must be another") as refused:
        load_settings(STRIPE_WEBHOOK_SECRET=f"{one},whsec_two", STRIPE_SHADOW_WEBHOOK_SECRET=one, _env_file=None)
    assert one not in str(refused.value)


async def test_copies_that_come_at_once_are_kept_once(
    database_url: str, db: Connection, settings: MakeSettings
) -> None:
    pool = await database.open_pool(database_url, size=2, application="test", idle_limit=60)
    door = ShadowReceiver(pool, settings(STRIPE_SHADOW_WEBHOOK_SECRET=SHADOW_SECRET))
    bodies = [event_json(f"evt_{n % 20}") for n in range(60)]
    headers = [signed(body, SHADOW_SECRET)["Stripe-Signature"] for body in bodies]
    receipts = await asyncio.gather(*map(door.receive, bodies, headers))
    assert sorted(one.event_id for one in receipts) == sorted(f"evt_{n % 20}" for n in range(60))
    assert await db.fetchval("SELECT count(*) FROM webhook_shadow_events") == 20
    await pool.close()


async def test_what_is_older_than_seven_days_is_forgotten_by_the_maintenance_turn(
    database_url: str, db: Connection, settings: MakeSettings
) -> None:
    await shadow.put(db, [read(event_json("evt_old")), read(event_json("evt_new"))])
    await db.execute(
        "UPDATE webhook_shadow_events SET created_at = now() - $1::interval WHERE event_id = 'evt_old'",
        timedelta(days=KEPT_DAYS, minutes=1),
    )
    async with running_client(create_app(settings())):

        async def forgotten() -> bool:
            return bool(await db.fetchval("SELECT count(*) = 1 FROM webhook_shadow_events"))

        await until(forgotten)
    assert await db.fetchval("SELECT event_id FROM webhook_shadow_events") == "evt_new"


async def test_of_many_processes_each_forgets_what_no_other_is_just_forgetting(
    database_url: str, db: Connection
) -> None:
    await shadow.put(db, [read(event_json(f"evt_{number}")) for number in range(3)])
    await db.execute("UPDATE webhook_shadow_events SET created_at = now() - interval '8 days'")
    other = await database.connect(database_url, application="test other")
    # In the middle: it has the last of them, and comes to the others next.
    async with other.transaction():
        await other.execute("SELECT FROM webhook_shadow_events WHERE event_id = 'evt_2' FOR UPDATE")
        async with asyncio.timeout(DEADLINE):
            await shadow.prune(db)
        await other.execute("DELETE FROM webhook_shadow_events")
    await other.close()
    assert await db.fetchval("SELECT count(*) FROM webhook_shadow_events") == 0


# ── Pairs ───────────────────────────────────────────────────────────────────────────────────────────────────


async def keep(db: Connection, real: list[bytes], twins: list[bytes]) -> None:
    await inbox.put(db, [read(body) for body in real])
    await shadow.put(db, [read(body) for body in twins])


async def test_twins_of_one_second_are_told_apart_by_request_and_then_by_what_they_say(
    db: Connection, report: Report
) -> None:
    def said(event_id: str, name: str, request: str | None, **more: Any) -> bytes:
        shown = example("customer", id="cus_1", name=name)
        return event_json(event_id, "customer.updated", shown, created=NOW, request={"id": request}, **more)

    names = ["Ada", "Bo", "Cy", "Di"]
    real = [said(f"evt_{name}", name, None) for name in names]
    twins = [said(f"evt_twin_{name}", name, None, api_version=OLD) for name in reversed(names)]
    # By the request these two are pairs, whatever they say.
    real += [said("evt_x", "Ada", "req_x"), said("evt_y", "Bo", "req_y")]
    twins += [said("evt_twin_x", "Bo", "req_x"), said("evt_twin_y", "Ada", "req_y")]
    # Stripe does not say that ids differ; the same id would be the same event.
    real.append(said("evt_same", "Ed", "req_z"))
    twins.append(said("evt_same", "Fa", None))
    # Of no object at all.
    upcoming = example("invoice")
    del upcoming["id"]
    real.append(event_json("evt_up", "invoice.upcoming", upcoming, created=int(time.time())))
    twins.append(event_json("evt_twin_up", "invoice.upcoming", upcoming, created=int(time.time())))
    await keep(db, real, twins)

    done = await report("--json", "--grace", "0")
    types = json.loads(done.stdout)["types"]
    assert {name: (one["pairs"], one["alike"]) for name, one in types.items()} == {
        "customer.updated": (7, 4),
        "invoice.upcoming": (1, 1),
    }
    assert types["customer.updated"]["fields"]["billing.customers.name"] == {
        "agree": 4,
        "differ": 3,
        "examples": ["evt_same evt_same", "evt_x evt_twin_x", "evt_y evt_twin_y"],
    }
    assert done.exit_code == 1


async def test_the_report_ends_well_only_where_something_was_compared_and_nothing_differs(
    db: Connection, report: Report
) -> None:
    nothing = await report()
    assert nothing.exit_code == 2
    assert "?shadow=1" in nothing.stdout

    world = World(4, start=int(time.time()) + 5)
    events = STORIES["churn"](world)
    await keep(db, [event.body(OLD) for event in events], [twin(event) for event in events])
    done = await report("--grace", "0")
    assert (done.exit_code, f"{len(events)} pairs" in done.stdout) == (0, True), done.stdout
    handlers.on("invoice.paid")(noop)
    assert (await report("--grace", "0")).exit_code == 0
    strict = await report("--grace", "0", "--strict")
    assert strict.exit_code == 1
    assert "subscription: gone" in strict.stdout

    # An event whose twin has not come: not missing while it may be on its way.
    await inbox.put(db, [read(event_json("evt_late", "customer.created", created=int(time.time()) + 60))])
    assert (await report()).exit_code == 0
    late = await report("--grace", "0")
    assert late.exit_code == 1
    assert "evt_late" in late.stdout


async def test_where_no_pair_could_be_compared_the_report_says_so_and_does_not_end_well(
    db: Connection, report: Report
) -> None:
    shown = example("customer", id="cus_1")
    real, other = (event_json(event_id, "customer.updated", shown, created=NOW) for event_id in ("evt_1", "evt_2"))
    await keep(db, [real], [other])
    assert (await report("--grace", "0")).exit_code == 0
    await db.execute("DELETE FROM webhook_payloads")  # retention
    done = await report("--grace", "0")
    assert done.exit_code == 1
    assert "Not compared" in done.stdout and "it cannot be told yet" in done.stdout


async def test_names_of_the_users_own_are_never_told_as_fields(db: Connection, report: Report) -> None:
    ada = example("customer", metadata={"ada@example.com": "1"})
    bo = {**ada, "metadata": {"bo@example.com": "1"}, "Ada Lovelace": 1}
    await keep(
        db,
        [event_json("evt_1", "customer.updated", ada, created=NOW)],
        [event_json("evt_2", "customer.updated", bo, created=NOW)],
    )
    said = (await report("--json", "--grace", "0")).stdout
    [compared] = json.loads(said)["types"].values()
    assert {(one["what"], one["path"]) for one in compared["shape"]} == {("value", "metadata"), ("new", "*")}
    assert "example.com" not in said and "Lovelace" not in said


async def test_a_twin_that_stripe_lists_is_not_taken_in_as_an_event_that_was_missed(
    db: Connection, database_url: str, settings: MakeSettings
) -> None:
    event = World(1, start=int(time.time()) - 3600)
    event.create_customer()
    [created] = event.events
    async with stripe_server() as stripe:
        stripe.events = [json.loads(twin(created))]
        await shadow.put(db, [read(twin(created))])
        pool = await database.open_pool(database_url, size=4, application="test", idle_limit=60)
        api = StripeApi(pool, settings(STRIPE_SECRET_KEY=KEY, STRIPE_API_BASE=stripe.base))
        assert await reconcile(pool, api, since=int(time.time()) - 7200) == Compared(1, 0, 0)
        await api.close()
        await pool.close()


@pytest.mark.parametrize(
    ("query", "expected"),
    [(b"", False), (b"shadow=0", False), (b"shadows=1", False), (b"shadow=1", True), (b"a=b&shadow", True)],
)
def test_a_query_names_the_twin_unless_it_says_0(query: bytes, expected: bool) -> None:
    assert is_shadow(query) is expected
