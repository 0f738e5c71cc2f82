"""The page of a customer: what Stripe last said of them, and their events."""

import html
import re
import time
from datetime import timedelta

import httpx

from kamiyo.database import Connection
from tests.conftest import deliver, event_json, settled
from tests.dashboard.conftest import BASE, CUSTOMER, links, page, put, sign_in, words


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
