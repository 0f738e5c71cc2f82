"""What a user of Kamiyo might write: one UPDATE for each event, in the transaction that settles it."""

from bench.events import KINDS
from kamiyo import Event, on
from kamiyo.database import Connection


@on(*(kind.event_type for kind in KINDS))
async def count_event(event: Event, db: Connection) -> None:
    """Count the event to its customer."""
    await db.execute("UPDATE bench_counters SET events = events + 1 WHERE customer = $1", event.customer)
