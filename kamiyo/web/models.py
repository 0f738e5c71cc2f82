"""What the calls answer, as `/docs` shows it."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, Field


class Detail(BaseModel):
    """Why a call was refused."""

    detail: str = Field(examples=["Invalid signature"])


class Received(BaseModel):
    """The event is committed to disk."""

    status: Literal["success"] = "success"
    message: Literal["Event received", "Event already received", "Event already processed"]
    event_id: str = Field(examples=["evt_1Pgc76B7WZ01zgkWwyRHS12y"])
    event_type: str = Field(examples=["customer.subscription.updated"])


class ReceivedByEventGrid(BaseModel):
    """All events of the delivery are committed to disk; or it was the question whether this is the place."""

    status: Literal["success"] | None = None
    count: int | None = Field(default=None, description="How many events the delivery had.")
    events: list[Received] | None = None
    validationResponse: str | None = Field(
        default=None, description="The code of a `SubscriptionValidationEvent`, sent back."
    )


class Health(BaseModel):
    """How the webhook system is."""

    status: Literal["healthy", "degraded", "unhealthy"]
    webhook_system: Literal["operational", "degraded", "down"]
    events_last_24h: int
    failed_events_last_24h: int
    supported_event_types: int = Field(examples=[10])


class Alive(BaseModel):
    """The process answers."""

    status: Literal["alive"] = "alive"


class Ready(BaseModel):
    """Deliveries can be verified and committed."""

    status: Literal["ready"] = "ready"


class SupportedEvents(BaseModel):
    """The event types that change something here."""

    status: Literal["success"] = "success"
    supported_events: list[str]
    count: int


class Summary(BaseModel):
    """All types together."""

    total_events: int
    processed: int
    failed: int
    pending: int
    success_rate: float = Field(description="Percent of the finished events that were processed; 100 without any.")


class TypeStatistics(BaseModel):
    """One type of event."""

    total: int
    processed: int
    failed: int
    pending: int
    avg_processing_time_ms: float


class Statistics(BaseModel):
    """What came in during the last days, by type."""

    status: Literal["success"] = "success"
    period_days: int
    summary: Summary
    by_event_type: dict[str, TypeStatistics]


class EventSummary(BaseModel):
    """One event, without its payload. Times are UTC."""

    event_id: str
    event_type: str
    status: Literal["pending", "processing", "processed", "failed"]
    outcome: Literal["projected", "handled", "ignored", "paired"] | None
    created_at: datetime = Field(description="When it was committed here.")
    stripe_created: datetime = Field(description="Stripe's `created`, in whole seconds.")
    processed_at: datetime | None
    next_try_at: datetime | None = Field(description="When it runs next; null when nothing happens by itself.")
    read_due_at: datetime | None = Field(
        description="Since when a thin event waits until what it names is read from Stripe; null when it does not wait."
    )
    attempts: int
    processing_time_ms: float
    object_type: str | None
    object_id: str | None
    customer: str | None
    account: str | None
    context: str | None
    livemode: bool
    api_version: str | None
    thin: bool
    source: str


class EventPage(BaseModel):
    """A page of events, newest first."""

    status: Literal["success"] = "success"
    count: int
    events: list[EventSummary]
    next: str | None = Field(description="Pass as `cursor` for the next page; null on the last.")


class Attempt(BaseModel):
    """One failed try."""

    retry_count: int
    created_at: datetime
    next_try_at: datetime | None
    error_type: str
    error_message: str
    traceback: str
    fingerprint: str


class EventDetail(EventSummary):
    """One event with its payload and every failed try."""

    payload: Any = Field(description="The event as Stripe sent it; null when retention has removed it.")
    failures: list[Attempt]


class FailedEvent(BaseModel):
    """A failed event and its last error."""

    event_id: str
    event_type: str
    status: Literal["failed"]
    created_at: datetime
    failed_at: datetime
    next_try_at: datetime | None = Field(description="Null: it is dead, and waits for a person.")
    attempts: int
    retry_count: int | None
    error_type: str | None
    error_message: str | None
    fingerprint: str | None
    object_id: str | None
    customer: str | None
    account: str | None


class FailedEvents(BaseModel):
    """Failed events, newest first."""

    status: Literal["success"] = "success"
    count: int
    events: list[FailedEvent]


class Retried(BaseModel):
    """The event is back in line."""

    status: Literal["success"] = "success"
    message: Literal["Event queued for retry"] = "Event queued for retry"
    event_id: str


class Replayed(BaseModel):
    """The events are back in line, or counted."""

    status: Literal["success"] = "success"
    dry_run: bool
    matched_count: int
    replayed_count: int


class CleanedUp(BaseModel):
    """Old processed events are gone."""

    status: Literal["success"] = "success"
    deleted_count: int
    older_than_days: int
