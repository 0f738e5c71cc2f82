"""Stories of the kit for users' tests: what a sound handler passes, what an unsound one is told, what it refuses."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest
import stripe
from fastapi import FastAPI

from kamiyo import Connection, Event, Retry, handlers
from kamiyo.database import load_queries
from kamiyo.settings import load_settings
from kamiyo.testing import SECRET, Database, KitError, assert_exactly_once, deliver, signed, stories
from kamiyo.web import create_app
from tests.conftest import DEADLINE, ROOT, settings_for
from tests.docs.conftest import blocks

PAGE = ROOT / "docs" / "testing.md"

EFFECTS = "SELECT stripe_customer, credits FROM accounts"


@pytest.fixture(scope="session")
def kamiyo_postgres(postgres: str) -> str:
    """The server that serves all of this project's tests: one is enough."""
    return postgres


@pytest.fixture(scope="session")
def kamiyo_schema() -> list[object]:
    """What makes emptying tables hard: foreign keys in a circle, a trigger, rows that are always there."""

    def by_a_program(url: str) -> None:
        async def run() -> None:
            db = await asyncpg.connect(url)
            await db.execute("INSERT INTO plans VALUES ('gold')")
            await db.close()

        asyncio.run(run())

    return [
        """
        CREATE TABLE plans (name text PRIMARY KEY, first_account text);
        CREATE TABLE accounts (
            number integer GENERATED ALWAYS AS IDENTITY,
            stripe_customer text PRIMARY KEY,
            plan text NOT NULL DEFAULT 'gold' REFERENCES plans,
            credits integer NOT NULL DEFAULT 0,
            doubled integer GENERATED ALWAYS AS (credits * 2) STORED
        );
        ALTER TABLE plans ADD FOREIGN KEY (first_account) REFERENCES accounts;
        CREATE TABLE goodbyes (stripe_customer text);
        CREATE FUNCTION say_goodbye() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN INSERT INTO goodbyes VALUES (OLD.stripe_customer); RETURN OLD; END $$;
        CREATE TRIGGER goodbye AFTER DELETE ON accounts FOR EACH ROW EXECUTE FUNCTION say_goodbye();
        """,
        by_a_program,
    ]


@pytest.fixture
def application(kamiyo_database: Database) -> FastAPI:
    """The Kamiyo API with the settings of the environment, as the fixture has set it."""
    return create_app()


def open_account(database: Database, story: stories.Story) -> None:
    database.execute("INSERT INTO accounts (stripe_customer) VALUES ($1)", story.customer)


async def grant(event: Event, db: Connection) -> None:
    await db.execute("UPDATE accounts SET credits = credits + 100 WHERE stripe_customer = $1", event.customer)


# ── Exactly once ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_sound_handler_passes_and_leaves_the_effects_of_one_day(
    kamiyo_database: Database, application: FastAPI
) -> None:
    handlers.on("invoice.paid")(grant)
    story = stories.dunning(seed=1)
    open_account(kamiyo_database, story)
    tries: list[int] = []

    @handlers.on("invoice.paid")
    async def count(event: Event, db: Connection) -> None:
        tries.append(event.attempt)

    assert_exactly_once(application, story, EFFECTS, shuffles=1)

    assert kamiyo_database.fetch(EFFECTS) == [(story.customer, 200)]
    # On each of four days both invoices' handlers ran; on the last one they also died once each.
    assert len(tries) >= 4 * 2 + 2


async def with_a_connection_of_its_own(event: Event, db: Connection) -> None:
    other = await asyncpg.connect(os.environ["DATABASE_URL"])
    await grant(event, other)
    await other.close()


async def by_the_last_that_came(event: Event, db: Connection) -> None:
    await db.execute(
        "UPDATE accounts SET credits = $2 WHERE stripe_customer = $1", event.customer, event.object["attempt_count"]
    )


async def twice_for_whoever_is_tried_twice(event: Event, db: Connection) -> None:
    if event.attempt > 1:
        await grant(event, db)
    await grant(event, db)


async def only_at_first(event: Event, db: Connection) -> None:
    if event.attempt > 1:
        raise ValueError("this was begun before")
    await grant(event, db)


@pytest.mark.parametrize(
    ("unsound", "said"),
    [
        (with_a_connection_of_its_own, r"(?s)crash between effect and commit.*too many 1 × \('cus_\w+', 400\)"),
        (by_the_last_that_came, r"(?s)all came backwards.*missing 1 × \('cus_\w+', 3\).*\[\*events\]\[::-1\]"),
        (twice_for_whoever_is_tried_twice, r"(?s)crash between effect and commit.*missing 1 × \('cus_\w+', 200\)"),
        (only_at_first, r"(?s)crash .* though a perfect delivery went well: 1 of .* dead.*this was begun before"),
    ],
)
def test_an_unsound_handler_is_found_and_told_what_is_wrong(
    unsound: handlers.Handler, said: str, kamiyo_database: Database, application: FastAPI
) -> None:
    handlers.on("invoice.paid", "invoice.payment_failed")(unsound) if unsound is by_the_last_that_came else (
        handlers.on("invoice.paid")(unsound)
    )
    story = stories.dunning(seed=1)
    open_account(kamiyo_database, story)
    with pytest.raises(AssertionError, match=said):
        assert_exactly_once(application, story.of("invoice.paid", "invoice.payment_failed"), EFFECTS, shuffles=0)


def test_effects_that_nobody_can_see_prove_nothing(kamiyo_database: Database, application: FastAPI) -> None:
    with pytest.raises(AssertionError, match="no effect that can be seen"):
        assert_exactly_once(application, stories.sign_up().of("customer.created"), EFFECTS)


# ── Deliveries ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_time_passes_for_what_waits_and_an_event_that_always_fails_is_dead_after_five_tries(
    kamiyo_database: Database, application: FastAPI
) -> None:
    @handlers.on("invoice.paid")
    async def later(event: Event, db: Connection) -> None:
        if event.attempt < 3:
            raise Retry(after=86_400)

    @handlers.on("invoice.created")
    async def never(event: Event, db: Connection) -> None:
        raise ZeroDivisionError("as always")

    story = stories.sign_up()
    [paid], [created] = story.of("invoice.paid"), story.of("invoice.created")
    with pytest.raises(AssertionError, match=r"(?s)1 of 2 events are dead.*invoice\.created.*raise ZeroDivisionError"):
        deliver(application, [paid, created])
    # Known by then: nothing happens again.
    found = deliver(application, [created, paid], shuffle=1, allow_dead=True)
    assert [(one.event_type, one.dead, one.tries) for one in sorted(found, key=lambda one: one.tries)] == [
        ("invoice.paid", False, 3),
        ("invoice.created", True, 5),
    ]


def test_what_is_signed_is_what_stripes_own_library_takes() -> None:
    story = stories.single("charge.dispute.created")
    request = signed(story[-1])
    taken = stripe.Webhook.construct_event(request["content"], request["headers"]["Stripe-Signature"], SECRET)
    assert (taken.id, taken.type) == (story[-1].id, "charge.dispute.created")


def test_the_kit_says_what_it_cannot_do(
    kamiyo_database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = stories.sign_up()
    with pytest.raises(KitError, match="include_router"):
        deliver(FastAPI(), events)
    with pytest.raises(KitError, match="another database than kamiyo_database, and nothing was delivered"):
        deliver(create_app(settings_for(database_url)), events)
    with pytest.raises(AssertionError, match="answered 404"):
        deliver(create_app(), events, path="/elsewhere")
    monkeypatch.setenv("KAMIYO_WORKER", "false")
    with pytest.raises(KitError, match="needs a worker"):
        deliver(create_app(), events)


def test_without_the_fixture_nothing_is_delivered() -> None:
    with pytest.raises(KitError, match="kamiyo_database"):
        deliver(FastAPI(), [])


# ── The database ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("time", ["first", "second"])
def test_each_test_finds_the_tables_as_they_were_made(
    time: str, kamiyo_database: Database, application: FastAPI
) -> None:
    assert kamiyo_database.fetch("SELECT name, first_account FROM plans") == [("gold", None)]
    assert kamiyo_database.fetchval("SELECT count(*) FROM webhook_events") == 0
    assert kamiyo_database.fetchval("SELECT count(*) FROM goodbyes") == 0
    story = stories.sign_up()
    open_account(kamiyo_database, story)
    kamiyo_database.execute("UPDATE plans SET first_account = $1", story.customer)
    assert kamiyo_database.fetchval("SELECT number FROM accounts") == 1, time
    deliver(application, story)
    kamiyo_database.keep("here")
    kamiyo_database.execute("UPDATE accounts SET credits = 5; DELETE FROM webhook_failures")
    kamiyo_database.bring_back("here")
    assert kamiyo_database.fetch("SELECT credits, doubled, plan FROM accounts") == [(0, 0, "gold")]
    assert kamiyo_database.fetchval("SELECT count(*) FROM webhook_events") == len(story)


async def test_letting_the_time_pass_waits_for_no_worker_that_is_just_claiming(kamiyo_database: Database) -> None:
    kamiyo_database.execute(
        "INSERT INTO webhook_events (event_id, event_type, stripe_created, lane, status, failed_at, next_try_at) "
        "SELECT 'evt_' || n, 'x', now(), n, 'failed', now(), now() + interval '1 hour' FROM generate_series(1, 2) AS n"
    )
    db, worker = await asyncpg.connect(kamiyo_database.url), await asyncpg.connect(kamiyo_database.url)
    # In the middle of its claim it has one of them, and comes to the other next.
    async with worker.transaction():
        await worker.execute("SELECT FROM webhook_events WHERE event_id = 'evt_2' FOR UPDATE")
        async with asyncio.timeout(DEADLINE):
            await db.execute(load_queries("testing/testing.sql")["let_time_pass"], 3600.0)
        await worker.execute("SELECT FROM webhook_events FOR UPDATE")
    due = await db.fetch("SELECT event_id FROM webhook_events WHERE next_try_at <= now()")
    assert [event_id for (event_id,) in due] == ["evt_1"]
    await db.close()
    await worker.close()


def test_the_environment_is_the_kits_while_a_test_has_the_database_and_nobody_is_in_reach(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("STRIPE_SECRET_KEY", "sk_live_real")
    monkeypatch.setenv("STRIPE_SECRET_KEYS", '{"acct_1": "rk_live_real"}')
    monkeypatch.setenv("KAMIYO_TRACES", "true")
    database: Database = request.getfixturevalue("kamiyo_database")
    assert os.environ["DATABASE_URL"] == database.url
    assert os.environ["STRIPE_SECRET_KEY"] == os.environ["ALERT_URLS"] == ""
    settings = load_settings()
    assert not settings.api_keys and not settings.alert_channels and not settings.traces


# ── As an installation ──────────────────────────────────────────────────────────────────────────────────────────


def test_the_plugin_loads_next_to_nothing_until_it_is_used() -> None:
    heavy = ("fastapi", "httpx", "kamiyo.web", "kamiyo.simulator", "kamiyo.testing.database", "psutil")
    script = f"import sys, kamiyo.testing.plugin; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=DEADLINE)
    assert done.stdout == "[]\n", done.stderr


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Path]:
    """docs/testing.md as the files of a fresh project."""
    for block in blocks(PAGE, "python", "sql"):
        first = block.text.splitlines()[0]
        assert first.startswith(("# ", "-- ")), f"{block} does not say which file it is"
        path = tmp_path / first.split(" ")[1]
        path.parent.mkdir(exist_ok=True)
        path.write_text(block.text, encoding="utf-8")
    yield tmp_path


def test_the_page_runs_as_printed_in_a_fresh_project_by_the_entry_point_alone(project: Path) -> None:
    shown = sum(
        block.text.count("\ndef test_") + block.text.count("\nasync def test_") for block in blocks(PAGE, "python")
    )
    runs = shown + 2  # one of them has three parameters
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "KAMIYO_"))}
    strictly = (
        *("-W", "error", "-o", "asyncio_default_fixture_loop_scope=function"),
        # What Starlette's own client says of its own dependency.
        *("-W", "ignore:Using `httpx` with `starlette.testclient` is deprecated"),
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:schemathesis", *strictly, "tests"],
        cwd=project,
        env=ours | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=4 * DEADLINE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{runs} passed" in done.stdout
