"""The operators' dashboard over HTTP: who may see it, what each page says, what each button does."""

import asyncio
import html
import json
import re
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from fastapi import FastAPI
from itsdangerous import TimestampSigner

from kamiyo import alerts, database, handlers, inbox
from kamiyo.alerts import Incident
from kamiyo.database import Connection
from kamiyo.event import Event
from kamiyo.handlers import Bury, Retry
from kamiyo.web import charts, create_app, create_router
from kamiyo.web.dashboard import attention, background, pages, payload, queries, wording
from kamiyo.web.dashboard.queries import RANGES, STATES, Group, Search
from tests.conftest import (
    ADMIN_KEY,
    PREFIX,
    Log,
    MakeSettings,
    NewDatabase,
    deliver,
    event_json,
    fresh_id,
    noop,
    run_apart,
    running_client,
    settings_for,
    settled,
    until,
)

BASE = "/dashboard"

#: Every page that needs a session, with an address that reaches it.
PAGES = [
    *("", "/undecided", "/events", "/events/evt_1", "/events/evt_1/body", "/search?q=evt_1", "/failures"),
    *("/failures/abc", "/failures/abc/retry", "/replays/1", "/customers/cus_1", "/no/such/page"),
]
ACTIONS = ["/sign-out", "/events/evt_1/retry", "/failures/abc/retry"]


async def sign_in(client: httpx.AsyncClient, base: str = BASE) -> httpx.AsyncClient:
    """The same client, signed in."""
    answer = await client.post(f"{base}/sign-in", data={"key": ADMIN_KEY, "next": ""})
    assert (answer.status_code, answer.headers["location"]) == (303, base)
    return client


@pytest.fixture
async def desk(client: httpx.AsyncClient) -> httpx.AsyncClient:
    """A signed-in client of the running application, worker included."""
    return await sign_in(client)


@pytest.fixture
async def quiet_desk(quiet_client: httpx.AsyncClient) -> httpx.AsyncClient:
    """A signed-in client of an application without a worker: events stay as they are put."""
    return await sign_in(quiet_client)


async def page(client: httpx.AsyncClient, path: str = "", status: int = 200) -> str:
    """The text of a page, tags and all."""
    answer = await client.get(BASE + path)
    assert answer.status_code == status, answer.text
    return answer.text


def words(text: str) -> str:
    """What a page says: no tags, one space between words."""
    text = re.sub(r"<(script|style|title|symbol)\b.*?</\1>", " ", text, flags=re.DOTALL)
    # Letters that a tag only marks up stay together; everything else is a word of its own.
    text = re.sub(r"</?(wbr|b|span|i|code|a|del|ins|time)\b[^>]*>", "", text)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


def live_part(text: str) -> str:
    """The part of a page that changes."""
    return text[text.index('<div id="live"') :]


def token_of(text: str) -> str:
    """The token that the forms of a page carry."""
    found = re.search(r'name="token" value="([0-9a-f]{64})"', text)
    assert found is not None
    return found[1]


def links(text: str, beginning: str) -> list[str]:
    """The addresses on a page that begin like that, in order."""
    return [html.unescape(found) for found in re.findall(rf'href="({re.escape(beginning)}[^"]*)"', text)]


async def press(client: httpx.AsyncClient, at: str, action: str) -> httpx.Response:
    """Press the button on the page `at` that does `action`."""
    text = await page(client, at)
    assert f'action="{BASE}{action}"' in text
    return await client.post(BASE + action, data={"token": token_of(text)})


async def put(db: Connection, event_id: str | None = None, **columns: Any) -> str:
    """An event in the ledger as a worker would have left it, without a body."""
    age: timedelta = columns.pop("age", timedelta(0))
    status = columns.get("status", "processed")
    at = datetime.now(UTC) - age
    values = {
        "event_id": event_id or fresh_id(),
        "event_type": "charge.succeeded",
        "created_at": at,
        "stripe_created": at,
        "lane": 1,
        "outcome": "handled" if status == "processed" else None,
        "processed_at": at if status == "processed" else None,
        "failed_at": at if status == "failed" else None,
        "next_try_at": at if status in ("pending", "processing") else None,
        **{"status": status, **columns},
    }
    places = ", ".join(f"${n}" for n in range(1, len(values) + 1))
    query = f"INSERT INTO webhook_events ({', '.join(values)}) VALUES ({places})"  # noqa: S608 - names of our own
    await db.execute(query, *values.values())
    return str(values["event_id"])


async def put_failure(db: Connection, event_id: str, fingerprint: str = "abc", **columns: Any) -> None:
    """A failed try of an event."""
    values = {
        "event_id": event_id,
        "event_type": "charge.succeeded",
        "retry_count": 5,
        "error_type": "shop.errors.Oops",
        "error_message": "no such plan",
        "traceback": 'Traceback (most recent call last):\n  File "/srv/shop/billing.py", line 41, in grant\nOops',
        "fingerprint": fingerprint,
        **columns,
    }
    places = ", ".join(f"${n}" for n in range(1, len(values) + 1))
    query = f"INSERT INTO webhook_failures ({', '.join(values)}) VALUES ({places})"  # noqa: S608 - names of our own
    await db.execute(query, *values.values())


async def put_dead(db: Connection, fingerprint: str = "abc", **columns: Any) -> str:
    """A dead event and the failure that ended it."""
    event_id = await put(db, status="failed", attempts=5, **columns)
    await put_failure(db, event_id, fingerprint)
    return event_id


async def only(client: httpx.AsyncClient, **filters: str) -> list[str]:
    """The ids of the events that the list shows with these filters, in its order."""
    answer = await client.get(f"{BASE}/events", params=filters)
    assert answer.status_code == 200
    return re.findall(r'<td class="c-event">.*?<code class="id">(\w+)</code>', answer.text)


# ── Who may see it ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", PAGES)
async def test_whoever_is_not_signed_in_is_asked_for_the_key_and_sees_nothing_else(
    path: str, quiet_client: httpx.AsyncClient
) -> None:
    answer = await quiet_client.get(BASE + path)
    assert answer.status_code == 303
    place = urlsplit(answer.headers["location"])
    assert place.path == f"{BASE}/sign-in"
    assert parse_qs(place.query) == ({"next": [path]} if path else {})
    asked = await quiet_client.get(answer.headers["location"])
    assert (asked.status_code, "Admin key" in asked.text) == (200, True)


async def test_the_script_of_a_page_whose_session_is_over_is_told_so(quiet_client: httpx.AsyncClient) -> None:
    answer = await quiet_client.get(BASE, headers={"X-Fragment": "live"})
    assert answer.status_code == 401


async def test_the_key_opens_a_session_for_twelve_hours_that_no_script_and_no_other_site_can_use(
    quiet_client: httpx.AsyncClient,
) -> None:
    answer = await quiet_client.post(f"{BASE}/sign-in", data={"key": ADMIN_KEY, "next": ""})
    name, *rest = [part.strip() for part in answer.headers["set-cookie"].split(";")]
    assert name.startswith("kamiyo_session=")
    assert {part.lower() for part in rest} == {"httponly", "samesite=strict", "max-age=43200", f"path={BASE}"}
    assert (await quiet_client.get(BASE)).status_code == 200


async def test_over_https_the_cookie_is_for_https_alone(quiet_client: httpx.AsyncClient) -> None:
    answer = await quiet_client.post(f"https://kamiyo{BASE}/sign-in", data={"key": ADMIN_KEY})
    assert "secure" in answer.headers["set-cookie"].lower()


async def test_a_wrong_key_opens_nothing_and_each_is_answered_later(
    quiet_client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    async def wait(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", wait)
    for wrong in ("", "guess", ADMIN_KEY[:-1], ADMIN_KEY + "x"):
        answer = await quiet_client.post(f"{BASE}/sign-in", data={"key": wrong})
        assert (answer.status_code, "set-cookie" in answer.headers) == (401, False)
        assert "That is not the admin key" in words(answer.text)
    assert waits == sorted(waits) and waits[0] < waits[-1]
    assert (await quiet_client.get(BASE)).status_code == 303


async def test_a_session_ends_after_twelve_hours(
    quiet_desk: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    monkeypatch.setattr(TimestampSigner, "get_timestamp", lambda self: int(now + 12 * 3600 - 5))
    assert (await quiet_desk.get(BASE)).status_code == 200
    monkeypatch.setattr(TimestampSigner, "get_timestamp", lambda self: int(now + 12 * 3600 + 5))
    assert (await quiet_desk.get(BASE)).status_code == 303


async def test_changing_the_admin_key_ends_every_session(quiet_desk: httpx.AsyncClient, settings: MakeSettings) -> None:
    cookie = {"Cookie": f"kamiyo_session={quiet_desk.cookies['kamiyo_session']}"}
    async with running_client(create_app(settings(ADMIN_API_KEY=ADMIN_KEY))) as same:
        assert (await same.get(BASE, headers=cookie)).status_code == 200
    async with running_client(create_app(settings(ADMIN_API_KEY="another"))) as changed:
        assert (await changed.get(BASE, headers=cookie)).status_code == 303


@pytest.mark.parametrize("forged", ["", "x", "name.aGVq.sig", "é", "a" * 5000])
async def test_a_cookie_that_this_server_did_not_sign_is_no_session(
    forged: str, quiet_client: httpx.AsyncClient
) -> None:
    answer = await quiet_client.get(BASE, headers={b"Cookie": b"kamiyo_session=" + forged.encode()})
    assert answer.status_code == 303


async def test_a_cookie_with_one_letter_changed_is_no_session(quiet_desk: httpx.AsyncClient) -> None:
    good = quiet_desk.cookies["kamiyo_session"]
    quiet_desk.cookies.clear()
    for place in (0, len(good) // 2):
        bad = good[:place] + ("A" if good[place] != "A" else "B") + good[place + 1 :]
        assert (await quiet_desk.get(BASE, headers={"Cookie": f"kamiyo_session={bad}"})).status_code == 303


@pytest.mark.parametrize(
    ("wanted", "leads"),
    [
        ("/events?status=dead", f"{BASE}/events?status=dead"),
        ("", BASE),
        ("//evil.example", BASE),
        ("https://evil.example", BASE),
        ("/\\evil.example", BASE),
        ("/a\r\nSet-Cookie: x=y", BASE),
        (".evil.example", BASE),
        ("@evil.example", BASE),
    ],
)
async def test_signing_in_leads_on_to_the_page_that_was_asked_for_and_never_off_the_dashboard(
    wanted: str, leads: str, quiet_client: httpx.AsyncClient
) -> None:
    answer = await quiet_client.post(f"{BASE}/sign-in", data={"key": ADMIN_KEY, "next": wanted})
    assert (answer.status_code, answer.headers["location"]) == (303, leads)


async def test_signing_out_takes_the_cookie_back(quiet_desk: httpx.AsyncClient) -> None:
    answer = await press(quiet_desk, "", "/sign-out")
    assert (answer.status_code, answer.headers["location"]) == (303, f"{BASE}/sign-in")
    assert "kamiyo_session" not in quiet_desk.cookies
    assert (await quiet_desk.get(BASE)).status_code == 303


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("form", [{}, {"token": ""}, {"token": "0" * 64}, {"token": "é"}], ids=repr)
async def test_no_action_is_done_without_the_token_of_its_session(
    action: str, form: dict[str, str], quiet_desk: httpx.AsyncClient, db: Connection
) -> None:
    await put_dead(db, event_id="evt_1")
    answer = await quiet_desk.post(BASE + action, data=form)
    assert (answer.status_code, "Not done" in answer.text) == (403, True)
    assert await db.fetchval("SELECT status FROM webhook_events") == "failed"
    assert await db.fetchval("SELECT count(*) FROM webhook_replays") == 0
    assert (await quiet_desk.get(BASE)).status_code == 200


async def test_the_token_of_another_session_is_of_no_use(quiet_desk: httpx.AsyncClient, app: FastAPI) -> None:
    other = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://kamiyo")
    first = token_of(await page(quiet_desk))
    await sign_in(quiet_desk)
    assert token_of(await page(quiet_desk)) != first
    assert (await quiet_desk.post(f"{BASE}/sign-out", data={"token": first})).status_code == 403
    await other.aclose()


@pytest.mark.parametrize("action", [*ACTIONS, "/sign-in"])
async def test_an_action_that_another_site_asks_for_is_refused(
    action: str, quiet_desk: httpx.AsyncClient, db: Connection
) -> None:
    await put_dead(db, event_id="evt_1")
    form = {"token": token_of(await page(quiet_desk)), "key": ADMIN_KEY}
    for site in ("cross-site", "same-site"):
        answer = await quiet_desk.post(BASE + action, data=form, headers={"Sec-Fetch-Site": site})
        assert (answer.status_code, "set-cookie" in answer.headers) == (403, False)
    assert await db.fetchval("SELECT status FROM webhook_events") == "failed"


async def test_a_form_that_is_far_too_long_is_not_read(quiet_client: httpx.AsyncClient) -> None:
    answer = await quiet_client.post(f"{BASE}/sign-in", data={"key": "x" * 100_000})
    assert answer.status_code == 403


async def test_an_action_without_a_session_leads_to_signing_in(quiet_client: httpx.AsyncClient, db: Connection) -> None:
    await put_dead(db, event_id="evt_1")
    answer = await quiet_client.post(f"{BASE}/events/evt_1/retry", data={"token": "x"})
    assert (answer.status_code, answer.headers["location"]) == (303, f"{BASE}/sign-in")
    assert await db.fetchval("SELECT status FROM webhook_events") == "failed"


async def test_a_link_from_another_site_goes_on_by_itself_so_that_the_session_is_found(
    quiet_client: httpx.AsyncClient,
) -> None:
    answer = await quiet_client.get(f"{BASE}/failures/abc?x=1", headers={"Sec-Fetch-Site": "cross-site"})
    assert answer.status_code == 200
    assert f'<meta http-equiv="refresh" content="0; url={BASE}/failures/abc?x=1">' in answer.text


async def test_without_an_admin_key_every_page_is_shut_and_says_how_to_open_it(
    database_url: str, settings: MakeSettings
) -> None:
    async with running_client(create_app(settings(ADMIN_API_KEY=""))) as client:
        for path in [*PAGES, "/sign-in"]:
            answer = await client.get(BASE + path)
            assert (answer.status_code, "openssl rand -hex 32" in answer.text) == (503, True)
        for action in [*ACTIONS, "/sign-in"]:
            answer = await client.post(BASE + action, data={"key": "", "token": ""})
            assert (answer.status_code, "set-cookie" in answer.headers) == (503, False)


async def test_every_answer_is_kept_to_its_reader(quiet_client: httpx.AsyncClient, db: Connection) -> None:
    async def check(answer: httpx.Response) -> None:
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        assert policy == {
            "default-src": "'none'",
            "style-src": "'self'",
            "script-src": "'self'",
            "img-src": "'self' data:",
            "connect-src": "'self'",
            "form-action": "'self'",
            "frame-ancestors": "'none'",
            "base-uri": "'none'",
        }
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["x-frame-options"] == "DENY"
        if "/static/" not in answer.request.url.path:
            assert answer.headers["cache-control"] == "no-store"
        for forbidden in (" style=", "javascript:", " onclick=", "<style"):
            assert forbidden not in answer.text

    await put_dead(db, event_id="evt_1", customer="cus_1")
    await check(await quiet_client.get(f"{BASE}/static/nothing.css"))
    await check(await quiet_client.delete(BASE))
    for path in [*PAGES, "/sign-in"]:
        await check(await quiet_client.get(BASE + path))
    await sign_in(quiet_client)
    seen = set()
    for path in PAGES:
        answer = await quiet_client.get(BASE + path)
        seen.add(answer.status_code)
        await check(answer)
    assert seen == {200, 303, 404}


async def test_the_key_is_in_no_page_address_or_log_line_and_neither_is_anything_of_a_customer(
    client: httpx.AsyncClient, db: Connection, log: Log
) -> None:
    @handlers.on("customer.created")
    async def fail(event: Event, db: Connection) -> None:
        raise Bury("nobody of that name")

    person = {"id": "cus_1", "object": "customer", "email": "ada@example.org", "name": "Ada L", "phone": "+4512"}
    await deliver(client, event_json("evt_1", "customer.created", person))
    await settled(db, "evt_1", "failed")
    await client.post(f"{BASE}/sign-in", data={"key": "a wrong guess"})
    await sign_in(client)
    fingerprint = await db.fetchval("SELECT fingerprint FROM webhook_failures")
    for path in ("", "/events", "/events/evt_1", "/customers/cus_1", f"/failures/{fingerprint}", "/search?q=cus_1"):
        answer = await client.get(BASE + path)
        assert ADMIN_KEY not in answer.text + str(answer.headers)
    assert "ada@example.org" in await page(client, "/customers/cus_1")
    await press(client, "/events/evt_1", "/events/evt_1/retry")
    told = json.dumps(log())
    assert "events_retried" in told and "admin_refused" in told
    for secret in (ADMIN_KEY, "a wrong guess", "ada@example.org", "Ada L", "+4512", "nobody of that name"):
        assert secret not in told


# ── Where it stands ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("prefix", "root_path"), [("", ""), ("/pay", ""), ("/dashboard", ""), ("", "/behind/a/proxy")])
async def test_in_an_application_of_the_users_own_it_stands_below_the_routers_prefix(
    prefix: str, root_path: str, database_url: str, settings: MakeSettings, db: Connection
) -> None:
    app = FastAPI()
    app.include_router(create_router(settings(KAMIYO_WORKER=False)), prefix=prefix)
    await put_dead(db, event_id="evt_1", customer="cus_1")
    outside = f"{root_path}{prefix}{PREFIX}/dashboard"
    # As `uvicorn --root-path` passes a request on that a proxy stripped of it.
    transport = httpx.ASGITransport(app, root_path=root_path)
    async with running_client(app), httpx.AsyncClient(transport=transport, base_url="http://kamiyo") as client:
        answer = await client.post(f"{outside}/sign-in", data={"key": ADMIN_KEY, "next": "/events"})
        assert answer.headers["location"] == f"{outside}/events"
        assert f"Path={outside}" in answer.headers["set-cookie"]
        cookie = {"Cookie": answer.headers["set-cookie"].partition(";")[0]}
        for path in ("", "/", "/events", "/events/evt_1", "/failures", "/customers/cus_1", "/nowhere"):
            text = (await client.get(outside + path, headers=cookie)).text
            places = re.findall(r'(?:href|action|src)="([^"#][^"]*)"', text)
            assert len(places) > 5
            assert [place for place in places if not place.startswith(outside)] == []
        [style] = [place for place in places if "dashboard.css" in place]
        assert (await client.get(html.unescape(style))).status_code == 200
        assert (await client.get(f"{outside}x", headers=cookie)).status_code == 404


async def test_the_kamiyo_api_has_it_at_dashboard_and_docs_do_not_speak_of_it(quiet_desk: httpx.AsyncClient) -> None:
    assert "Waiting for the first event" in await page(quiet_desk)
    assert not [path for path in (await quiet_desk.get("/openapi.json")).json()["paths"] if "dashboard" in path]


async def test_stylesheet_script_and_icon_have_their_types_and_are_kept_by_browsers_until_they_change(
    quiet_client: httpx.AsyncClient,
) -> None:
    text = (await quiet_client.get(f"{BASE}/sign-in")).text
    for name, kind in (
        ("dashboard.css", "text/css; charset=utf-8"),
        ("dashboard.js", "text/javascript; charset=utf-8"),
        ("icon.svg", "image/svg+xml"),
    ):
        [place] = links(text, f"{BASE}/static/{name}") or re.findall(rf'src="({BASE}/static/{name}[^"]*)"', text)
        answer = await quiet_client.get(place)
        assert (answer.status_code, answer.headers["content-type"]) == (200, kind)
        assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
        again = await quiet_client.get(place, headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        # Another version's address is answered with this one's file, and must not be kept under it.
        older = await quiet_client.get(f"{BASE}/static/{name}?v=older")
        assert (older.status_code, older.headers["cache-control"]) == (200, "no-cache")
    for outside in ("..%2Fsite.py", "%2e%2e/site.py", "dashboard.sql", ""):
        assert (await quiet_client.get(f"{BASE}/static/{outside}")).status_code in (303, 404)


async def test_while_the_database_is_away_the_page_says_so_and_asks_again(settings: MakeSettings) -> None:
    away = settings(DATABASE_URL="postgresql://nobody@127.0.0.1:1/none", KAMIYO_SHUTDOWN_GRACE=0.1)
    async with running_client(create_app(away)) as client:
        await sign_in(client)
        text = await page(client, status=503)
        assert "The database does not answer" in text
        assert '<noscript><meta http-equiv="refresh"' in text
        assert 'data-live="5"' in text


async def test_before_the_application_has_started_it_says_the_same(settings: MakeSettings) -> None:
    app = create_app(settings())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://kamiyo") as client:
        await sign_in(client)
        assert "The database does not answer" in await page(client, status=503)


async def test_a_question_that_takes_too_long_is_stopped_and_the_page_says_what_to_do(
    quiet_desk: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slow(db: Connection) -> Any:
        await db.execute("SET LOCAL statement_timeout = '10ms'")
        await db.execute("SELECT pg_sleep(20)")

    monkeypatch.setattr(queries, "known_types", slow)
    text = await page(quiet_desk, "/events", status=503)
    assert "That took too long" in text and "Narrow it" in text
    assert await page(quiet_desk)


async def test_a_page_cannot_change_anything(quiet_desk: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    async def meddle(db: Connection) -> list[str]:
        return [str(await db.execute("DELETE FROM webhook_events"))]

    monkeypatch.setattr(queries, "known_types", meddle)
    assert "The database does not answer" in await page(quiet_desk, "/events", status=503)


# ── Overview ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_empty_system_says_how_to_get_the_first_event(quiet_desk: httpx.AsyncClient) -> None:
    text = words(await page(quiet_desk))
    assert "Ready" in text and "kamiyo trigger --story signup" in text
    assert "No event has come in yet" in text


async def test_what_needs_a_person_comes_first_with_its_causes_and_a_way_to_retry_each(
    quiet_desk: httpx.AsyncClient, db: Connection
) -> None:
    for _ in range(3):
        await put_dead(db, "aaa")
    await put_dead(db, "bbb")
    text = await page(quiet_desk)
    said = words(live_part(text))
    assert said.index("Needs you now") < said.index("4 events are dead") < said.index("How it goes")
    assert "shop.errors.Oops billing.py:41 in grant" in said
    assert "no such plan" in said and "3 dead" in said and "1 dead" in said
    assert links(text, f"{BASE}/failures/aaa/retry") and links(text, f"{BASE}/failures/bbb/retry")
    assert re.search(r'<span id="dead">4</span>', text)


async def test_when_nothing_is_wrong_it_says_so(quiet_desk: httpx.AsyncClient, db: Connection) -> None:
    await put(db)
    text = words(await page(quiet_desk))
    assert "All is well" in text and "Nothing needs you" in text


async def test_the_pictures_show_what_came_in_what_failed_how_long_it_took_and_what_waits(
    quiet_desk: httpx.AsyncClient, db: Connection
) -> None:
    for _ in range(6):
        await put(db, processing_us=4000)
    for _ in range(2):
        await put(db, status="failed")
    await put(db, status="pending", processed_at=None)
    # The server took its look at this minute when it started.
    await until(lambda: db.fetchval("UPDATE webhook_backlog_by_minute SET waiting = 1 RETURNING waiting"))
    for name in RANGES:
        text = await page(quiet_desk, f"?range={name}")
        figures = re.findall(r'<span class="picture-title">(\w+ ?\w*)</span>\s*<span class="figure">(.*?)</span>', text)
        assert figures == [
            ("Throughput", "9"),
            ("Failure rate", "25\N{NARROW NO-BREAK SPACE}%"),
            ("Latency", "4.0 ms"),
            ("Backlog", "1"),
        ]
        assert text.count('<svg class="chart"') == 4
        assert text.count('class="hit"') == 4 * RANGES[name].steps
        assert "1 waiting, 0 to be tried again" in text
        assert re.search(r"<title>[^<]*· 9 received, 2 failed</title>", text)
        assert f'data-live="{RANGES[name].every}"' in text
        # The same as numbers, for whoever sees no picture.
        assert re.search(r'<td class="right">9</td><td class="right">6</td><td class="right">2</td>', text)


async def test_an_older_event_is_in_the_range_it_belongs_to_and_in_no_shorter_one(
    quiet_desk: httpx.AsyncClient, db: Connection
) -> None:
    await put(db, age=timedelta(hours=3))
    await put(db, age=timedelta(days=3))
    counts = {}
    for name in RANGES:
        found = re.search(r'Throughput</span>\s*<span class="figure">(\d+)', await page(quiet_desk, f"?range={name}"))
        assert found is not None
        counts[name] = int(found[1])
    assert counts == {"1h": 0, "24h": 1, "7d": 2}


async def test_folded_and_fresh_counts_add_up_to_the_same_picture(db: Connection) -> None:
    await put(db, age=timedelta(minutes=10))
    now = datetime.now(UTC)
    fresh = {name: await queries.steps(db, chosen, now) for name, chosen in RANGES.items()}
    await inbox.fold_counts(db)
    await put(db, age=timedelta(minutes=10))
    for name, chosen in RANGES.items():
        steps = await queries.steps(db, chosen, now)
        assert [step.at for step in steps] == [step.at for step in fresh[name]]
        assert [step.received for step in steps] == [2 * step.received for step in fresh[name]]
        assert sum(step.received for step in steps) == 2


async def test_the_backlog_is_written_down_once_a_minute_by_a_server_that_runs(
    quiet_client: httpx.AsyncClient, db: Connection
) -> None:
    await until(lambda: db.fetchval("SELECT count(*) FROM webhook_backlog_by_minute"))
    await db.execute("DELETE FROM webhook_backlog_by_minute")
    await put(db, status="pending", processed_at=None, age=timedelta(seconds=90))
    await put(db, status="failed", next_try_at=datetime.now(UTC) + timedelta(minutes=5))
    await put(db, status="failed")
    await db.execute("INSERT INTO webhook_backlog_by_minute VALUES (now() - interval '9 days', 7, 7, 7)")
    await queries.sample_backlog(db)
    await queries.sample_backlog(db)
    [row] = await db.fetch("SELECT * FROM webhook_backlog_by_minute")
    assert (row["waiting"], row["retrying"]) == (1, 1)
    assert 89 < row["oldest_due_seconds"] < 120
    await db.execute("DELETE FROM webhook_backlog_by_minute")


async def test_the_script_gets_only_the_part_that_changes(quiet_desk: httpx.AsyncClient, db: Connection) -> None:
    await put_dead(db)
    answer = await quiet_desk.get(BASE, headers={"X-Fragment": "live"})
    assert answer.text.startswith('<div id="live"')
    assert "<html" not in answer.text and "1 event is dead" in answer.text
    assert 'data-dead="1"' in answer.text


STANDING: dict[str, Any] = {
    "waiting": 0,
    "retrying": 0,
    "next_retry_at": None,
    "oldest_event_id": None,
    "oldest_due_seconds": 0.0,
    "unread": 0,
    "oldest_unread_seconds": 0.0,
    "circuit_opened_at": None,
    "lanes_held": 0,
    "now": datetime(2026, 11, 23, 3, 0, tzinfo=UTC),
}


def told(**facts: Any) -> list[tuple[str, str]]:
    """Tone and title of what attention makes of these facts; all else is well."""
    names = ("dead", "groups", "undecided", "secret_set", "day", "incidents")
    other = {name: facts.pop(name) for name in names if name in facts}
    values: dict[str, Any] = {
        "dead": 0,
        "groups": [],
        "undecided": 0,
        "incidents": [],
        "secret_set": True,
        "day": {"received": 100, "failed": 0},
        **other,
    }
    found = attention.concerns(standing=STANDING | facts, **values)
    return [(concern.tone, concern.title) for concern in found]


def test_every_kind_of_trouble_has_its_sentence_and_the_worst_comes_first() -> None:
    assert told() == []
    assert told(secret_set=False) == [("bad", "No event can come in")]
    assert told(oldest_due_seconds=59.0) == []
    late = {"oldest_due_seconds": 90.0, "oldest_event_id": "evt_1", "waiting": 3}
    assert told(**late) == [("bad", "Nothing is being processed")]
    assert told(**late, lanes_held=2) == [("warn", "Processing is behind")]
    assert told(**late | {"oldest_due_seconds": 301.0}, lanes_held=2) == [("bad", "Processing is behind")]
    assert told(dead=1) == [("bad", "1 event is dead")]
    thin = "\N{NARROW NO-BREAK SPACE}"
    assert told(dead=99_999) == [("bad", f"10{thin}000+ events are dead")]
    assert told(day={"received": 10, "failed": 1}) == []
    assert told(day={"received": 100, "failed": 11}) == [("bad", f"11{thin}% of the last 24 hours failed")]
    assert told(undecided=2) == [("warn", "2 billing rows are undecided")]
    assert told(retrying=1) == [("calm", "1 failed event is tried again by itself")]
    away = {"circuit_opened_at": STANDING["now"] - timedelta(minutes=2), "unread": 1}
    assert told(**away) == [("calm", "Stripe's API has not answered for 2 min")]
    assert told(unread=3, oldest_unread_seconds=59.0) == []
    assert told(unread=3, oldest_unread_seconds=61.0) == [("calm", "Reading from Stripe is behind")]
    overdue = Incident("reads_overdue", "Events wait to be read from Stripe", "…", "/events?status=unread")
    assert told(**away, incidents=[overdue]) == [("warn", "Events wait to be read from Stripe")], "said once"
    everything = told(dead=1, retrying=2, undecided=1, day={"received": 10, "failed": 5})
    assert [tone for tone, _ in everything] == ["bad", "warn", "warn", "calm"]


def test_what_an_alert_would_tell_the_page_tells_too_and_what_it_says_in_more_words_only_once() -> None:
    silence = Incident("silence", "No events come any more", "…", "/")
    refused = Incident("bad_signatures", "Deliveries are refused", "…", "/")
    died = Incident("event_died:abc", "An event is dead", "…", "/failures/abc")
    overdue = Incident("overdue", "Events wait too long", "…", "/events?status=pending")
    assert told(incidents=[silence, died, overdue, refused], dead=1) == [
        ("bad", "1 event is dead"),
        ("bad", "Deliveries are refused"),
        ("warn", "No events come any more"),
    ]


def test_many_types_that_fail_at_once_are_one_concern() -> None:
    rates = [Incident(f"failure_rate:type.{n}", f"type.{n} fails often", "…", "/failures") for n in range(3)]
    assert told(incidents=rates) == [("warn", "3 types of events fail often")]
    assert told(incidents=rates[:1]) == [("warn", "type.0 fails often")]


async def test_deliveries_that_are_refused_are_on_the_first_page(quiet_desk: httpx.AsyncClient) -> None:
    for _ in range(12):
        await quiet_desk.post(f"{PREFIX}/stripe", content=event_json(), headers={"Stripe-Signature": "t=1,v1=00"})
    assert "Deliveries are refused: their signature does not fit" in words(await page(quiet_desk))


async def test_rows_that_nothing_decides_are_listed_with_the_event_that_made_them(
    quiet_desk: httpx.AsyncClient, db: Connection
) -> None:
    assert "Every row is decided" in await page(quiet_desk, "/undecided")
    await put(db)
    await db.execute(
        "INSERT INTO billing.invoices (id, livemode, customer, last_webhook_event_id, last_event_rank, order_evidence) "
        "VALUES ('in_1', true, 'cus_1', 'evt_9', 1, 'undecided')"
    )
    assert "1 billing row is undecided" in words(await page(quiet_desk))
    said = words(await page(quiet_desk, "/undecided"))
    assert "invoice in_1 cus_1 evt_9" in said


# ── Events ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_each_filter_shows_the_events_it_names_and_no_others(
    quiet_desk: httpx.AsyncClient, db: Connection
) -> None:
    soon = datetime.now(UTC) + timedelta(minutes=5)
    await put(db, "evt_processed", age=timedelta(hours=5))
    await put(db, "evt_pending", status="pending", customer="cus_1", event_type="invoice.paid", age=timedelta(hours=4))
    await put(db, "evt_processing", status="processing", object_id="in_1", age=timedelta(hours=3))
    await put(db, "evt_dead", status="failed", account="acct_1", age=timedelta(hours=2))
    await put(db, "evt_retrying", status="failed", next_try_at=soon, customer="cus_1", age=timedelta(hours=1))
    newest_first = ["evt_retrying", "evt_dead", "evt_processing", "evt_pending", "evt_processed"]
    assert await only(quiet_desk) == newest_first
    for state in STATES:
        shown = {"failed": ["evt_retrying", "evt_dead"], "unread": []}.get(state, [f"evt_{state}"])
        assert await only(quiet_desk, status=state) == shown
    await db.execute(
        "UPDATE webhook_events SET read_due_at = now(), read_try_at = now() WHERE event_id = 'evt_pending'"
    )
    assert await only(quiet_desk, status="unread") == await only(quiet_desk, status="pending") == ["evt_pending"]
    assert "unread waits for Stripe" in words(await page(quiet_desk, "/events?status=unread")).replace("dw", "d w")
    assert await only(quiet_desk, type="invoice.paid") == ["evt_pending"]
    assert await only(quiet_desk, customer="cus_1") == ["evt_retrying", "evt_pending"]
    assert await only(quiet_desk, object="in_1") == ["evt_processing"]
    assert await only(quiet_desk, account="acct_1") == ["evt_dead"]
    assert await only(quiet_desk, customer="cus_1", status="pending") == ["evt_pending"]
    at = f"{datetime.now(UTC) - timedelta(hours=2.5):%Y-%m-%dT%H:%M}"
    assert await only(quiet_desk, since=at) == newest_first[:2]
    assert await only(quiet_desk, until=at) == newest_first[2:]
    assert await only(quiet_desk, customer=" cus_1 ", type="") == ["evt_retrying", "evt_pending"]


async def test_a_failed_event_says_in_the_list_what_its_last_error_was(
    quiet_desk: httpx.AsyncClient, db: Connection
) -> None:
    event_id = await put_dead(db)
    await put_failure(db, event_id, error_type="shop.errors.Later")
    assert "dead Later" in words(await page(quiet_desk, "/events")).replace("deadLater", "dead Later")


async def test_a_filter_that_cannot_be_meant_is_named_and_left_out(
    quiet_desk: httpx.AsyncClient, db: Connection
) -> None:
    await put(db, "evt_1")
    for query, sentence in (
        ("since=yesterday", "“yesterday” is no moment"),
        ("until=99999-01-01", "is no moment"),
        ("status=lost", "There is no status “lost”"),
        ("since=<script>", "“<script>” is no moment"),
    ):
        text = await page(quiet_desk, f"/events?{query}")
        assert sentence in words(text.replace("<script>", "")) or html.escape(sentence) in text
        assert "evt_1" in text and "<script>”" not in text
    for query in ("type=%00", "customer=a%00b", "before=nonsense", "after=AAAA", "before=%FF"):
        assert (await quiet_desk.get(f"{BASE}/events?{query}")).status_code == 200


async def test_pages_show_every_event_once_forth_and_back(quiet_desk: httpx.AsyncClient, db: Connection) -> None:
    # Many share a moment, so that a page can end between two of them.
    await db.execute(
        "INSERT INTO webhook_events (event_id, event_type, stripe_created, created_at, lane, status, outcome) "
        "SELECT 'evt_' || n, 'charge.succeeded', now(), now() - n / 7 * interval '1 second', 1, 'processed', 'ignored' "
        "FROM generate_series(1, 175) AS n"
    )
    truth = [
        name for (name,) in await db.fetch("SELECT event_id FROM webhook_events ORDER BY created_at DESC, seq DESC")
    ]

    async def turn(address: str) -> tuple[list[str], str]:
        text = (await quiet_desk.get(address)).text
        return re.findall(r'<td class="c-event">.*?<code class="id">(\w+)</code>', text), text

    def leads(text: str, relation: str) -> str | None:
        found = re.search(rf'<a class="button" rel="{relation}" href="([^"]+)"', text)
        return html.unescape(found[1]) if found else None

    address: str | None = f"{BASE}/events?type=charge.succeeded"
    forth, visited = [], []
    while address:
        shown, text = await turn(address)
        visited.append(shown)
        forth += shown
        address = leads(text, "next")
    assert forth == truth
    assert [len(shown) for shown in visited] == [50, 50, 50, 25]
    assert "That is all of them" in text
    back = [visited[-1]]
    address = leads(text, "prev")
    while address:
        shown, text = await turn(address)
        back.append(shown)
        address = leads(text, "prev")
    assert [one for shown in reversed(back) for one in shown] == truth


async def test_an_empty_list_says_what_to_do(quiet_desk: httpx.AsyncClient, db: Connection) -> None:
    assert "kamiyo trigger" in await page(quiet_desk, "/events")
    await put(db)
    assert "Clear the filters" in await page(quiet_desk, "/events?customer=cus_nobody")
    assert "There is nothing to do here" in await page(quiet_desk, "/events?status=dead")
    assert "Everything that came in has been worked on" in await page(quiet_desk, "/events?status=pending")


@pytest.mark.parametrize(
    ("typed", "leads"),
    [
        ("evt_first", "/events/evt_first"),
        ("  evt_first\n", "/events/evt_first"),
        ('"evt_first",', "/events/evt_first"),
        ("evt_fir", "/events/evt_first"),
        ("cus_1", "/customers/cus_1"),
        ("cus_only_in_events", "/customers/cus_only_in_events"),
        ("in_1", "/events?object=in_1"),
        ("ch_whole", "/events?object=ch_whole"),
        ("acct_1", "/events?account=acct_1"),
        ("https://dashboard.stripe.com/test/events/evt_first?x=1#y", "/events/evt_first"),
        ("evt_with%percent", "/events/evt_with%25percent"),
    ],
)
async def test_whatever_has_an_id_is_found_by_it(
    typed: str, leads: str, quiet_desk: httpx.AsyncClient, db: Connection
) -> None:
    await put(db, "evt_first", customer="cus_only_in_events", object_id="ch_whole", account="acct_1")
    await put(db, "evt_second")
    await put(db, "evt_with%percent")
    made = "livemode, last_webhook_event_id, last_event_rank) VALUES"
    await db.execute(f"INSERT INTO billing.customers (id, {made} ('cus_1', true, 'evt_x', 1)")
    await db.execute(f"INSERT INTO billing.invoices (id, {made} ('in_1', true, 'evt_x', 1)")
    answer = await quiet_desk.get(f"{BASE}/search", params={"q": typed})
    assert (answer.status_code, answer.headers.get("location")) == (303, BASE + leads)


async def test_what_several_things_begin_with_is_asked_back_and_what_nothing_has_is_said(
    quiet_desk: httpx.AsyncClient, db: Connection
) -> None:
    await put(db, "evt_same_1")
    await put(db, "evt_same_2")
    text = await page(quiet_desk, "/search?q=evt_same")
    assert "Which one?" in text
    assert {f"{BASE}/events/evt_same_1", f"{BASE}/events/evt_same_2"} <= set(links(text, f"{BASE}/events/"))
    # Two letters begin nearly everything.
    for typed in ("ev", "evt_nobody", "%", "_", "\\", "", "%00", "x" * 300, "/", "' OR 1=1"):
        answer = await quiet_desk.get(f"{BASE}/search", params={"q": typed})
        assert (answer.status_code, "Nothing here has this id" in answer.text) == (200, True), typed


# ── Event ───────────────────────────────────────────────────────────────────────────────────────────────────

CUSTOMER = {"id": "cus_1", "object": "customer", "email": "new@example.org", "balance": -250, "currency": "eur"}


def changes_on(text: str) -> dict[str, tuple[str, str]]:
    """The table of what an event changed: column -> (before, after)."""
    if '<table class="changes">' not in text:
        return {}
    table = text.split('<table class="changes">')[1].split("</table>")[0]
    rows = re.findall(
        r'<th scope="row">(.*?)</th>\s*<td class="was".*?>(.*?)</td>\s*<td class="is".*?>(.*?)</td>', table, re.S
    )
    return {name: (words(was), words(is_)) for name, was, is_ in rows}


async def test_an_event_shows_the_row_before_and_after_as_stripe_tells_it(
    client: httpx.AsyncClient, db: Connection
) -> None:
    previous = {"email": "old@example.org", "balance": 0, "metadata": {"plan": None}}
    thing = CUSTOMER | {"metadata": {"plan": "pro", "kept": "x"}, "created": 1_790_000_000}
    await deliver(client, event_json("evt_1", "customer.updated", thing, previous=previous))
    await settled(db, "evt_1")
    text = await page(await sign_in(client), "/events/evt_1")
    thin = "\N{NARROW NO-BREAK SPACE}"
    assert changes_on(text) == {
        "email": ("old@example.org", "new@example.org"),
        "balance": (words(f"0.00{thin}EUR"), words(f"−2.50{thin}EUR")),
        "metadata.plan": ("–", "pro"),
    }
    said = words(text)
    assert "Before: as Stripe tells it in this event. The row still stands like this." in said
    assert "billing.customers" in said
    assert "created 2026-09-21 14:13:20 UTC" in said and "metadata.kept x" in said


async def test_where_stripe_does_not_say_what_was_before_the_event_before_it_does(
    client: httpx.AsyncClient, db: Connection
) -> None:
    now = int(time.time())
    invoice = {
        "id": "in_1",
        "object": "invoice",
        "customer": "cus_1",
        "currency": "jpy",
        "status": "open",
        "total": 500,
    }
    await deliver(client, event_json("evt_1", "invoice.created", invoice | {"status": "draft"}, created=now - 20))
    await deliver(client, event_json("evt_2", "invoice.finalized", invoice, created=now - 10))
    await deliver(client, event_json("evt_3", "invoice.paid", invoice | {"status": "paid"}, created=now))
    await settled(db, "evt_3")
    await sign_in(client)
    first = await page(client, "/events/evt_1")
    assert "nothing was there before" in words(first) and changes_on(first)["status"] == ("nothing", "draftnow paid")
    second = await page(client, "/events/evt_2")
    assert changes_on(second) == {"status": ("draft", "opennow paid")}
    assert "Before: as evt_1 had left it" in words(second)
    assert "The row has moved on: evt_3 made it what it is now" in words(second)
    third = await page(client, "/events/evt_3")
    assert changes_on(third) == {"status": ("open", "paid")}
    assert "500\N{NARROW NO-BREAK SPACE}JPY" in third


async def test_an_event_that_changes_no_row_says_so_and_one_whose_row_is_gone_as_well(
    client: httpx.AsyncClient, db: Connection
) -> None:
    await deliver(client, event_json("evt_1", "charge.succeeded"))
    await deliver(client, event_json("evt_2", "customer.updated", CUSTOMER))
    await settled(db, "evt_2")
    await sign_in(client)
    assert "No billing row: events of this type are kept" in words(await page(client, "/events/evt_1"))
    await db.execute(
        "INSERT INTO stripe_objects (id, object, livemode, data, last_webhook_event_id, updated_at, last_event_rank, "
        "deletion_rank, order_evidence) VALUES "
        "('ch_1', 'charge', false, '{}', 'evt_1', now(), 1, 1, 'undecided'), "
        "('cus_1', 'customer', false, '{}', 'evt_3', now(), 1, NULL, 'decided')"
    )
    text = words(await page(client, "/events/evt_1"))
    assert "No billing row: of this object the latest state is kept as JSON" in text
    assert "Its row in stripe_objects stands as this event showed it. Stripe has said that the object is gone." in text
    assert "Its order is undecided" in text
    assert "Its row in stripe_objects stands as evt_3 showed it." in words(await page(client, "/events/evt_2"))
    await db.execute("DELETE FROM billing.customers")
    text = words(await page(client, "/events/evt_2"))
    assert "What was there before is not known" in text and "There is no row in the table" in text


async def test_a_failed_event_says_why_in_every_try_and_whether_it_may_be_retried(
    client: httpx.AsyncClient, db: Connection
) -> None:
    @handlers.on("customer.created")
    async def fail(event: Event, db: Connection) -> None:
        raise LookupError(f"try {event.attempt}: no <plan> & more")

    await deliver(client, event_json("evt_1", "customer.created", CUSTOMER))
    await until(lambda: db.fetchval("SELECT event_id FROM webhook_events WHERE attempts = 5 AND status = 'failed'"))
    text = await page(await sign_in(client), "/events/evt_1")
    said = words(text)
    assert "Dead after 5 tries LookupError test_dashboard.py:" in said
    for attempt in range(1, 6):
        assert f"try {attempt}: no <plan> & more" in said
        assert f'aria-label="Traceback of try {attempt}"' in text
    assert "<plan>" not in text
    assert text.count("Traceback (most recent call last)") == 5
    assert "in fail raise LookupError" in " ".join(said.split())
    assert "May I retry it? Yes, once the cause is mended" in said
    assert "The billing row is right already; only the handler has to catch up." in said


@pytest.mark.parametrize(
    ("error_type", "answer"),
    [
        ("ValueError", "yes"),
        ("PayloadGone", "no"),
        ("Bury", "careful"),
        ("WorkerDied", "careful"),
        ("HandlerTimeout", "careful"),
        ("kamiyo.projections.ProjectionError", "careful"),
    ],
)
def test_the_advice_depends_on_what_went_wrong(error_type: str, answer: str) -> None:
    advice = attention.advice(error_type)
    assert advice.answer == answer and advice.title
    # A handler may have sent a mail before it failed; nobody should have to find that out afterwards.
    assert any("a second time" in note for note in advice.notes) == (answer != "no")


async def test_a_retry_runs_the_event_again(client: httpx.AsyncClient, db: Connection) -> None:
    works = False

    @handlers.on("order.shipped")
    async def ship(event: Event, db: Connection) -> None:
        if not works:
            raise Bury("the printer is out of paper")

    await deliver(client, event_json("evt_1", "order.shipped"))
    await settled(db, "evt_1", "failed")
    await sign_in(client)
    works = True
    answer = await press(client, "/events/evt_1", "/events/evt_1/retry")
    assert (answer.status_code, answer.headers["location"]) == (303, f"{BASE}/events/evt_1?said=retry")
    await settled(db, "evt_1", "processed")
    assert "Back in line, with five new tries." in words(await page(client, "/events/evt_1?said=retry"))
    text = await page(client, "/events/evt_1")
    assert "the printer is out of paper" in text
    assert 'action="/dashboard/events/evt_1/retry"' not in text
    [done] = await db.fetch("SELECT action, filters FROM webhook_audit")
    assert (done["action"], json.loads(done["filters"])) == ("retry", {"event_id": "evt_1"})
    assert "evt_1" in words(await page(client, "/failures")).partition("Done by hand")[2]


async def test_a_retry_of_what_is_not_failed_any_more_does_nothing_and_says_so(
    quiet_desk: httpx.AsyncClient, db: Connection
) -> None:
    await put(db, "evt_1")
    token = {"token": token_of(await page(quiet_desk))}
    answer = await quiet_desk.post(f"{BASE}/events/evt_1/retry", data=token)
    assert answer.headers["location"] == f"{BASE}/events/evt_1?said=not-failed"
    assert "nothing was done" in await page(quiet_desk, "/events/evt_1?said=not-failed")
    assert (await quiet_desk.post(f"{BASE}/events/evt_nobody/retry", data=token)).status_code == 404
    # What a page says after an action is one of its own sentences, whatever the address says.
    assert "hello" not in await page(quiet_desk, "/events/evt_1?said=hello")


async def test_an_event_looks_again_by_itself_only_until_it_is_settled(
    quiet_desk: httpx.AsyncClient, db: Connection
) -> None:
    await put(db, "evt_1", status="pending", processed_at=None)
    assert 'data-live="3"' in await page(quiet_desk, "/events/evt_1")
    await put(db, "evt_2")
    text = await page(quiet_desk, "/events/evt_2")
    assert 'data-live="0"' in text and "http-equiv" not in text


async def test_an_event_that_will_be_tried_again_says_when(client: httpx.AsyncClient, db: Connection) -> None:
    @handlers.on("order.shipped")
    async def later(event: Event, db: Connection) -> None:
        raise Retry(after=3600, reason="closed at night")

    await deliver(client, event_json("evt_1", "order.shipped"))
    await settled(db, "evt_1", "failed")
    said = words(await page(await sign_in(client), "/events/evt_1"))
    assert "Failed, tried again in 60 min" in said and "closed at night" in said and "Retry now" in said


async def test_the_payload_is_a_tree_whose_ids_lead_on_and_whose_moments_are_in_words(
    quiet_desk: httpx.AsyncClient,
) -> None:
    thing = {
        **{"id": "ch_12345678", "object": "charge", "created": 1_790_000_000, "amount": 1_790_000_000},
        **{"nothing": None, "yes": True, "list": [1, 2.5, "x"], "empty": {}, "customer": "cus_12345678"},
    }
    await deliver(quiet_desk, event_json("evt_1", "charge.succeeded", thing))
    text = await page(quiet_desk, "/events/evt_1")
    tree = text[text.index('<ul class="tree">') :]
    assert f'<a class="v id" href="{BASE}/search?q=cus_12345678">cus_12345678</a>' in tree
    said = words(tree)
    assert "created 1790000000 2026-09-21 14:13:20 UTC" in said
    assert "amount 1790000000 nothing null yes true" in said
    assert "list[ 3 items ] 0 1 1 2.5 2 x empty{ }" in said.replace("list [", "list[").replace("empty {", "empty{")


async def test_what_stripes_customers_write_is_text_and_never_markup(
    quiet_desk: httpx.AsyncClient, db: Connection
) -> None:
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
    thing = CUSTOMER | {"name": evil, "email": evil, "description": evil, "metadata": {evil: evil}}
    body = event_json("evt_1", "customer.updated", thing, previous={"name": "a" + evil})
    assert (await deliver(quiet_desk, body)).status_code == 200
    await put(db, evil, event_type=evil, object_id=evil, customer="cus_1", status="failed")
    await put_failure(db, evil, error_type=evil, error_message=evil, traceback=evil)
    for path in (
        "",
        "/events",
        "/events/evt_1",
        "/customers/cus_1",
        "/failures",
        "/failures/abc",
        "/failures/abc/retry",
    ):
        text = await page(quiet_desk, path)
        assert "<script>alert" not in text and "<img" not in text, path
    found = links(await page(quiet_desk, "/events"), f"{BASE}/events/%3C")[0]
    answer = await quiet_desk.get(found)
    assert (answer.status_code, "<script>alert" in answer.text, "<img" in answer.text) == (200, False, False)
    raw = await quiet_desk.get(f"{BASE}/events/evt_1/body")
    assert raw.content == body
    assert raw.headers["content-type"] == "text/plain; charset=utf-8"
    assert raw.headers["x-content-type-options"] == "nosniff"


async def test_a_payload_that_is_too_large_or_too_deep_for_a_tree_is_shown_as_it_came(
    quiet_desk: httpx.AsyncClient,
) -> None:
    deep: Any = "x"
    for _ in range(payload.MOST_LEVELS + 5):
        deep = [deep]
    await deliver(quiet_desk, event_json("evt_deep", "order.shipped", {"id": "or_1", "deep": deep}))
    wide = {"id": "or_1", "many": list(range(payload.MOST_VALUES))}
    await deliver(quiet_desk, event_json("evt_wide", "order.shipped", wide))
    number = event_json("evt_number", "order.shipped", {"id": "or_1", "n": 7}).replace(
        b'"n": 7', b'"n": 1' + b"0" * 5000
    )
    await deliver(quiet_desk, number)
    for event_id in ("evt_deep", "evt_wide", "evt_number"):
        text = await page(quiet_desk, f"/events/{event_id}")
        assert "to be shown as a tree" in text and links(text, f"{BASE}/events/{event_id}/body")


async def test_an_event_whose_body_was_removed_says_so(quiet_desk: httpx.AsyncClient, db: Connection) -> None:
    await put(db, "evt_1", object_id="cus_1", object_type="customer", event_type="customer.updated")
    assert "The body was removed by retention" in await page(quiet_desk, "/events/evt_1")
    assert "removed by retention" in await page(quiet_desk, "/events/evt_1/body", status=404)


async def test_an_event_stands_among_its_customers_others(quiet_desk: httpx.AsyncClient, db: Connection) -> None:
    for n in range(12):
        await put(db, f"evt_{n:02}", customer="cus_1", object_id=f"in_{n}", age=timedelta(minutes=n))
    await put(db, "evt_other", customer="cus_2")
    around = (await page(quiet_desk, "/events/evt_06")).split('<ol class="around">')[1].split("</ol>")[0]
    assert re.findall(r">(in_\d+)<", around) == [f"in_{n}" for n in range(1, 12)]
    assert re.search(r'aria-current="true".*?in_6<', around.replace("\n", ""))
    nobody = [await put(db, object_id="ch_1", age=timedelta(minutes=n)) for n in range(3)]
    text = await page(quiet_desk, f"/events/{nobody[1]}")
    assert "Around it, of the same object" in words(text)
    assert {f"{BASE}/events/{nobody[0]}", f"{BASE}/events/{nobody[2]}"} <= set(links(text, f"{BASE}/events/evt"))


@pytest.mark.parametrize(
    "path", ["/events/evt_none", "/events/a%00b", f"/events/{'x' * 300}", "/customers/cus_none", "/customers/%00"]
)
async def test_what_is_not_there_is_a_page_that_says_so(path: str, quiet_desk: httpx.AsyncClient) -> None:
    assert "Not found" in await page(quiet_desk, path, status=404)


@pytest.mark.parametrize("path", ["/failures/zzz", "/failures/zzz/retry", "/replays/7", "/replays/x", "/replays/²"])
async def test_a_cause_or_a_replay_that_is_not_known_is_a_page_that_says_so(
    path: str, quiet_desk: httpx.AsyncClient
) -> None:
    assert "Not found" in await page(quiet_desk, path, status=404)


async def test_an_id_with_a_slash_in_it_has_its_page(quiet_desk: httpx.AsyncClient, db: Connection) -> None:
    await put(db, "evt/1 ?&#", customer="cus/1 ?")
    [first] = links(await page(quiet_desk, "/events"), f"{BASE}/events/evt")
    assert (await quiet_desk.get(first)).status_code == 200
    [whose] = links(await page(quiet_desk, "/events"), f"{BASE}/customers/cus")
    assert "cus/1 ?" in words((await quiet_desk.get(whose)).text)


# ── Failures ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_failures_are_grouped_by_cause_with_count_first_and_last_seen_and_an_example(
    quiet_desk: httpx.AsyncClient, db: Connection
) -> None:
    now = datetime.now(UTC)
    for n in range(3):
        event_id = await put(db, status="failed", event_type="invoice.paid", next_try_at=now if n == 0 else None)
        await put_failure(db, event_id, "aaa", created_at=now - timedelta(hours=5 - n), retry_count=1)
        await put_failure(db, event_id, "aaa", created_at=now - timedelta(minutes=5 - n))
    last = await put_dead(db, "bbb", event_type="order.shipped")
    went_through = await put(db)
    await put_failure(db, went_through, "ccc")
    text = await page(quiet_desk, "/failures")
    groups = text.split('<li class="group')[1:]
    first, second = (words("<li " + group) for group in groups)
    assert "shop.errors.Oops billing.py:41 in grant no such plan invoice.paid" in first
    assert "first seen 5 h ago · last 3 min ago · example evt_" in first and "32 dead" in first.replace(" ", "", 1)
    assert f"example {last}" in second and "1dead" in second
    assert "ccc" not in text
    assert "2 causes · 4 events failed now, 3 of them dead" in words(text)


async def test_an_event_counts_for_its_last_cause_alone(quiet_desk: httpx.AsyncClient, db: Connection) -> None:
    event_id = await put_dead(db, "old")
    await put_failure(db, event_id, "new", error_type="Newer")
    groups = await queries.groups(db)
    assert [(group.fingerprint, group.events) for group in groups] == [("new", 1)]
    assert [row["event_id"] for row in await queries.group_events(db, "new")] == [event_id]
    assert await queries.group_events(db, "old") == []
    assert "No event is failed for this reason now" in await page(quiet_desk, "/failures/old")


async def test_without_failures_the_page_says_what_would_be_here(quiet_desk: httpx.AsyncClient) -> None:
    text = words(await page(quiet_desk, "/failures"))
    assert "Nothing is failed" in text and "Nobody has retried" in text


async def test_a_cause_shows_an_example_with_its_traceback_and_the_events_it_holds_up(
    quiet_desk: httpx.AsyncClient, db: Connection
) -> None:
    ids = [await put_dead(db) for _ in range(27)]
    text = await page(quiet_desk, "/failures/abc")
    assert "Traceback (most recent call last)" in text and "More than 25 events" in words(text)
    assert len(set(ids) & set(re.findall(r"evt_\w+", text))) == 25
    assert "May I retry these?" in words(text)


@pytest.fixture
async def broken(client: httpx.AsyncClient, db: Connection) -> AsyncIterator[dict[str, Any]]:
    """Seven events that a handler gave up, and the handler's switch: `works`."""
    switch: dict[str, Any] = {"works": False}

    @handlers.on("order.shipped")
    async def ship(event: Event, db: Connection) -> None:
        if not switch["works"]:
            raise Bury("no paper")

    for n in range(7):
        await deliver(client, event_json(f"evt_{n}", "order.shipped", {"id": f"or_{n}", "object": "order"}))
    for n in range(7):
        await settled(db, f"evt_{n}", "failed")
    switch["fingerprint"] = await db.fetchval("SELECT fingerprint FROM webhook_failures LIMIT 1")
    yield switch


async def test_retry_these_counts_first_then_runs_all_of_them_and_shows_how_far_it_is(
    broken: dict[str, Any], desk: httpx.AsyncClient, db: Connection, log: Log
) -> None:
    cause = f"/failures/{broken['fingerprint']}"
    confirm = words(await page(desk, f"{cause}/retry"))
    assert "Retry 7 events?" in confirm and "All 7 are put back in line" in confirm
    assert await db.fetchval("SELECT count(*) FROM webhook_events WHERE status = 'failed'") == 7
    broken["works"] = True
    answer = await press(desk, f"{cause}/retry", f"{cause}/retry")
    assert answer.status_code == 303 and answer.headers["location"].startswith(f"{BASE}/replays/")
    place = answer.headers["location"].removeprefix(BASE)

    async def done() -> bool:
        return "All of them went through" in await page(desk, place)

    await until(done)
    text = words(await page(desk, place))
    assert "Back in line7 of 7" in text.replace(" 7 of", "7 of") and "Processed7 Waiting0 Failed again0" in re.sub(
        r" (\d)", r"\1", text.partition("Processed since")[2]
    )
    assert 'data-live="0"' in await page(desk, place)
    assert await db.fetchval("SELECT count(*) FROM webhook_events WHERE status = 'processed'") == 7
    [row] = await db.fetch("SELECT action, count FROM webhook_audit")
    assert (row["action"], row["count"]) == ("replay", 7)
    assert "Nothing to retry" in await page(desk, f"{cause}/retry")


async def test_those_that_fail_again_are_counted_as_such(
    broken: dict[str, Any], desk: httpx.AsyncClient, db: Connection
) -> None:
    cause = f"/failures/{broken['fingerprint']}"
    answer = await press(desk, f"{cause}/retry", f"{cause}/retry")
    place = answer.headers["location"].removeprefix(BASE)

    async def failed_again() -> str | None:
        text = words(await page(desk, place))
        return text if re.search(r"Failed again ?7", text) else None

    text = await until(failed_again)
    assert text is not None and "Those that failed again have new tries of their own" in text


async def test_of_a_replay_of_very_many_the_first_are_followed_and_the_page_says_so(
    quiet_desk: httpx.AsyncClient, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(5):
        await put_dead(db)
    number = await queries.begin_replay(db, "abc", 5)
    assert "0 of 5" in words(await page(quiet_desk, f"/replays/{number}"))
    monkeypatch.setattr(queries, "MOST_FOLLOWED", 3)
    shown = words(await page(quiet_desk, f"/replays/{number}"))
    assert "0 of the first 3" in shown and "So many that only the first 3 are followed here" in shown


async def test_a_replay_whose_server_is_gone_says_so_and_offers_the_rest(
    quiet_desk: httpx.AsyncClient, db: Connection
) -> None:
    for _ in range(3):
        await put_dead(db)
    number = await queries.begin_replay(db, "abc", 5)
    await queries.tell_replay(db, number, 2)
    assert "Putting them back in line…" in await page(quiet_desk, f"/replays/{number}")
    await db.execute(
        "UPDATE webhook_replays SET heard_at = now() - $1::interval", timedelta(seconds=background.SILENT_SECONDS + 5)
    )
    text = await page(quiet_desk, f"/replays/{number}")
    said = words(text)
    assert "Stopped half-way" in said and "2 of 5" in said and "has not been heard of" in said
    assert links(text, f"{BASE}/failures/abc/retry") and 'data-live="0"' in text


async def test_a_replay_that_the_database_stops_says_where_it_stopped(
    quiet_desk: httpx.AsyncClient, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put_dead(db)

    async def refuse(db: Connection, filters: Any, fingerprint: Any, *, progress: Any) -> int:
        progress(1)
        await db.execute("SELECT 1 / 0")
        return 1

    monkeypatch.setattr(inbox, "replay", refuse)
    answer = await press(quiet_desk, "/failures/abc/retry", "/failures/abc/retry")
    place = answer.headers["location"].removeprefix(BASE)

    async def stopped() -> bool:
        return "Stopped half-way" in await page(quiet_desk, place)

    await until(stopped)
    assert "DivisionByZeroError" in await page(quiet_desk, place)


async def test_a_stopping_server_leaves_what_is_back_in_line_there_and_the_rest_failed(
    database_url: str, settings: MakeSettings, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = asyncio.Event()

    async def endless(db: Connection, filters: Any, fingerprint: Any, *, progress: Any) -> int:
        begun.set()
        await asyncio.Event().wait()
        return 0

    await put_dead(db)
    monkeypatch.setattr(inbox, "replay", endless)
    async with running_client(create_app(settings(KAMIYO_WORKER=False))) as client:
        await sign_in(client)
        await press(client, "/failures/abc/retry", "/failures/abc/retry")
        await begun.wait()
    # It came back, and nothing of it hangs on.
    assert await db.fetchval("SELECT finished_at IS NULL FROM webhook_replays")
    assert await db.fetchval("SELECT status FROM webhook_events") == "failed"


# ── Customer ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_customer_is_what_stripe_last_said_of_them_and_their_events_as_a_time_line(
    client: httpx.AsyncClient, db: Connection
) -> None:
    now = int(time.time())
    subscription = {
        **{"id": "sub_1", "object": "subscription", "customer": "cus_1", "status": "past_due", "currency": "eur"},
        "items": {"data": [{"id": "si_1", "price": {"id": "price_pro"}, "quantity": 3}]},
        "current_period_end": now + 86400 * 10,
    }
    invoice = {
        **{
            "id": "in_1",
            "object": "invoice",
            "customer": "cus_1",
            "status": "open",
            "currency": "eur",
            "number": "A-1",
        },
        **{"total": 4900, "amount_remaining": 4900, "attempt_count": 2, "created": now},
    }
    card = {
        **{"id": "pm_1", "object": "payment_method", "customer": "cus_1", "type": "card"},
        "card": {"brand": "visa", "last4": "4242", "exp_month": 4, "exp_year": 2030, "funding": "credit"},
    }
    person = CUSTOMER | {"name": "Ada Lovelace", "invoice_settings": {"default_payment_method": "pm_1"}}
    for event_id, kind, thing, previous in (
        ("evt_1", "customer.created", person, None),
        ("evt_2", "payment_method.attached", card, None),
        ("evt_3", "customer.subscription.updated", subscription, {"status": "active"}),
        ("evt_4", "invoice.payment_failed", invoice, None),
    ):
        await deliver(client, event_json(event_id, kind, thing, previous=previous, created=now))
        await settled(db, event_id)
    text = await page(await sign_in(client), "/customers/cus_1")
    said = words(text)
    assert "Customer Ada Lovelace cus_1" in said and "new@example.org" in said
    assert "past due price_pro × 3" in said.replace("past dueprice_pro", "past due price_pro")
    assert "Paid period ends in 10 d" in said
    assert "open A-1 in_1 49.00" in said and "2 attempts" in said
    assert "Visa •••• 4242" in said and "default" in said and "Expires 04/2030 · credit" in said
    assert "as evt_3 said" in said
    line = text.split("<h2>Their events</h2>")[1]
    assert re.findall(rf'href="{BASE}/events/(evt_\d)"', line) == ["evt_4", "evt_3", "evt_2", "evt_1"]
    assert "status active → past_due" in words(line)


async def test_a_customer_of_whom_only_events_are_known_has_a_page(
    quiet_desk: httpx.AsyncClient, db: Connection
) -> None:
    await put(db, "evt_1", customer="cus_1", object_id="ch_1")
    said = words(await page(quiet_desk, "/customers/cus_1"))
    assert "there is no row in billing.customers" in said and "charge.succeeded" in said


async def test_a_time_line_of_many_events_has_pages(quiet_desk: httpx.AsyncClient, db: Connection) -> None:
    ids = [await put(db, f"evt_{n:03}", customer="cus_1", age=timedelta(minutes=n)) for n in range(70)]
    address: str | None = f"{BASE}/customers/cus_1"
    seen: list[str] = []
    while address:
        text = (await quiet_desk.get(address)).text
        seen += re.findall(r'<a class="type" href="/dashboard/events/(evt_\d+)"', text)
        found = re.search(r'rel="next" href="([^"]+)"', text)
        address = html.unescape(found[1]) if found else None
    assert seen == ids


async def test_one_id_in_several_accounts_and_modes_is_as_many_customers_and_none_shows_anything_of_another(
    quiet_desk: httpx.AsyncClient, db: Connection
) -> None:
    everyone = {("", True): "Live Ada", ("", False): "Test Ada", ("acct_1", True): "Bela of acct_1"}
    for (account, livemode), name in everyone.items():
        mine = (account, livemode, name.replace(" ", "_"))
        await db.execute(
            "INSERT INTO billing.customers (id, account, livemode, name, last_webhook_event_id, last_event_rank) "
            "VALUES ('cus_1', $1, $2, $3, 'evt_1', 1)",
            *(account, livemode, name),
        )
        for table in ("subscriptions", "invoices", "payment_methods"):
            await db.execute(
                f"INSERT INTO billing.{table} "  # noqa: S608 - names of ours
                "(id, account, livemode, customer, last_webhook_event_id, last_event_rank) "
                "VALUES ($3 || '_thing', $1, $2, 'cus_1', 'evt_1', 1)",
                *mine,
            )
        await db.execute(
            "INSERT INTO webhook_events (event_id, event_type, stripe_created, lane, account, livemode, customer, "
            "next_try_at) VALUES ($3 || '_event', 'customer.updated', now(), 1, $1, $2, 'cus_1', now())",
            *mine,
        )
    for (account, livemode), name in everyone.items():
        query = f"?account={account or 'own'}&mode={'live' if livemode else 'test'}"
        text = await page(quiet_desk, f"/customers/cus_1{query}")
        shown = {other for other in everyone.values() if other in text or other.replace(" ", "_") in text}
        assert shown == {name}
        assert text.count(name.replace(" ", "_") + "_thing") >= 3 and f"{name.replace(' ', '_')}_event" in text
        # The others are named as what they are, and the list of their events is theirs alone.
        assert len(links(text, f"{BASE}/customers/cus_1?account=")) == 2
        [theirs] = links(text, f"{BASE}/events?customer=cus_1")
        listed = (await quiet_desk.get(html.unescape(theirs))).text
        assert f"{name.replace(' ', '_')}_event" in listed
        assert not account or "Ada" not in listed
    assert "Live Ada" in await page(quiet_desk, "/customers/cus_1")
    lists = await page(quiet_desk, "/events?customer=cus_1&account=own&mode=test")
    assert "Test_Ada_event" in lists and "Live_Ada" not in lists and "Bela" not in lists


# ── Wording and pictures ────────────────────────────────────────────────────────────────────────────────────


def test_amounts_are_in_the_currencys_own_units() -> None:
    thin = "\N{NARROW NO-BREAK SPACE}"
    assert wording.money(104900, "eur") == f"1{thin}049.00{thin}EUR"
    assert wording.money(-5, "usd") == f"−0.05{thin}USD"
    assert wording.money(500, "jpy") == f"500{thin}JPY"
    assert wording.money(1234, "kwd") == f"1.234{thin}KWD"
    assert wording.money(7, None) == "7"
    assert wording.money(None, "eur") == "–"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        *(
            (0.2, "now"),
            (12, "12 s ago"),
            (-40, "in 40 s"),
            (150, "2 min ago"),
            (5399, "90 min ago"),
            (5400, "2 h ago"),
        ),
        *((35 * 3600, "35 h ago"), (36 * 3600, "2 d ago"), (-86400 * 30, "in 30 d")),
    ],
)
def test_how_long_ago_is_said_in_the_largest_unit_that_fits(seconds: float, said: str) -> None:
    now = datetime(2026, 11, 23, 3, 0, tzinfo=UTC)
    assert wording.relative(now - timedelta(seconds=seconds), now) == said


def test_a_moment_carries_its_exact_time_in_utc() -> None:
    moment = datetime.fromisoformat("2026-11-23T04:05:06.789012+02:00")
    text = wording.when(moment, moment + timedelta(seconds=5))
    assert text == (
        '<time datetime="2026-11-23T02:05:06.789012+00:00" title="2026-11-23 02:05:06.789 UTC" data-rel>5 s ago</time>'
    )


@pytest.mark.parametrize(
    ("highest", "end"), [(0, 1), (1, 1), (3, 5), (10, 10), (11, 20), (21, 25), (26, 50), (51, 100), (0.03, 0.05)]
)
def test_an_axis_ends_at_a_round_number_that_holds_everything(highest: float, end: float) -> None:
    assert charts.ceiling(highest) == pytest.approx(end)


def test_columns_stand_on_one_another_and_a_line_breaks_where_nothing_is_known() -> None:
    stack = [charts.Series("good", [6, 0]), charts.Series("bad", [4, 1])]
    drawn = charts.columns(stack, 10, ["a", "<b>"], "what & when")
    assert '<rect class="good" x="1" y="40.00" width="8" height="60.00"/>' in drawn
    assert '<rect class="bad" x="1" y="0.00" width="8" height="40.00"/>' in drawn
    assert "<title>&lt;b&gt;</title>" in drawn and 'aria-label="what &amp; when"' in drawn
    line = charts.line(charts.Series("info", [1, 2, None, 2, None]), 2, list("abcde"), "x")
    assert line.count('class="line info"') == 2
    assert 'd="M5 50.00L15 0.00"' in line and 'd="M31 0.00L39 0.00"' in line


@pytest.mark.parametrize(
    ("traceback", "place"),
    [
        (
            '  File "/srv/a/billing.py", line 4, in grant\n  File "C:\\b\\mail.py", line 41, in <lambda>\nX',
            "mail.py:41 in <lambda>",
        ),
        ("", None),
        ("no frames here", None),
    ],
)
def test_the_place_of_an_error_is_its_last_frame(traceback: str, place: str | None) -> None:
    assert queries.place_of(traceback) == place
    moment = datetime.now(UTC)
    group = Group("abc", "shop.errors.Oops", "", traceback, "evt_1", moment, moment)
    assert (group.module, group.name, group.where) == ("shop.errors.", "Oops", place)


def test_a_position_survives_its_way_through_an_address_to_the_microsecond() -> None:
    at = datetime(2026, 11, 23, 1, 2, 3, 456789, tzinfo=UTC)
    assert pages._position(pages._cursor((at, 7))) == (at, 7)
    for nonsense in (None, "", "x", "A" * 400, "é", "====", "!!!!"):
        assert pages._position(nonsense) is None


# ── How it is found ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def ledger_url(new_database: NewDatabase) -> str:
    """A database with 20 000 events: enough that PostgreSQL chooses as it would among ten million."""
    url = new_database()

    async def fill() -> None:
        db = await database.connect(url, application="tests")
        await db.execute("""
            INSERT INTO webhook_events (event_id, event_type, stripe_created, created_at, lane, status, outcome,
                processed_at, failed_at, next_try_at, object_type, object_id, customer, account)
            SELECT 'evt_' || n, 'type.' || n % 12, t, t, 1,
                   CASE WHEN n % 100 = 0 THEN 'failed' WHEN n % 997 = 0 THEN 'pending' ELSE 'processed' END,
                   CASE WHEN n % 100 <> 0 AND n % 997 <> 0 THEN 'projected' END,
                   t, CASE WHEN n % 100 = 0 THEN t END,
                   CASE WHEN n % 300 = 0 OR n % 997 = 0 AND n % 100 <> 0 THEN t END,
                   'invoice', 'in_' || n / 5, 'cus_' || n % 700,
                   CASE WHEN n % 50 = 0 THEN 'acct_' || n % 1000 ELSE '' END
            FROM (SELECT n, now() - n * interval '1 minute' AS t FROM generate_series(1, 20000) AS n) AS events;
            INSERT INTO webhook_failures (event_id, event_type, retry_count, error_type, error_message, fingerprint)
            SELECT event_id, event_type, n, 'Oops', 'no', 'f' || length(event_id) FROM webhook_events,
                   generate_series(1, 5) AS n WHERE failed_at IS NOT NULL;
            INSERT INTO billing.customers (id, livemode, last_webhook_event_id, last_event_rank)
            SELECT 'cus_' || n, true, 'evt_1', 1 FROM generate_series(1, 20000) AS n;
            INSERT INTO billing.invoices (id, livemode, customer, last_webhook_event_id, last_event_rank)
            SELECT 'in_' || n, true, 'cus_' || n % 700, 'evt_1', 1 FROM generate_series(1, 20000) AS n;
            INSERT INTO billing.subscriptions (id, livemode, customer, last_webhook_event_id, last_event_rank)
            SELECT 'sub_' || n, true, 'cus_' || n % 700, 'evt_1', 1 FROM generate_series(1, 20000) AS n;
            INSERT INTO billing.payment_methods (id, livemode, customer, last_webhook_event_id, last_event_rank)
            SELECT 'pm_' || n, true, 'cus_' || n % 700, 'evt_1', 1 FROM generate_series(1, 20000) AS n;
            SELECT webhook_fold_counts();
        """)
        await db.execute("VACUUM ANALYZE")
        await db.close()

    run_apart(fill())
    return url


@pytest.fixture
async def ledger(ledger_url: str) -> AsyncIterator[Connection]:
    """A connection to the large ledger."""
    db = await database.connect(ledger_url, application="tests")
    yield db
    await db.close()


def position() -> tuple[datetime, int]:
    return datetime.now(UTC) - timedelta(days=10), 5


SEARCHES = [
    Search(),
    *(Search(status=state) for state in STATES),
    Search(type="type.3"),
    Search(type="type.none"),
    Search(customer="cus_5"),
    Search(object="in_5"),
    Search(account="acct_50"),
    Search(account="acct_none"),
    Search(account=""),
    Search(context="acct_50/acct_5"),
    Search(customer="cus_5", account="", livemode=True),
    Search(status="failed", type="type.4"),
    Search(status="dead", customer="cus_5"),
    Search(status="pending", type="type.4"),
    Search(since=position()[0], until=position()[0] + timedelta(days=1)),
    Search(type="type.3", since=position()[0]),
]


async def plan(db: Connection, name: str, *values: Any) -> str:
    """How PostgreSQL answers a question of the dashboard, as text."""
    async with db.transaction(readonly=True):
        await queries.limit(db, 5)
        of_alerts = name.removeprefix("alerts: ")
        query = queries._SQL[name] if of_alerts == name else alerts._SQL[of_alerts]
        return "\n".join(line for (line,) in await db.fetch("EXPLAIN " + query, *values))


def narrowed(search: Search) -> str:
    """What the search is narrowed to, without its moments: a name that every process gives alike."""
    by = {name: value for name, value in asdict(search).items() if value}
    return " ".join(name if isinstance(value, datetime) else f"{name}={value}" for name, value in by.items())


@pytest.mark.parametrize("search", SEARCHES, ids=narrowed)
async def test_a_page_of_events_is_found_by_an_index_whatever_it_is_narrowed_to(
    search: Search, ledger: Connection
) -> None:
    for name, at in (("events", (None, None)), ("events", position()), ("newer_events", position())):
        found = await plan(ledger, name, *search.values(), *at, queries.PAGE + 1)
        assert "Seq Scan on webhook" not in found, found
        assert "Scan" in found


_QUESTIONS: list[tuple[str, tuple[Any, ...]]] = [
    ("dead", (queries.MOST_COUNTED,)),
    ("standing", (queries.MOST_COUNTED,)),
    ("groups", (queries.MOST_GROUPED, False)),
    ("groups", (2000, True)),
    ("failed_counts", (queries.MOST_GROUPED,)),
    ("group_example", ("f8",)),
    ("found", ("evt_77", "evt_77\U0010ffff", 10)),
    ("found", ("cus_77", "cus_77\x01", 10)),
    ("around_customer", ("cus_5", *position(), 5, "", False)),
    ("around_object", ("in_5", *position(), 5, "", False)),
    ("earlier_of_object", ("in_5", "", False, position()[0], "evt_1")),
    ("whose_customer", ("cus_5",)),
    ("customer", ("cus_5", "", False)),
    ("subscriptions", ("cus_5", "", False, 25)),
    ("invoices", ("cus_5", "", False, 25)),
    ("payment_methods", ("cus_5", "", False, 25)),
    ("timeline", ("cus_5", "", False, *position(), 31)),
    ("undecided", (100,)),
    ("now_customers", ("cus_5", "", True)),
    ("now_subscriptions", ("sub_5", "", True)),
    ("now_invoices", ("in_5", "", True)),
    ("now_payment_methods", ("pm_5", "", True)),
    ("mirrored", ("in_5", "invoice", "", True)),
    ("group_events", ("f8", queries.PAGE)),
    ("replay_outcome", ("f8", position()[0], queries.MOST_FOLLOWED)),
    ("traffic_by_minute", (position()[0], 60)),
    ("traffic_by_hour", (position()[0], 3600)),
    ("types", (position()[0], 12)),
    ("day", ()),
    ("known_types", ()),
    ("alerts: dead", ()),
    ("alerts: failure_rates", ()),
    ("alerts: overdue", ()),
    ("alerts: reads_overdue", ()),
    ("alerts: never_came", ()),
    ("alerts: silence", ()),
    ("alerts: to_tell", ()),
]

#: Questions to small tables of their own, and statements that are none.
_SMALL = {
    *("events", "newer_events", "limits"),  # asked above, and a setting
    *("backlog", "sample_backlog", "by_hand", "begin_replay", "tell_replay", "end_replay", "replay"),
    *(f"alerts: {name}" for name in ("alone", "open", "close", "close_bursts", "forget_untold")),
    *(f"alerts: {name}" for name in ("told", "told_over", "missed", "stripe_refuses")),
}


@pytest.mark.parametrize(
    ("name", "values"),
    _QUESTIONS,
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_every_other_question_is_answered_by_an_index_too(
    name: str, values: tuple[Any, ...], ledger: Connection
) -> None:
    found = await plan(ledger, name, *values)
    for table in ("webhook_events", "webhook_payloads", "customers", "subscriptions", "invoices", "payment_methods"):
        assert not re.search(rf"Seq Scan on {table}\b", found), found


def test_no_question_of_the_pages_or_of_the_alerts_is_left_out() -> None:
    every = {*queries._SQL, *(f"alerts: {name}" for name in alerts._SQL)}
    assert every == {name for name, _ in _QUESTIONS} | _SMALL


async def test_the_first_page_reads_a_few_thousand_events_at_most_however_many_there_are(ledger: Connection) -> None:
    # 20 000 stand for ten million: nothing of the first page grows with them but what is failed or waits, and that
    # is counted to a bound.
    for name, values in (("standing", (queries.MOST_COUNTED,)), ("dead", (queries.MOST_COUNTED,))):
        async with ledger.transaction(readonly=True):
            await queries.limit(ledger, 5)
            explained = await ledger.fetchval("EXPLAIN (ANALYZE, FORMAT JSON) " + queries._SQL[name], *values)
        read: list[float] = []

        def collect(node: dict[str, Any], read: list[float] = read) -> None:
            if node.get("Relation Name") == "webhook_events":
                read.append(node["Actual Rows"] * node["Actual Loops"])
            for child in node.get("Plans", []):
                collect(child)

        collect(json.loads(explained)[0]["Plan"])
        assert read and max(read) <= 1000, explained


async def test_questions_are_asked_two_at_a_time_so_that_receiving_keeps_its_connections(
    database_url: str, settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, most = 0, 0
    known_types = queries.known_types

    async def counted(db: Connection) -> list[str]:
        nonlocal together, most
        together += 1
        most = max(most, together)
        await asyncio.sleep(0)
        await db.execute("SELECT pg_sleep(0.01)")
        together -= 1
        return await known_types(db)

    monkeypatch.setattr(queries, "known_types", counted)
    async with running_client(create_app(settings(KAMIYO_WORKER=False))) as client:
        await sign_in(client)
        answers = await asyncio.gather(*(client.get(f"{BASE}/events") for _ in range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert most == 2


async def test_settings_for_a_database_of_ones_own_are_enough(database_url: str) -> None:
    async with running_client(create_app(settings_for(database_url))) as client:
        handlers.on("order.shipped")(noop)
        assert "Kamiyo" in await page(await sign_in(client))
