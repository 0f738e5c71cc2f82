"""What the user's code does when an event arrives.

    from kamiyo import Bury, Connection, Event, Retry, on

    @on("invoice.paid")
    async def grant_credits(event: Event, db: Connection) -> None:
        await db.execute("UPDATE accounts SET credits = credits + 100 WHERE stripe_id = $1", event.customer)

`db` is the connection of the transaction in which the event itself is settled: what a handler writes with it happens
exactly once, or not at all. Handlers run after the billing tables are up to date, in the order of registration.

A handler speaks with values: it returns (done), raises `Retry(after=…)` (later), raises `Bury(reason)` (never), or
raises anything else (an error: tried again by the curve of `kamiyo/retry.py`).
"""

import asyncio
import hashlib
import importlib
import inspect
import sys
import traceback
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from kamiyo.database import Connection
from kamiyo.errors import KamiyoError, SettingsError
from kamiyo.event import Event, snapshot_type
from kamiyo.inbox import Failure

Handler = Callable[[Event, Connection], Awaitable[None]]

#: The types the guide promises, in its order.
GUIDE_TYPES = (
    *("customer.created", "customer.updated", "customer.deleted"),
    *("customer.subscription.created", "customer.subscription.updated", "customer.subscription.deleted"),
    *(
        "invoice.payment_succeeded",
        "invoice.payment_failed",
        "payment_method.attached",
        "payment_method.detached",
    ),
)


class Retry(KamiyoError):
    """Raised by a handler: not now, try again in `after` (seconds, or a timedelta). Counts as one of the five tries."""

    def __init__(self, after: float | timedelta, reason: str = "the handler asked for another try") -> None:
        super().__init__(reason)
        self.after = after.total_seconds() if isinstance(after, timedelta) else float(after)
        if not 0 <= self.after <= 30 * 86400:
            raise ValueError("Retry(after=…) takes 0 seconds to 30 days")


class Bury(KamiyoError):
    """Raised by a handler: this event can never succeed. It is dead at once, and a person is told."""

    def __init__(self, reason: str = "the handler gave the event up") -> None:
        super().__init__(reason)


class HandlerTimeout(KamiyoError):
    """A handler took longer than KAMIYO_HANDLER_TIMEOUT."""


class WorkerDied(KamiyoError):
    """The worker process died while it handled this event."""


class PayloadGone(KamiyoError):
    """The event's body was removed by retention, so it cannot be run again."""


@dataclass
class Registry:
    """Handlers by event type. `v1.invoice.paid` and `invoice.paid` are one type, told by two kinds of events."""

    # By the snapshot's type: each handler once, and the names it was registered under.
    _by_type: dict[str, dict[Handler, set[str]]] = field(default_factory=lambda: defaultdict(dict))

    def on(self, *event_types: str) -> Callable[[Handler], Handler]:
        """Register the decorated coroutine function for these event types.

        Raises TypeError for a function that is not a coroutine function of two arguments, and ValueError without a
        type.
        """
        if not event_types or not all(isinstance(name, str) and name for name in event_types):
            raise ValueError('@on(…) takes event types: @on("invoice.paid")')

        def register(handler: Handler) -> Handler:
            if not asyncio.iscoroutinefunction(handler):
                raise TypeError(
                    f"{_named(handler)} must be `async def`: a handler shares the worker's event loop. What blocks, it "
                    "gives to a thread: await asyncio.to_thread(…)"
                )
            if not _takes_two(handler):
                raise TypeError(
                    f"{_named(handler)} must take the event and a connection: (event: Event, db: Connection)"
                )
            for name in event_types:
                self._by_type[snapshot_type(name)].setdefault(handler, set()).add(name)
            return handler

        return register

    def of(self, event_type: str) -> tuple[Handler, ...]:
        """The handlers of a type, registered under either of its names, in the order of registration."""
        return tuple(self._by_type.get(snapshot_type(event_type), ()))

    def exactly(self, event_type: str) -> tuple[Handler, ...]:
        """The handlers that were registered under just this name, in the order of registration."""
        registered = self._by_type.get(snapshot_type(event_type), {})
        return tuple(handler for handler, names in registered.items() if event_type in names)

    def types(self) -> tuple[str, ...]:
        """The types with handlers, as they were named, in the order of registration."""
        every = (sorted(names) for registered in self._by_type.values() for names in registered.values())
        return tuple(dict.fromkeys(name for names in every for name in names))

    def clear(self) -> None:
        """Forget every handler; for tests."""
        self._by_type.clear()


def _named(handler: object) -> str:
    return f"{getattr(handler, '__module__', '?')}.{getattr(handler, '__qualname__', repr(handler))}"


def _takes_two(handler: Handler) -> bool:
    try:
        inspect.signature(handler).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # some callables have no signature to look at
        pass
    return True


registry = Registry()
on = registry.on


def supported_types() -> list[str]:
    """The ten of the guide in its order, then what the user's handlers add."""
    return [*GUIDE_TYPES, *(name for name in registry.types() if name not in GUIDE_TYPES)]


def load(modules: Iterable[str]) -> None:
    """Import the user's modules, so that their `@on` decorators run. Raises SettingsError naming the one that fails."""
    # `kamiyo serve` is a script: unlike `python -m`, it does not put the user's own folder on the path.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:
            raise SettingsError(f"KAMIYO_HANDLERS: cannot import {module}: {type(error).__name__}: {error}") from error


async def run(
    db: Connection,
    event: Event,
    handlers: Iterable[Handler],
    *,
    timeout: float,  # noqa: ASYNC109 - the limit is each handler's, not the call's
) -> None:
    """Run `handlers` one after another in the caller's transaction.

    Raises whatever a handler raises, and HandlerTimeout when one takes longer than `timeout` seconds.
    """
    for handler in handlers:
        try:
            async with asyncio.timeout(timeout) as limit:
                await handler(event, db)
        except TimeoutError as error:
            if limit.expired():
                name = getattr(handler, "__qualname__", "handler")
                raise HandlerTimeout(f"{name} took longer than {timeout:g} s") from error
            raise


def failure_of(error: BaseException) -> Failure:
    """What to keep of an error. The fingerprint is the same for the same type raised at the same place."""
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(error, Retry | Bury | HandlerTimeout | WorkerDied | PayloadGone):
        name = kind.__qualname__
    frames = list(_frames(error))
    where = f"{frames[-1].name}:{Path(frames[-1].filename).name}" if frames else ""
    text = "".join(traceback.format_exception(error))
    return Failure(
        error_type=name,
        message=_kept(str(error) or name, 2000),
        traceback=_kept(text[-16_000:], 16_000),
        fingerprint=hashlib.sha256(f"{name}@{where}".encode()).hexdigest()[:12],
    )


def _frames(error: BaseException) -> Iterator[traceback.FrameSummary]:
    yield from traceback.extract_tb(error.__traceback__)


def _kept(text: str, limit: int) -> str:
    # PostgreSQL's text holds no NUL and no half of a surrogate pair.
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()[:limit]
