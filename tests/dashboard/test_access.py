"""Who may see the dashboard, and what its session, its forms and its answers keep out."""

import json
import time
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from fastapi import FastAPI
from itsdangerous import TimestampSigner

from kamiyo import handlers
from kamiyo.database import Connection
from kamiyo.event import Event
from kamiyo.handlers import Bury
from kamiyo.web import create_app
from tests.conftest import ADMIN_KEY, Log, MakeSettings, deliver, event_json, running_client, settled
from tests.dashboard.conftest import ACTIONS, BASE, PAGES, page, press, put_dead, sign_in, token_of, words


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
    quiet_client: httpx.AsyncClient, no_penalty: list[float]
) -> None:
    for wrong in ("", "guess", ADMIN_KEY[:-1], ADMIN_KEY + "x"):
        answer = await quiet_client.post(f"{BASE}/sign-in", data={"key": wrong})
        assert (answer.status_code, "set-cookie" in answer.headers) == (401, False)
        assert "That is not the admin key" in words(answer.text)
    assert no_penalty == sorted(no_penalty) and no_penalty[0] < no_penalty[-1]
    assert (await quiet_client.get(BASE)).status_code == 303


async def test_a_session_ends_after_twelve_hours(
    quiet_desk: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    monkeypatch.setattr(TimestampSigner, "get_timestamp", lambda self: int(now + 12 * 3600 - 60))
    assert (await quiet_desk.get(BASE)).status_code == 200
    monkeypatch.setattr(TimestampSigner, "get_timestamp", lambda self: int(now + 12 * 3600 + 60))
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
