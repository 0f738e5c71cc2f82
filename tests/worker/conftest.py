"""What the stories of the workers share: workers whose turns the test takes, and handlers whose effects are counted."""

from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from kamiyo import database
from kamiyo.database import Connection
from kamiyo.event import Event
from kamiyo.handlers import Registry
from kamiyo.worker import Worker
from tests.conftest import MakeSettings, event_json
from tests.turns import NOW, worker_on

MakeWorker = Callable[..., Awaitable[Worker]]


@pytest.fixture
async def shop(db: Connection) -> AsyncIterator[Connection]:
    """The host application's own tables: what handlers did, once for each time they did it."""
    await db.execute("DROP SCHEMA IF EXISTS shop CASCADE")
    await db.execute("CREATE SCHEMA shop; CREATE TABLE shop.effects (id bigserial, event_id text, txid bigint)")
    yield db
    await db.execute("DROP SCHEMA shop CASCADE")


@pytest.fixture
def own() -> Registry:
    return Registry()


@pytest.fixture
def make_worker(
    database_url: str, settings: MakeSettings, own: Registry, monkeypatch: pytest.MonkeyPatch
) -> MakeWorker:
    """`await make_worker(KAMIYO_WORKER_BATCH=5)`: a worker with the handlers of `own`."""
    # No turn is cut short only because this machine is busy.
    monkeypatch.setattr("kamiyo.turn._TURN_SECONDS", 60.0)

    async def make(**changes: object) -> Worker:
        return await worker_on(database_url, settings(**changes), own)

    return make


@pytest.fixture
async def other(database_url: str) -> AsyncIterator[Connection]:
    """A second connection: another worker's, or an onlooker's."""
    connection = await database.connect(database_url, application="test other")
    yield connection
    await connection.close()


def of(customer: str, event_id: str, event_type: str = "invoice.paid", created: int = NOW) -> bytes:
    """An event of a customer, about an object that no table follows."""
    return event_json(
        event_id, event_type, {"id": f"x_{event_id}", "object": "x", "customer": customer}, created=created
    )


async def leave_effect(event: Event, db: Connection) -> None:
    await db.execute("INSERT INTO shop.effects (event_id, txid) VALUES ($1, txid_current())", event.id)


async def effects(db: Connection) -> Counter[str]:
    """How often each event had its effect."""
    return Counter(event_id for (event_id,) in await db.fetch("SELECT event_id FROM shop.effects"))


async def together(db: Connection) -> list[set[str]]:
    """The events whose effects share a transaction, transaction by transaction."""
    found: dict[int, set[str]] = defaultdict(set)
    for event_id, txid in await db.fetch("SELECT event_id, txid FROM shop.effects ORDER BY id"):
        found[txid].add(event_id)
    return list(found.values())
