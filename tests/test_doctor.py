"""Stories of the doctor: what it says of a sound installation, and of one with each thing wrong."""

import asyncio
import contextlib
import json
import re
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import typer
from fastapi import FastAPI, Response
from typer.testing import CliRunner
from uvicorn import Config, Server

from kamiyo import database, doctor, handlers
from kamiyo.cli.doctor import doctor as command
from kamiyo.database import Connection
from kamiyo.doctor import (
    Finding,
    Subject,
    Verdict,
    channels,
    configuration,
    endpoints,
    examination,
    finding,
    postgresql,
    processing,
)
from kamiyo.doctor.processing import unread
from kamiyo.handlers import Registry
from kamiyo.postgres import temporary_postgres
from kamiyo.settings import Settings
from kamiyo.web import create_app
from tests.conftest import (
    MakeSettings,
    NewDatabase,
    Served,
    days_ahead_missing,
    deliver,
    event_json,
    noop,
    run_apart,
    running_client,
    serving,
    settings_for,
    settled,
    until,
    with_database,
)
from tests.stripe_server import KEY, StripeServer, stripe_server
from tests.test_alerts import Channel

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:apprise")

GOOD_SECRET = "whsec_" + "0123456789abcdef" * 2
OTHER_SECRET = "whsec_" + "fedcba9876543210" * 2
GOOD_ADMIN_KEY = "0f1e2d3c4b5a69788796a5b4c3d2e1f0"
NOWHERE = "http://127.0.0.1:1"
ENDPOINT = "https://api.example.com/api/v1/webhooks/stripe"

pass_, warn, fail = Verdict.passed, Verdict.warning, Verdict.failed


def verdicts(findings: list[Finding]) -> dict[str, Verdict]:
    return {finding.check: finding.verdict for finding in findings}


def of(findings: list[Finding], check: str) -> Finding:
    [finding] = [one for one in findings if one.check == check]
    return finding


# ── Settings ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "check", "verdict", "words"),
    [
        ({"STRIPE_WEBHOOK_SECRET": ""}, "signing secret", fail, "not set"),
        ({"STRIPE_WEBHOOK_SECRET": "sk_test_" + "a" * 40}, "signing secret", fail, "API key"),
        ({"STRIPE_WEBHOOK_SECRET": "we_1abc"}, "signing secret", fail, "id"),
        ({"STRIPE_WEBHOOK_SECRET": "whsec_..."}, "signing secret", fail, "placeholder"),
        ({"STRIPE_WEBHOOK_SECRET": "whsec_short"}, "signing secret", fail, "too short"),
        ({"STRIPE_WEBHOOK_SECRET": f'"{GOOD_SECRET}"'}, "signing secret", fail, "begin"),
        ({"STRIPE_WEBHOOK_SECRET": f"{GOOD_SECRET},{GOOD_SECRET}"}, "signing secret", warn, "twice"),
        ({"STRIPE_WEBHOOK_SECRET": f"{GOOD_SECRET},{OTHER_SECRET}"}, "signing secret", pass_, "2 secrets"),
        ({"ADMIN_API_KEY": ""}, "admin key", fail, "not set"),
        ({"ADMIN_API_KEY": "your_secure_admin_key_here"}, "admin key", fail, "placeholder"),
        ({"ADMIN_API_KEY": "a" * 64}, "admin key", fail, "guessed"),
        ({"ADMIN_API_KEY": "hunter2"}, "admin key", fail, "guessed"),
        ({"ADMIN_API_KEY": GOOD_SECRET}, "admin key", fail, "same"),
        ({"STRIPE_SECRET_KEY": ""}, "stripe key", warn, "not set"),
        ({"STRIPE_SECRET_KEY": "pk_live_" + "a" * 24}, "stripe key", fail, "publishable"),
        ({"STRIPE_SECRET_KEY": "nonsense"}, "stripe key", fail, "look like"),
        ({"STRIPE_SECRET_KEY": "sk_test_" + "a" * 24}, "stripe key", warn, "test key"),
        ({"STRIPE_SECRET_KEY": "rk_live_" + "a" * 24}, "stripe key", pass_, "restricted key of live"),
        (
            {"STRIPE_SECRET_KEY": "sk_live_" + "a" * 24, "STRIPE_PUBLISHABLE_KEY": "pk_test_1"},
            "stripe key",
            fail,
            "is not",
        ),
        ({"KAMIYO_LOG_LEVEL": "error"}, "logs", warn, "error"),
        ({"KAMIYO_LOG_LEVEL": "info"}, "logs", pass_, "level error"),
        ({"KAMIYO_LOG_LEVEL": "info", "KAMIYO_LOG_FORMAT": "console"}, "logs", warn, "collector"),
    ],
)
def test_each_setting_gets_its_verdict_and_what_is_wrong_gets_a_sentence_that_mends_it(
    changes: dict[str, str], check: str, verdict: Verdict, words: str
) -> None:
    good = {"STRIPE_WEBHOOK_SECRET": GOOD_SECRET, "ADMIN_API_KEY": GOOD_ADMIN_KEY}
    settings = settings_for(None, **{**good, **changes})
    finding = of([*configuration.secrets(settings), *configuration.logs(settings)], check)
    assert (finding.verdict, words in finding.seen) == (verdict, True), finding
    assert bool(finding.mend) == (verdict is not pass_)


def test_a_handler_for_a_type_that_stripe_does_not_have_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handlers, "registry", Registry())

    async def handler(event: object, _: Connection) -> None: ...

    handlers.registry.on("v1.invoice.paid", "v2.core.account.updated")(handler)
    assert configuration.own_handlers(settings_for(None)).verdict is pass_
    handlers.registry.on("invoice.payd")(handler)
    told = configuration.own_handlers(settings_for(None))
    assert told.verdict is warn and "invoice.payd" in told.seen and told.mend == "Did you mean invoice.paid?"


def test_a_variable_that_is_almost_a_setting_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KAMIYO_WORKER", raising=False)
    monkeypatch.setenv("KAMIYO_WORKERS", "2")
    [told] = configuration.slips(settings_for("postgresql://h/d"))
    assert told.verdict is warn and "KAMIYO_WORKERS" in told.seen and "KAMIYO_WORKER is one" in told.seen


def test_production_without_a_database_of_its_own_is_told() -> None:
    [told] = configuration.slips(settings_for(None))
    assert told.verdict is warn and "embedded PostgreSQL" in told.seen and told.mend.startswith("Set DATABASE_URL")
    assert list(configuration.slips(settings_for(None, KAMIYO_ENV="development"))) == []


def test_a_name_that_the_mirror_will_never_meet_is_told() -> None:
    assert list(configuration.mirrored(settings_for(None))) == []
    [kept] = configuration.mirrored(settings_for(None, KAMIYO_MIRROR="charge, charge.refunded,refund"))
    assert (kept.verdict, kept.seen) == (pass_, "stripe_objects keeps charge, charge.refunded, refund")
    [nonsense, typo] = configuration.mirrored(settings_for(None, KAMIYO_MIRROR="charges,refund,0"))
    assert (nonsense.verdict, typo.verdict, typo.mend) == (warn, warn, "Did you mean charge?")


@pytest.mark.parametrize(("mode", "verdict"), [(0o600, pass_), (0o640, warn), (0o644, warn)])
def test_a_settings_file_that_others_can_read_is_told(tmp_path: Path, mode: int, verdict: Verdict) -> None:
    path = tmp_path / ".env"
    assert list(configuration.env_file(path)) == []
    path.touch()
    path.chmod(mode)
    assert [finding.verdict for finding in configuration.env_file(path)] == [verdict]


# ── The database ────────────────────────────────────────────────────────────────────────────────────────────────


async def look(settings: Settings, url: str | None, **more: Any) -> list[Finding]:
    return await doctor.examine(Subject(settings, url, **{"server": NOWHERE, **more}))


@pytest.mark.parametrize(
    ("number", "read_only", "verdict"), [(130013, False, fail), (140000, False, pass_), (180000, True, fail)]
)
def test_postgresql_is_14_or_newer_and_takes_writes(number: int, read_only: bool, verdict: Verdict) -> None:
    assert postgresql.database_server(number, "x", read_only=read_only).verdict is verdict


def test_what_is_not_durable_is_told_by_name() -> None:
    assert postgresql.durability(fsync=True, full_pages=True, commit="on").verdict is pass_
    finding = postgresql.durability(fsync=False, full_pages=True, commit="off")
    assert finding.verdict is fail and "fsync and synchronous_commit" in finding.seen


@pytest.mark.parametrize(
    ("number", "compression", "verdict", "instead"),
    [
        (140000, "on", warn, "= off"),
        (170000, "pglz", warn, "= lz4"),
        (170000, "lz4", pass_, ""),
        (180000, "off", pass_, ""),
    ],
)
def test_pglz_in_the_wal_is_told_with_what_is_better(
    number: int, compression: str, verdict: Verdict, instead: str
) -> None:
    finding = postgresql.wal(number, compression)
    assert finding.verdict is verdict and instead in finding.mend


@pytest.mark.parametrize(("ahead", "verdict"), [(1.0, pass_), (-1.0, pass_), (3.0, fail), (-400.0, fail)])
def test_a_clock_that_is_off_is_told(ahead: float, verdict: Verdict) -> None:
    assert postgresql.clock("the database's", ahead, 2.0).verdict is verdict


async def test_a_server_without_fsync_fails_and_a_default_one_passes(database_url: str, settings: MakeSettings) -> None:
    # The tests' own server has fsync off, unless they were given one.
    off = await asyncpg.connect(database_url)
    said = await off.fetchval("SHOW fsync")
    await off.close()
    found = await look(settings(), database_url)
    assert of(found, "durability").verdict is (fail if said == "off" else pass_)


async def test_an_event_that_came_while_the_triggers_were_off_is_told_with_what_to_do(
    database_url: str, db: Connection, settings: MakeSettings
) -> None:
    await db.execute(
        "ALTER TABLE webhook_events DISABLE TRIGGER USER; "
        "INSERT INTO webhook_events (event_id, event_type, stripe_created, lane, next_try_at) "
        "VALUES ('evt_1', 'invoice.paid', now(), 1, now()); "
        "ALTER TABLE webhook_events ENABLE TRIGGER USER; "
        # What is counted of a database filled so is wrong as well; here the counts are right, and the queue is not.
        "SELECT webhook_recount(); DELETE FROM webhook_unfinished"
    )
    finding = of(await look(settings(), database_url), "events")
    assert finding.verdict is fail and "1 are not finished, and workers know of 0" in finding.seen
    await db.execute("SELECT webhook_recount()")
    assert of(await look(settings(), database_url), "events").verdict is not fail


async def test_without_a_database_it_says_so_and_goes_on(settings: MakeSettings) -> None:
    found = await look(settings(DATABASE_URL=None), None)
    assert of(found, "database").verdict is fail and "not set" in of(found, "database").seen
    assert of(found, "health").verdict is fail


async def test_a_database_that_is_away_is_told_without_its_password(settings: MakeSettings) -> None:
    away, not_one = "postgresql://me:hidden-pass@127.0.0.1:1/x", "postgresql://me:hidden/pass@127.0.0.1/x"
    for url, given in ((away, settings(DATABASE_URL=away)), (not_one, settings())):
        found = await look(given, url)
        assert of(found, "database").verdict is fail
        assert "hidden" not in str(found)


async def test_missing_migrations_are_named_and_not_run(new_database: NewDatabase, settings: MakeSettings) -> None:
    url = new_database(migrated=False)
    found = await look(settings(STRIPE_SECRET_KEY=KEY, STRIPE_API_BASE=NOWHERE), url)
    migrations = of(found, "migrations")
    assert migrations.verdict is fail and "004_webhook_tables" in migrations.seen
    assert migrations.mend == "Run: kamiyo migrate"
    assert of(found, "stripe").verdict is warn
    db = await asyncpg.connect(url)
    assert await db.fetchval("SELECT to_regclass('webhook_events')") is None
    await db.close()


async def test_a_role_that_lacks_a_right_fails_and_a_superuser_is_warned_of(
    db: Connection, database_url: str, settings: MakeSettings
) -> None:
    found = await look(settings(), database_url)
    assert of(found, "role").verdict is warn and "superuser" in of(found, "role").seen

    await db.execute("DROP ROLE IF EXISTS kamiyo_doctor_story")
    await db.execute("CREATE ROLE kamiyo_doctor_story LOGIN PASSWORD 'p-of-the-story'")
    try:
        await db.execute(
            "GRANT USAGE ON SCHEMA billing TO kamiyo_doctor_story;"
            "GRANT ALL ON ALL TABLES IN SCHEMA public, billing TO kamiyo_doctor_story;"
            "REVOKE DELETE ON webhook_failures FROM kamiyo_doctor_story;"
        )
        await db.execute("SET ROLE kamiyo_doctor_story")
        finding = await postgresql.role(db, settings())
        assert finding.verdict is fail and "webhook_failures" in finding.seen, finding
        await db.execute("RESET ROLE; GRANT DELETE ON webhook_failures TO kamiyo_doctor_story")
        await db.execute("SET ROLE kamiyo_doctor_story")
        assert (await postgresql.role(db, settings())).verdict is warn  # not the owner, and migrates by itself
        assert (await postgresql.role(db, settings(KAMIYO_AUTO_MIGRATE=False))).verdict is pass_
    finally:
        await db.execute("RESET ROLE; DROP OWNED BY kamiyo_doctor_story; DROP ROLE kamiyo_doctor_story")


async def test_failures_are_told_by_their_cause(db: Connection, database_url: str, settings: MakeSettings) -> None:
    registry = handlers.registry

    @registry.on("charge.succeeded")
    async def broken(event: object, _: Connection) -> None:
        raise handlers.Bury("no such order")

    async with running_client(create_app(settings())) as client:
        answer = await deliver(client, event_json(event_type="charge.succeeded"))
        await settled(db, answer.json()["event_id"], "failed")
        # It works on a session of its own, and listens on another.
        await until(lambda: db.fetchval(processing._SQL["workers"]))
        found = await look(settings(), database_url)
    assert of(found, "failures").verdict is fail
    assert "Bury (" in of(found, "failures").seen and "1 dead" in of(found, "failures").seen
    assert of(found, "events").verdict is warn  # none was processed yet
    assert of(found, "workers").verdict is pass_


async def test_events_that_wait_with_no_worker_are_told(
    quiet_client: Any, db: Connection, database_url: str, settings: MakeSettings
) -> None:
    handlers.registry.on("charge.succeeded")(noop)
    await deliver(quiet_client, event_json(event_type="charge.succeeded"))
    await db.execute("UPDATE webhook_events SET next_try_at = now() - interval '10 minutes'")
    found = await look(settings(KAMIYO_WORKER=False), database_url)
    assert (of(found, "workers").verdict, of(found, "events").verdict) == (fail, fail), of(found, "events")


async def test_workers_that_do_not_make_the_days_ahead_are_told(db: Connection, database_url: str) -> None:
    async with database.listening(database_url, lambda: None):
        assert (await processing.workers(db)).verdict is pass_
        async with days_ahead_missing(db):
            late = await processing.workers(db)
    assert late.verdict is fail and "room for 5 days more" in late.seen and "worker_failed" in late.mend


async def test_how_asking_stripe_goes_is_told(db: Connection, database_url: str, settings: MakeSettings) -> None:
    async def reads() -> Any:
        return await unread(db, settings(STRIPE_SECRET_KEY=KEY))

    assert of(await look(settings(), database_url), "reads").verdict is pass_
    await db.execute("INSERT INTO webhook_api_budget DEFAULT VALUES ON CONFLICT DO NOTHING")
    await db.execute(
        "UPDATE webhook_api_budget SET refusals = 3, opened_at = now() - interval '90 seconds', "
        "open_until = now() + interval '1 hour'"
    )
    found = await reads()
    assert found.verdict is warn and re.search(r"for (9|10)\d seconds", found.seen), found
    await db.execute("UPDATE webhook_api_budget SET open_until = now() - interval '6 minutes'")
    assert (await reads()).verdict is pass_, "nobody has asked since"
    await db.execute(
        "UPDATE webhook_api_budget SET refused_at = now(), refused_last_at = now(), "
        "refused_what = 'GET /v1/invoices (403)', refusals = 0, open_until = NULL"
    )
    found = await reads()
    assert found.verdict is fail and "GET /v1/invoices (403)" in found.seen
    await db.execute("UPDATE webhook_api_budget SET refused_last_at = now() - interval '2 hours', opened_at = NULL")
    assert (await reads()).verdict is pass_


# ── A running server ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def sound(database_url: str) -> Iterator[Served]:
    """A server with a good secret and a good key."""
    with serving(database_url, STRIPE_WEBHOOK_SECRET=GOOD_SECRET, ADMIN_API_KEY=GOOD_ADMIN_KEY) as served:
        run_apart(_a_worker_listens(database_url))
        yield served


async def _a_worker_listens(url: str) -> None:
    # A server answers a moment before its worker has a session of its own.
    connection = await asyncpg.connect(url)
    try:
        await until(lambda: connection.fetchval(database.load_queries("doctor.sql")["workers"]))
    finally:
        await connection.close()


async def test_a_sound_server_passes_from_outside_and_nothing_is_stored(
    sound: Served, db: Connection, database_url: str, settings: MakeSettings
) -> None:
    mine = settings(STRIPE_WEBHOOK_SECRET=GOOD_SECRET, KAMIYO_ENV="development")
    url = f"{sound.url}/api/v1/webhooks/stripe"
    await until(
        lambda: db.fetchval(processing._SQL["workers"])
    )  # its worker connects by itself, a moment after its start
    found = await look(mine, database_url, server=sound.url, endpoint=url)
    expected = {"health", "metrics", "signature", "endpoint", "migrations", "workers", "clock", "failures"}
    assert {name for name, verdict in verdicts(found).items() if verdict is pass_} >= expected, found
    stored = "SELECT (SELECT count(*) FROM webhook_events) + (SELECT count(*) FROM webhook_payloads)"
    assert await db.fetchval(stored) == 0


async def test_a_secret_that_the_server_does_not_have_is_told_by_its_number_alone(
    sound: Served, database_url: str, settings: MakeSettings
) -> None:
    mine = settings(STRIPE_WEBHOOK_SECRET=f"{GOOD_SECRET},{OTHER_SECRET}")
    found = await look(mine, database_url, server=sound.url)
    assert of(found, "signature").verdict is fail and "number 2" in of(found, "signature").seen
    # The refusal was counted, so the next look sees it in the metrics.
    again = await look(mine, database_url, server=sound.url)
    assert of(again, "metrics").verdict is warn and "signature_no_match" in of(again, "metrics").seen
    assert OTHER_SECRET not in str(again)


@contextlib.asynccontextmanager
async def pretending(answer: Response) -> AsyncIterator[str]:
    """Something else than Kamiyo at an address: it gives `answer` to every request."""
    app = FastAPI()

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def any_path() -> Response:
        return answer

    door = socket.create_server(("127.0.0.1", 0))
    server = Server(Config(app, log_level="error", lifespan="off"))
    running = asyncio.create_task(server.serve(sockets=[door]))
    try:
        yield f"http://127.0.0.1:{door.getsockname()[1]}"
    finally:
        server.should_exit = True
        await running


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Response(status_code=307, headers={"Location": "/elsewhere"}), "no redirects"),
        (Response(status_code=401), "without a login"),
        (Response(status_code=403), "CSRF"),
        (Response(status_code=404), "/api/v1/webhooks/stripe"),
        (Response('{"detail":"Missing Stripe signature header"}', 400), "pass the header"),
        (Response("welcome", 200), "else than Kamiyo"),
    ],
)
async def test_whatever_stands_before_the_server_is_told(
    answer: Response, words: str, database_url: str, settings: MakeSettings
) -> None:
    async with pretending(answer) as url:
        mine = settings(STRIPE_WEBHOOK_SECRET=GOOD_SECRET, KAMIYO_ENV="development")
        found = await look(mine, database_url, server=url, endpoint=f"{url}/api/v1/webhooks/stripe")
    finding = of(found, "endpoint")
    assert finding.verdict is fail and words in finding.mend, finding
    assert of(found, "health").verdict is fail
    assert of(found, "metrics").verdict is fail


async def test_an_endpoint_that_is_not_https_fails_untried(database_url: str, settings: MakeSettings) -> None:
    found = await look(settings(), database_url, endpoint="http://user:word@api.example.com/api/v1/webhooks/stripe?k=v")
    finding = of(found, "endpoint")
    assert finding.verdict is fail and "not HTTPS" in finding.seen
    assert "word" not in finding.seen and "k=v" not in finding.seen


# ── Whom to tell ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def channel() -> AsyncIterator[Channel]:
    told = Channel()
    server = await asyncio.start_server(told.serve, "127.0.0.1", 0)
    told.port = server.sockets[0].getsockname()[1]
    async with server:
        yield told


async def test_nobody_to_tell_is_a_warning(settings: MakeSettings) -> None:
    [finding] = await channels.alerts(settings(), send_test=True)
    assert finding.verdict is warn


async def test_a_test_message_is_sent_only_when_asked_for(channel: Channel, settings: MakeSettings) -> None:
    mine = settings(ALERT_URLS=channel.url)
    [finding] = await channels.alerts(mine, send_test=False)
    assert (finding.verdict, channel.heard) == (pass_, [])
    [finding] = await channels.alerts(mine, send_test=True)
    assert (finding.verdict, channel.titles()) == (pass_, ["Kamiyo: a test"])


async def test_a_channel_that_refuses_or_is_none_fails_without_its_address(
    channel: Channel, settings: MakeSettings
) -> None:
    channel.answers = 500
    found = await channels.alerts(settings(ALERT_URLS=f"{channel.url} nonsense://secret-token"), send_test=True)
    assert [finding.verdict for finding in found] == [fail, fail]
    assert "token" not in str(found)


# ── What Stripe knows ───────────────────────────────────────────────────────────────────────────────────────────


def endpoint(**changes: Any) -> dict[str, Any]:
    """A webhook endpoint as Stripe's API words it."""
    return {
        "id": "we_1",
        "object": "webhook_endpoint",
        "api_version": "2026-10-28.endive",
        "enabled_events": ["*"],
        "livemode": False,
        "status": "enabled",
        "url": ENDPOINT,
        **changes,
    }


@pytest.mark.parametrize(
    ("known", "verdict", "words"),
    [
        ([endpoint()], pass_, "sends all events"),
        ([endpoint(enabled_events=list(handlers.GUIDE_TYPES))], pass_, "10 event types"),
        ([endpoint(enabled_events=list(handlers.GUIDE_TYPES[1:]))], fail, "customer.created"),
        ([endpoint(status="disabled")], fail, "disabled"),
        ([endpoint(url=ENDPOINT.replace("https", "http"))], fail, "not HTTPS"),
        ([endpoint(url=f"{ENDPOINT}/")], pass_, "sends all events"),
        ([endpoint(url="https://elsewhere.example.com/hook")], fail, "1 endpoint in test mode"),
        ([], fail, "0 endpoints"),
        ([endpoint(api_version=None)], warn, "default"),
        ([endpoint(api_version="2027-03-31.fern")], warn, "newer"),
        ([endpoint(api_version="2024-06-20")], pass_, "2024-06-20"),
        ([endpoint(), endpoint(id="we_2")], fail, "2 enabled endpoints"),
    ],
)
async def test_the_endpoints_that_stripe_knows_are_compared(
    known: list[dict[str, Any]], verdict: Verdict, words: str, database_url: str, settings: MakeSettings
) -> None:
    async with stripe_server() as stripe:
        stripe.endpoints = known
        found = await asked(stripe, database_url, settings)
    worst = max((f.verdict for f in found), key=[pass_, warn, fail].index)
    assert worst is verdict, found
    assert any(words in finding.seen for finding in found), found
    assert of(found, "stripe clock").verdict is pass_


async def asked(
    stripe: StripeServer, url: str, settings: MakeSettings, key: str = KEY, **changes: Any
) -> list[Finding]:
    pool = await database.open_pool(url, size=2, application="doctor", idle_limit=60)
    mine = settings(STRIPE_SECRET_KEY=key, STRIPE_API_BASE=stripe.base, KAMIYO_STRIPE_API_RATE=100, **changes)
    # An address given to nobody: what Stripe knows is compared with it, not asked.
    where = "" if stripe.endpoints and "elsewhere" not in stripe.endpoints[0]["url"] else ENDPOINT
    try:
        return await endpoints.stripe(Subject(mine, url, NOWHERE, where), pool)
    finally:
        await pool.close()


async def test_a_type_that_only_a_handler_of_ones_own_takes_must_be_sent_too(
    database_url: str, settings: MakeSettings
) -> None:
    handlers.registry.on("charge.refunded")(noop)
    async with stripe_server() as stripe:
        stripe.endpoints = [endpoint(enabled_events=list(handlers.GUIDE_TYPES))]
        found = await asked(stripe, database_url, settings)
    assert "charge.refunded" in of(found, "endpoint we_1").seen


async def test_a_twin_endpoint_is_none_of_those_that_deliver_events_and_needs_its_own_secret(
    database_url: str, settings: MakeSettings
) -> None:
    async with stripe_server() as stripe:
        real = endpoint()
        stripe.endpoints = [real, endpoint(id="we_twin", url=f"{real['url']}?shadow=1")]
        found = await asked(stripe, database_url, settings)
        assert {one.check for one in found} >= {"endpoint we_1", "twin endpoint"}
        assert of(found, "twin endpoint").verdict is warn
        assert not any("we_twin" in one.check or one.check == "stripe endpoints" for one in found)
        found = await asked(stripe, database_url, settings, STRIPE_SHADOW_WEBHOOK_SECRET="whsec_of_the_twin")
        assert not any(one.check == "twin endpoint" for one in found)


async def test_all_pages_of_endpoints_are_read(database_url: str, settings: MakeSettings) -> None:
    async with stripe_server() as stripe:
        others = [endpoint(id=f"we_x{n}", url=f"https://x.example.com/{n}") for n in range(100)]
        stripe.endpoints = [*others, endpoint()]
        found = await asked(stripe, database_url, settings)
    assert of(found, "endpoint we_1").verdict is pass_


async def test_a_key_that_stripe_refuses_fails_and_is_not_shown(database_url: str, settings: MakeSettings) -> None:
    async with stripe_server() as stripe:
        found = await asked(stripe, database_url, settings, key="sk_test_wrong_one")
    assert of(found, "stripe").verdict is fail
    assert "wrong_one" not in str(found)


# ── As a command ────────────────────────────────────────────────────────────────────────────────────────────────


def run(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, list(arguments))
    return done.exit_code, done.output


def test_the_command_speaks_json_and_its_status_says_whether_something_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with temporary_postgres() as server:
        url = with_database(server.url, "kamiyo_doctor")
        run_apart(_prepare(server.url, url))
        good = {"STRIPE_WEBHOOK_SECRET": GOOD_SECRET, "ADMIN_API_KEY": GOOD_ADMIN_KEY, "DATABASE_URL": url}
        for name, value in {**good, "KAMIYO_ENV": "development"}.items():
            monkeypatch.setenv(name, value)
        with serving(url, STRIPE_WEBHOOK_SECRET=GOOD_SECRET, ADMIN_API_KEY=GOOD_ADMIN_KEY) as served:
            run_apart(_a_worker_listens(url))
            public = f"{served.url}/api/v1/webhooks/stripe"
            status, said = run("--json", "--url", served.url, "--endpoint", public)
            findings = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
            assert status == 0, said
            assert {f["check"] for f in findings} >= {"durability", "migrations", "health", "endpoint", "events"}
            assert not [finding for finding in findings if finding["verdict"] == "fail"]
            assert [bool(f["mend"]) for f in findings] == [f["verdict"] != "pass" for f in findings]
            assert run("--strict", "--url", served.url)[0] == 1
        status, said = run("--url", served.url)
        assert status == 1 and "Start `kamiyo serve`" in said
        for value in (GOOD_SECRET, GOOD_ADMIN_KEY):
            assert value not in said


async def _prepare(server: str, url: str) -> None:
    first = await asyncpg.connect(server)
    await first.execute("CREATE DATABASE kamiyo_doctor")
    await first.close()
    db = await database.connect(url, application="tests")
    await database.migrate(db)
    await db.close()


def test_a_look_makes_no_database_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()
    status, said = run("--url", NOWHERE)
    assert status == 1 and "no embedded PostgreSQL yet" in said
    assert not (tmp_path / ".kamiyo").exists() and time.monotonic() - began < 20


def test_what_others_say_is_cleaned_of_secrets(settings: MakeSettings) -> None:
    mine = settings(
        STRIPE_WEBHOOK_SECRET=GOOD_SECRET,
        STRIPE_SECRET_KEY="sk_live_abcdef",
        ALERT_URLS="discord://id/token",
        DATABASE_URL="postgresql://me:p%40ss-word@h/x",
    )
    words = f"{GOOD_SECRET} sk_live_abcdef discord://id/token p%40ss-word p@ss-word"
    clean = examination.without_secrets(finding.failed("x", words, words), Subject(mine, None, NOWHERE))
    assert clean.seen == clean.mend == "••• ••• ••• ••• •••"
