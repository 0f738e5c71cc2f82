"""Where the dashboard stands, its static files, and what it says while the database does not answer."""

import html
import re
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from kamiyo import handlers
from kamiyo.database import Connection
from kamiyo.web import create_app, create_router
from kamiyo.web.dashboard import queries
from tests.conftest import ADMIN_KEY, PREFIX, MakeSettings, noop, running_client, settings_for
from tests.dashboard.conftest import BASE, links, page, put_dead, sign_in


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


async def test_a_link_in_an_alert_leads_to_the_one_place_where_the_kamiyo_api_has_it(
    quiet_desk: httpx.AsyncClient, db: Connection
) -> None:
    await put_dead(db, event_id="evt_1")
    for link, place in (("", ""), ("/", ""), ("/failures/abc", "/failures/abc"), ("/events?status=unread", None)):
        answer = await quiet_desk.get(f"{PREFIX}/dashboard{link}")
        assert (answer.status_code, answer.headers["location"]) == (307, BASE + (link if place is None else place))
        assert (await quiet_desk.get(answer.headers["location"])).status_code == 200


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


async def test_settings_for_a_database_of_ones_own_are_enough(database_url: str) -> None:
    async with running_client(create_app(settings_for(database_url))) as client:
        handlers.on("order.shipped")(noop)
        assert "Kamiyo" in await page(await sign_in(client))
