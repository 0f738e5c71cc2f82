"""What the stories of the contract share: its calls, and events as a worker leaves them."""

from datetime import UTC, datetime, timedelta
from typing import Any

from kamiyo.database import Connection
from tests.conftest import PREFIX, fresh_id

STRIPE = f"{PREFIX}/stripe"

#: Every call of operators, with a path that reaches it.
ADMIN_CALLS = [
    ("GET", "/statistics"),
    ("GET", "/events"),
    ("GET", "/events/failed/list"),
    ("GET", "/events/evt_1"),
    ("POST", "/events/evt_1/retry"),
    ("POST", "/events/replay"),
    ("POST", "/cleanup"),
]


async def put(
    db: Connection,
    event_id: str | None = None,
    event_type: str = "charge.succeeded",
    *,
    status: str = "processed",
    age: timedelta = timedelta(0),
    **columns: Any,
) -> str:
    """An event of `age` in the ledger, as a worker would have left it."""
    values = {
        "event_id": event_id or fresh_id(),
        "event_type": event_type,
        "status": status,
        "created_at": datetime.now(UTC) - age,
        "stripe_created": datetime.now(UTC) - age,
        "lane": 1,
        "outcome": "handled" if status == "processed" else None,
        "processed_at": datetime.now(UTC) if status == "processed" else None,
        "failed_at": datetime.now(UTC) if status == "failed" else None,
        "next_try_at": None if status in ("processed", "failed") else datetime.now(UTC) - age,
        **columns,
    }
    places = ", ".join(f"${n}" for n in range(1, len(values) + 1))
    insert = f"INSERT INTO webhook_events ({', '.join(values)}) VALUES ({places})"  # noqa: S608 - names of ours
    await db.execute(insert, *values.values())
    return str(values["event_id"])
