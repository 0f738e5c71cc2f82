"""The application: `uvicorn bench.peers.handwritten.app:app`; its tables: `python -m bench.peers.handwritten.app`.

What the usual guides do: look the id up, insert the event, commit; change the tables, mark the event processed, write
a line into the log, commit.
"""
# mypy: disable-error-code="import-not-found,misc,untyped-decorator,unused-ignore,no-any-return"
# (its libraries are not in this project's environment, so their types are unknown here)

import asyncio
import json
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import stripe
from fastapi import Depends, FastAPI, HTTPException, Request
from sqlalchemy import BigInteger, DateTime, String, Text, func, select
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

SECRET = os.environ["STRIPE_WEBHOOK_SECRET"]

# Kinder than the default of 5 and 10 more: no connection is opened and closed again under load.
engine = create_async_engine(os.environ["DATABASE_URL"], pool_size=20, max_overflow=0)
sessions = async_sessionmaker(engine, expire_on_commit=False)


class Base(DeclarativeBase):
    """The tables."""


class WebhookEvent(Base):
    """An event, with its payload."""

    __tablename__ = "webhook_events"
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    event_id: Mapped[str] = mapped_column(String(255), unique=True, index=True)
    event_type: Mapped[str] = mapped_column(String(255), index=True)
    status: Mapped[str] = mapped_column(String(20), default="received", index=True)
    payload: Mapped[dict[str, Any]] = mapped_column(JSONB)
    error: Mapped[str | None] = mapped_column(Text)
    received_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=func.now())
    processed_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))


class ProcessingLog(Base):
    """What was done."""

    __tablename__ = "processing_log"
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    event_id: Mapped[str] = mapped_column(String(255), index=True)
    action: Mapped[str] = mapped_column(String(50))
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=func.now())


class Customer(Base):
    """A customer."""

    __tablename__ = "customers"
    id: Mapped[str] = mapped_column(String(255), primary_key=True)
    email: Mapped[str | None] = mapped_column(String(255))
    name: Mapped[str | None] = mapped_column(String(255))
    data: Mapped[dict[str, Any]] = mapped_column(JSONB)
    updated_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=func.now())


class Subscription(Base):
    """A subscription."""

    __tablename__ = "subscriptions"
    id: Mapped[str] = mapped_column(String(255), primary_key=True)
    customer: Mapped[str] = mapped_column(String(255), index=True)
    status: Mapped[str] = mapped_column(String(50))
    data: Mapped[dict[str, Any]] = mapped_column(JSONB)
    updated_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=func.now())


class Invoice(Base):
    """An invoice."""

    __tablename__ = "invoices"
    id: Mapped[str] = mapped_column(String(255), primary_key=True)
    customer: Mapped[str] = mapped_column(String(255), index=True)
    status: Mapped[str] = mapped_column(String(50))
    amount_paid: Mapped[int] = mapped_column(BigInteger)
    data: Mapped[dict[str, Any]] = mapped_column(JSONB)
    updated_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=func.now())


class PaymentMethod(Base):
    """A payment method."""

    __tablename__ = "payment_methods"
    id: Mapped[str] = mapped_column(String(255), primary_key=True)
    customer: Mapped[str | None] = mapped_column(String(255), index=True)
    kind: Mapped[str] = mapped_column(String(50))
    data: Mapped[dict[str, Any]] = mapped_column(JSONB)
    updated_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=func.now())


async def _upsert(session: AsyncSession, table: type[Base], values: dict[str, Any]) -> None:
    statement = insert(table).values(**values)
    changed = {name: statement.excluded[name] for name in values if name != "id"}
    await session.execute(
        statement.on_conflict_do_update(index_elements=["id"], set_={**changed, "updated_at": func.now()})
    )


async def customer_changed(session: AsyncSession, thing: dict[str, Any]) -> None:
    """customer.updated"""
    await _upsert(session, Customer, {"id": thing["id"], "email": thing["email"], "name": thing["name"], "data": thing})


async def subscription_changed(session: AsyncSession, thing: dict[str, Any]) -> None:
    """customer.subscription.updated"""
    values = {"id": thing["id"], "customer": thing["customer"], "status": thing["status"], "data": thing}
    await _upsert(session, Subscription, values)


async def invoice_paid(session: AsyncSession, thing: dict[str, Any]) -> None:
    """invoice.payment_succeeded"""
    values = {"id": thing["id"], "customer": thing["customer"], "status": thing["status"], "data": thing}
    await _upsert(session, Invoice, {**values, "amount_paid": thing["amount_paid"]})


async def payment_method_attached(session: AsyncSession, thing: dict[str, Any]) -> None:
    """payment_method.attached"""
    values = {"id": thing["id"], "customer": thing["customer"], "kind": thing["type"], "data": thing}
    await _upsert(session, PaymentMethod, values)


HANDLERS = {
    "customer.updated": customer_changed,
    "customer.subscription.updated": subscription_changed,
    "invoice.payment_succeeded": invoice_paid,
    "payment_method.attached": payment_method_attached,
}

app = FastAPI()


async def database() -> AsyncIterator[AsyncSession]:
    """A session for one request."""
    async with sessions() as session:
        yield session


_database = Depends(database)


@app.post("/webhooks/stripe")
async def stripe_webhook(request: Request, session: AsyncSession = _database) -> dict[str, str]:
    """Verify, store, process, answer."""
    payload = await request.body()
    try:
        stripe.Webhook.construct_event(payload, request.headers.get("stripe-signature", ""), SECRET)
    except ValueError as error:
        raise HTTPException(400, "Invalid payload") from error
    except stripe.SignatureVerificationError as error:
        raise HTTPException(400, "Invalid signature") from error
    event = json.loads(payload)
    known = await session.scalar(select(WebhookEvent).where(WebhookEvent.event_id == event["id"]))
    if known is not None:
        return {"status": "already processed"}
    record = WebhookEvent(event_id=event["id"], event_type=event["type"], payload=event, status="received")
    session.add(record)
    await session.commit()
    try:
        handler = HANDLERS.get(event["type"])
        if handler is not None:
            await handler(session, event["data"]["object"])
        record.status, record.processed_at = "processed", datetime.now(UTC)
        session.add(ProcessingLog(event_id=event["id"], action="processed"))
        await session.commit()
    except Exception as error:
        await session.rollback()
        raise HTTPException(500, "Processing failed") from error
    return {"status": "success"}


async def make_tables() -> None:
    """Create what is missing."""
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    await engine.dispose()


if __name__ == "__main__":
    asyncio.run(make_tables())
