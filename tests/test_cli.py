"""The command line as an operator uses it at night: what is stuck, why, and may it run again?"""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from typer.testing import CliRunner

from kamiyo import inbox
from kamiyo.cli.main import app as command_line
from kamiyo.database import Connection
from tests.conftest import ADMIN, PREFIX, event_json
from tests.dashboard.conftest import put, put_failure
from tests.turns import read

Say: TypeAlias = Callable[..., Awaitable[tuple[int, str]]]


@pytest.fixture
def kamiyo(database_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Say:
    """`await kamiyo("events", "list")` is the exit status of a command and what it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", database_url)

    async def say(*words: str) -> tuple[int, str]:
        done = await asyncio.to_thread(CliRunner().invoke, command_line, list(words))
        return done.exit_code, done.output

    return say


def flat(said: str) -> str:
    """What an error says, out of the frame that is drawn around it."""
    return " ".join(said.replace("│", " ").split())


async def put_some(db: Connection) -> None:
    """A dead event, one that runs again by itself, one that waits for Stripe, one that is done."""
    soon = datetime.now(UTC) + timedelta(minutes=30)
    await inbox.put(db, [read(event_json("evt_dead", "invoice.paid"))])
    await db.execute("UPDATE webhook_events SET status = 'failed', failed_at = now(), next_try_at = NULL, attempts = 5")
    await put_failure(db, "evt_dead", "beef", error_message="no plan [gold] for it")
    await put(db, "evt_retrying", status="failed", next_try_at=soon, attempts=1, age=timedelta(hours=2))
    await put_failure(db, "evt_retrying", "cafe", error_type="TimeoutError")
    await put(db, "evt_unread", status="pending", read_due_at=soon, read_try_at=soon, age=timedelta(hours=3))
    await put(db, "evt_done", age=timedelta(days=3))


async def test_an_operator_sees_what_is_stuck_and_why_and_runs_it_again(kamiyo: Say, db: Connection) -> None:
    await put_some(db)

    status, said = await kamiyo("events", "list", "--status", "dead")
    assert (status, "Oops" in said) == (0, True)
    assert "evt_dead" in said and not {"evt_retrying", "evt_unread", "evt_done"} & set(said.split())
    _, said = await kamiyo("events", "list", "--status", "failed")
    [line] = [line for line in said.splitlines() if "evt_retrying" in line]
    assert "retrying" in line and "TimeoutError, again " in line and "evt_dead" in said
    _, said = await kamiyo("events", "list", "--status", "unread")
    assert "waits for Stripe" in said and "evt_dead" not in said

    status, said = await kamiyo("events", "show", "evt_dead")
    assert "no plan [gold] for it" in said and "fingerprint beef" in said
    assert "May I retry it? Yes, once the cause is mended" in said and "kamiyo events retry evt_dead" in said
    assert "May I retry" not in (await kamiyo("events", "show", "evt_unread", "--no-payload"))[1]

    status, said = await kamiyo("events", "retry", "evt_dead", "evt_done", "evt_nowhere", "evt_retrying")
    assert status == 1, "not all of them could be"
    assert "evt_dead is back in line" in said and "evt_retrying is back in line" in said
    assert "evt_done is processed, not failed" in said and "kamiyo replay --event" in said
    assert "Event not found: evt_nowhere" in said
    _, said = await kamiyo("events", "retry", "evt_dead")
    assert "it is in line already" in said


async def test_many_are_run_again_by_their_cause_and_only_the_dead_if_so_wanted(kamiyo: Say, db: Connection) -> None:
    await put_some(db)
    for options, count in (
        (("--status", "failed"), "2 failed"),
        (("--status", "dead"), "1 dead"),
        (("--status", "retrying"), "1 retrying"),
        (("--fingerprint", "cafe"), "1 failed"),
        (("--fingerprint", "cafe", "--status", "dead"), "0 dead"),
        (("--since", "1h"), "1 failed"),
        (("--until", "90m"), "1 failed"),
    ):
        status, said = await kamiyo("replay", "--dry-run", *options)
        assert (status, f"{count} events match" in said) == (0, True), said
    status, said = await kamiyo("replay", "--status", "pending")
    assert status == 2
    assert "what is pending is in line already; it takes failed, retrying, dead, processed" in flat(said)
    status, said = await kamiyo("replay", "--fingerprint", "beef", "--yes")
    assert (status, "1 events are back in line" in said) == (0, True)
    assert await db.fetchval("SELECT status FROM webhook_events WHERE event_id = 'evt_dead'") == "pending"


async def test_one_event_is_run_again_by_its_id_finished_or_failed(kamiyo: Say, db: Connection) -> None:
    await put_some(db)

    async def standing() -> dict[str, str]:
        rows = await db.fetch("SELECT event_id, status FROM webhook_events WHERE event_id IN ('evt_dead', 'evt_done')")
        return {event_id: status for event_id, status in rows}

    before = await standing()
    status, said = await kamiyo("replay", "--event", "evt_done", "--dry-run")
    assert (status, said) == (0, "evt_done is processed\n")
    status, said = await kamiyo(
        "replay", "--event", "evt_done", "--event", "evt_unread", "--event", "evt_nowhere", "-y"
    )
    assert status == 1, "all of them, or none"
    assert "evt_unread is pending: it is in line already" in said and "Event not found: evt_nowhere" in said
    status, said = await kamiyo("replay", "--event", "evt_done", "--type", "invoice.paid")
    assert status == 2 and "leave the other filters out" in flat(said)
    assert (await kamiyo("replay", "--event", "evt_done"))[0] == 1, "nobody said yes"
    assert await standing() == before

    status, said = await kamiyo("replay", "--event", "evt_done", "--event", "evt_dead", "--yes")
    assert status == 0 and "evt_done is back in line; see `kamiyo events show evt_done`" in said, said
    assert await standing() == {"evt_dead": "pending", "evt_done": "pending"}
    done = await db.fetchrow("SELECT outcome, processed_at, attempts FROM webhook_events WHERE event_id = 'evt_done'")
    assert tuple(done or ()) == (None, None, 0)
    audited = await db.fetch("SELECT action, filters, count FROM webhook_audit ORDER BY id")
    assert [(row["action"], json.loads(row["filters"]), row["count"]) for row in audited] == [
        ("replay", {"event_id": "evt_done"}, 1),
        ("replay", {"event_id": "evt_dead"}, 1),
    ]


async def test_a_cleanup_says_first_what_it_would_remove(kamiyo: Say, db: Connection) -> None:
    await put_some(db)
    old = await put(db, "evt_old", age=timedelta(days=60))
    asked = "SELECT count(*), (SELECT count(*) FROM webhook_audit) FROM webhook_events"
    before = tuple(await db.fetchrow(asked) or ())

    status, said = await kamiyo("cleanup", "--days", "2", "--dry-run")
    assert status == 0 and "2 events from more than 2 days ago would be removed" in said, said
    told = (
        "SELECT to_char(created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') FROM webhook_events WHERE event_id = $1"
    )
    first, last = await db.fetchval(told, old), await db.fetchval(told, "evt_done")
    assert re.search(rf"with 0 bodies; received from {first}\.\d+ UTC to {last}\.\d+ UTC", said), said
    _, said = await kamiyo("cleanup", "--days", "100", "--dry-run")
    assert said == "0 events from more than 100 days ago would be removed\n"
    assert tuple(await db.fetchrow(asked) or ()) == before

    status, said = await kamiyo("cleanup", "--days", "2")
    assert "2 events from more than 2 days ago are removed" in said
    assert tuple(await db.fetchrow(asked) or ()) == (before[0] - 2, 1)


async def test_a_time_is_how_long_ago_or_a_moment_as_it_is_shown_elsewhere(kamiyo: Say, db: Connection) -> None:
    await put_some(db)

    async def found(*words: str) -> set[str]:
        status, said = await kamiyo("events", "list", *words)
        assert status == 0, said
        return {name for name in ("evt_dead", "evt_retrying", "evt_unread", "evt_done") if name in said}

    ago = datetime.now(UTC) - timedelta(minutes=150)
    moments = ["150m", ago.isoformat(), f"{ago:%Y-%m-%dT%H:%M}", f"{ago:%Y-%m-%d %H:%M:%S.000} UTC"]
    moments += [ago.isoformat().replace("+00:00", "Z")]
    for moment in moments:
        assert await found("--since", moment) == {"evt_dead", "evt_retrying"}, moment
        assert await found("--until", moment) == {"evt_unread", "evt_done"}, moment
    assert await found("--since", "2d") == {"evt_dead", "evt_retrying", "evt_unread"}
    for nonsense in ("yesterday", "7", "1w", "-2h", "99999999d"):
        status, said = await kamiyo("events", "list", "--since", nonsense)
        assert status == 2 and "Invalid value for '--since'" in flat(said), said
        assert f"'{nonsense}' is no moment. Write how long ago it was (90m, 72h, 7d)" in flat(said), said


async def test_for_scripts_the_answers_are_those_of_the_calls_over_http(
    kamiyo: Say, db: Connection, quiet_client: Any
) -> None:
    await put_some(db)
    _, said = await kamiyo("events", "list", "--json")
    lines = [json.loads(line) for line in said.splitlines()]
    assert lines == (await quiet_client.get(f"{PREFIX}/events", headers=ADMIN)).json()["events"]
    _, said = await kamiyo("events", "show", "evt_dead", "--json")
    assert json.loads(said) == (await quiet_client.get(f"{PREFIX}/events/evt_dead", headers=ADMIN)).json()
    assert (await kamiyo("events", "list", "--json", "--customer", "cus_nobody")) == (0, "")


async def test_no_id_is_cut_off_however_narrow_the_terminal(
    kamiyo: Say, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ids = {
        "event_type": "customer.subscription.pending_update_applied",
        "object_id": "sub_" + "1MowQVLkdIwHu7ixeRlqHVzs" * 2,
        "customer": "cus_" + "NffrFeUfNV2Hib" * 3,
    }
    event_id = await put(db, "evt_" + "1Pgc76B7WZ01zgkWwyRHS12y" * 2, **ids)
    _, said = await kamiyo("events", "list")
    assert set(said.split()) >= {event_id, *ids.values()}


async def test_which_version_it_is(kamiyo: Say) -> None:
    assert (await kamiyo("--version")) == (0, "kamiyo 0.1.0\n")
