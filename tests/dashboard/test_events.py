"""The dashboard's list of events: its filters, its pages, and how a thing is found by its id."""

import html
import re
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from kamiyo.database import Connection
from kamiyo.web.dashboard.queries import STATES
from tests.dashboard.conftest import BASE, links, only, page, put, put_dead, put_failure, words


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
