"""What every story of the dashboard shares: signed-in clients, what a page says, events as a worker leaves them."""

import html
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from kamiyo.database import Connection
from tests.conftest import ADMIN_KEY, fresh_id

BASE = "/dashboard"

#: Every page that needs a session, with an address that reaches it.
PAGES = [
    *("", "/undecided", "/events", "/events/evt_1", "/events/evt_1/body", "/search?q=evt_1", "/failures"),
    *("/failures/abc", "/failures/abc/retry", "/replays/1", "/customers/cus_1", "/no/such/page"),
]
ACTIONS = ["/sign-out", "/events/evt_1/retry", "/failures/abc/retry"]

#: A customer, as Stripe tells of one.
CUSTOMER = {"id": "cus_1", "object": "customer", "email": "new@example.org", "balance": -250, "currency": "eur"}


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
