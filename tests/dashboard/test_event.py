"""The page of one event: what it changed, why it failed, its body, and its retry."""

import json
import re
import time
from datetime import timedelta
from typing import Any

import httpx
import pytest

from kamiyo import handlers
from kamiyo.database import Connection
from kamiyo.event import Event
from kamiyo.handlers import Bury, Retry
from kamiyo.web.dashboard import attention, payload
from tests.conftest import deliver, event_json, settled, until
from tests.dashboard.conftest import BASE, CUSTOMER, links, page, press, put, put_failure, sign_in, token_of, words


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
    assert "Dead after 5 tries LookupError test_event.py:" in said
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
