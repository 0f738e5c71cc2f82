"""The handler that most guides end at, written by hand: FastAPI, Stripe's library, PostgreSQL, a unique id.

Nothing in it is foolish. It verifies with Stripe's own library, keeps each event, knows duplicates, and keeps
customers, subscriptions and invoices up to date. `docs/conformance.md` shows what the conformance kit says.

The two views at its end are for the kit.
"""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeAlias, cast

import asyncpg
import stripe
from fastapi import FastAPI, HTTPException, Request

SCHEMA = """
CREATE TABLE stripe_events (
    event_id text PRIMARY KEY,
    type text NOT NULL,
    payload jsonb NOT NULL,
    status text NOT NULL DEFAULT 'received',
    times integer NOT NULL DEFAULT 0,
    received_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE customers (id text PRIMARY KEY, email text, name text);
CREATE TABLE subscriptions (
    id text PRIMARY KEY,
    customer text NOT NULL REFERENCES customers,
    status text NOT NULL,
    current_period_end bigint NOT NULL
);
CREATE TABLE invoices (
    id text PRIMARY KEY,
    customer text NOT NULL REFERENCES customers,
    status text NOT NULL,
    amount_paid bigint NOT NULL
);
"""

_Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"


def create_handwritten(database_url: str, secret: str) -> FastAPI:
    """The application, on a database of its own."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with asyncpg.create_pool(database_url, min_size=10, max_size=10) as pool:
            await pool.execute(SCHEMA)
            app.state.pool = pool
            yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/webhooks/stripe")
    async def stripe_webhook(request: Request) -> dict[str, str]:
        payload = await request.body()
        try:
            stripe.Webhook.construct_event(payload, request.headers.get("stripe-signature"), secret)
        except ValueError:
            raise HTTPException(400, "Invalid payload") from None
        except stripe.SignatureVerificationError:
            raise HTTPException(400, "Invalid signature") from None
        event = json.loads(payload)
        pool = cast("_Pool", app.state.pool)
        if await pool.fetchval("SELECT 1 FROM stripe_events WHERE event_id = $1", event["id"]):
            return {"status": "already processed"}
        await pool.execute(
            "INSERT INTO stripe_events (event_id, type, payload) VALUES ($1, $2, $3)",
            *(event["id"], event["type"], payload.decode()),
        )
        await handle(pool, event["type"], event["data"]["object"])
        await pool.execute(
            "UPDATE stripe_events SET status = 'processed', times = times + 1 WHERE event_id = $1",
            event["id"],
        )
        return {"status": "success"}

    @app.get("/events/{event_id}")
    async def view_event(event_id: str) -> dict[str, Any]:
        return await _found(app, "SELECT status, times FROM stripe_events WHERE event_id = $1", event_id)

    @app.get("/objects/{object_type}/{object_id}")
    async def view_object(object_type: str, object_id: str) -> dict[str, Any]:
        return await _found(app, _VIEWS[object_type], object_id)

    return app


async def handle(pool: _Pool, event_type: str, obj: dict[str, Any]) -> None:
    """What an event means to this application."""
    match event_type:
        case "customer.created" | "customer.updated":
            await pool.execute(
                "INSERT INTO customers VALUES ($1, $2, $3) "
                "ON CONFLICT (id) DO UPDATE SET email = excluded.email, name = excluded.name",
                *(obj["id"], obj["email"], obj["name"]),
            )
        case "customer.subscription.created" | "customer.subscription.updated" | "customer.subscription.deleted":
            await pool.execute(
                "INSERT INTO subscriptions VALUES ($1, $2, $3, $4) ON CONFLICT (id) DO UPDATE "
                "SET status = excluded.status, current_period_end = excluded.current_period_end",
                *(obj["id"], obj["customer"], obj["status"]),
                obj["items"]["data"][0]["current_period_end"],
            )
        case "invoice.paid" | "invoice.payment_succeeded" | "invoice.payment_failed":
            await pool.execute(
                "INSERT INTO invoices VALUES ($1, $2, $3, $4) ON CONFLICT (id) DO UPDATE "
                "SET status = excluded.status, amount_paid = excluded.amount_paid",
                *(obj["id"], obj["customer"], obj["status"], obj["amount_paid"]),
            )


_VIEWS = {
    "customer": "SELECT * FROM customers WHERE id = $1",
    "subscription": "SELECT * FROM subscriptions WHERE id = $1",
    "invoice": "SELECT * FROM invoices WHERE id = $1",
    # It keeps none; so there is none to be found.
    "payment_method": "SELECT NULL WHERE $1 = ''",
}


async def _found(app: FastAPI, query: str, key: str) -> dict[str, Any]:
    row = await cast("_Pool", app.state.pool).fetchrow(query, key)
    if row is None:
        raise HTTPException(404)
    return dict(row)
