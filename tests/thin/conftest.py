"""What the stories of thin events share: thin events and their twins, a worker and a reader, and a Stripe to ask."""

import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

from kamiyo import database
from kamiyo.database import Connection
from kamiyo.handlers import Registry
from kamiyo.reader import Reader
from kamiyo.stripe_api import StripeApi
from kamiyo.worker import Worker
from tests.conftest import MakeSettings, event_json, fresh_id
from tests.stripe_server import KEY, StripeServer, stripe_server

#: Some second at Stripe that is over.
NOW = int(time.time()) - 3600


def thin_json(
    kind: str, about: dict[str, Any] | None, event_id: str = "", *, created: int = NOW, **envelope: Any
) -> bytes:
    """A thin event as Stripe words it; it names `about`."""
    related = {}
    if about:
        url = f"/v1/{about['object']}s/{about['id']}"
        related = {"related_object": {"id": about["id"], "type": about["object"], "url": url}}
    return json.dumps(
        {
            "id": event_id or fresh_id("evt_65"),
            "object": "v2.core.event",
            "type": kind,
            "livemode": False,
            "created": time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(created)),
            "context": None,
            **related,
            **envelope,
        }
    ).encode()


@dataclass
class House:
    """A worker and a reader of one process, whose turns the test takes, and the Stripe that they ask."""

    stripe: StripeServer
    worker: Worker
    reader: Reader
    api: StripeApi

    async def work(self, db: Connection) -> None:
        """Until nothing is due any more, to be run or to be read."""
        while await self.worker.run_once(db) or await self.reader.run_once():
            pass


@contextlib.asynccontextmanager
async def house(
    url: str, settings: MakeSettings, stripe: StripeServer, registry: Registry | None = None, **changes: Any
) -> AsyncIterator[House]:
    changed = {"STRIPE_SECRET_KEY": KEY, "STRIPE_API_BASE": stripe.base, "KAMIYO_STRIPE_API_RATE": 100, **changes}
    own = registry if registry is not None else Registry()
    pool = await database.open_pool(url, size=12, application="house", idle_limit=60)
    api = StripeApi(pool, settings(**changed))
    try:
        reader = Reader(pool, api, own)
        yield House(stripe, Worker(pool, url, settings(**changed), own, reader=reader), reader, api)
    finally:
        await api.close()
        pool.terminate()


@pytest.fixture
async def stripe() -> AsyncIterator[StripeServer]:
    async with stripe_server() as server:
        yield server


async def waiting(db: Connection) -> list[str]:
    found = await db.fetch("SELECT event_id FROM webhook_events WHERE read_due_at IS NOT NULL ORDER BY event_id")
    return [event_id for (event_id,) in found]


def pair(kind: str, shown: dict[str, Any]) -> tuple[bytes, bytes]:
    """One occurrence, told by a snapshot and by a thin event."""
    snapshot = event_json("evt_snap", kind, shown, created=NOW)
    return snapshot, thin_json(f"v1.{kind}", shown, "evt_65thin", snapshot_event="evt_snap")
