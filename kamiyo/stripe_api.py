"""Stripe's API, as far as it is read here: within a budget that all processes share.

Reads never fail an event: where Stripe says "too much" (429), fails (5xx) or cannot be reached, all processes pause,
longer each time, and whoever asked waits or comes again later.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib import import_module
from math import floor
from typing import Any, TypeVar

from kamiyo.database import Pool, load_queries
from kamiyo.errors import KamiyoError
from kamiyo.settings import Settings

_SQL = load_queries("stripe_api.sql")

#: Objects on one page of a list, at most. Source: Stripe's API reference, "Pagination".
PAGE = 100

# Requests of one piece of work that are on their way at once: one after the other would leave the budget unused.
_AT_ONCE = 8

_T = TypeVar("_T")


class StripeError(KamiyoError):
    """Stripe's API did not give what was asked for."""


class StripeKeyMissing(StripeError):
    """STRIPE_SECRET_KEY is not set, so Stripe cannot be asked."""

    def __init__(self) -> None:
        super().__init__(
            "STRIPE_SECRET_KEY is not set, so Stripe cannot be asked. A restricted key (rk_…) that may read "
            "events, customers, subscriptions, invoices and payment methods is enough."
        )


class StripeRefused(StripeError):
    """Stripe refuses the key or the request; asking again does not help."""


class StripeKeyRefused(StripeRefused):
    """Stripe refuses the key for `what` (401, 403): a person must give it what it lacks, or set another."""

    def __init__(self, what: str) -> None:
        super().__init__(f"Stripe refuses STRIPE_SECRET_KEY for {what}")
        self.what = what

    @property
    def every(self) -> bool:
        """Whether the key itself is refused (401), for whatever is asked with it."""
        return self.what.endswith("(401)")


class StripeGone(StripeError):
    """Stripe has no such object, as of `second`: see `Reply`."""

    def __init__(self, message: str, second: int) -> None:
        super().__init__(message)
        self.second = second


class StripeUnavailable(StripeError):
    """Stripe is busy or away; `after` seconds from now it may answer."""

    def __init__(self, message: str, after: float = 0.0) -> None:
        super().__init__(message)
        self.after = after


@dataclass(frozen=True, slots=True)
class Reply:
    """What Stripe answered: a JSON object, its bytes as received, and how old it can be.

    The request began in `second` (unix, by Stripe's clock) or later: what happened before that second is in the answer.
    """

    value: dict[str, Any]
    body: bytes
    second: int


class StripeApi:
    """Reads from Stripe with the key of the settings. Raises StripeKeyMissing when there is none."""

    def __init__(self, pool: Pool, settings: Settings, *, keeps_refusals: bool = True) -> None:
        """`keeps_refusals`: that Stripe refuses the key is kept for the alerts; not where somebody only tries."""
        key = settings.stripe_secret_key.get_secret_value()
        if not key:
            raise StripeKeyMissing
        # The library takes 30 MB and half a second: only where Stripe is asked at all.
        self._stripe: Any = import_module("stripe")
        self._http: Any = self._stripe.HTTPXClient(timeout=settings.stripe_api_timeout)
        self._client: Any = self._stripe.StripeClient(
            key,
            base_addresses={"api": settings.stripe_api_base},
            # Retrying is ours: the budget must hold over all processes.
            max_network_retries=0,
            http_client=self._http,
        )
        self._pool = pool
        self._keeps_refusals = keeps_refusals
        self._rate = settings.stripe_api_rate
        self._patience = settings.stripe_api_timeout
        self.livemode = "_live_" in key

    async def pause(self) -> float:
        """Seconds until Stripe may be asked again: 0 unless the circuit is open."""
        async with self._pool.acquire(timeout=10) as db:
            return float(await db.fetchval(_SQL["pause"]))

    async def close(self) -> None:
        """Let go of the connections."""
        await self._http.close_async()

    async def read(
        self,
        path: str,
        params: Mapping[str, Any] | None = None,
        *,
        account: str = "",
        patience: float = 60.0,
        once: bool = False,
    ) -> Reply:
        """GET `path` (`/v1/…`) with `params`; its JSON object.

        Waits for the budget and for Stripe, up to `patience` seconds; then raises StripeUnavailable. With `once`, so
        does the first answer that is none (429, 5xx): the caller has others to ask about. Raises StripeGone for a 404,
        StripeKeyRefused for 401 and 403, and StripeRefused for anything else that asking again cannot mend.
        """
        try:
            async with asyncio.timeout(patience):
                while True:
                    await self._wait_for_budget()
                    try:
                        reply = await self._get(path, account, params or {})
                    except StripeUnavailable as busy:
                        await self._note("refused", busy.after)
                        if once:
                            raise
                    except StripeKeyRefused as refused:
                        if self._keeps_refusals:
                            await self._note("key_refused", refused.what)
                        raise
                    except StripeError:
                        await self._note("answered", _kind(path, account, 403))
                        raise
                    else:
                        await self._note("answered", _kind(path, account, 403))
                        return reply
        except TimeoutError as error:
            raise StripeUnavailable(f"Stripe did not answer {path} within {patience:g} s") from error

    async def events(self, *, created_from: int, created_to: int) -> AsyncIterator[tuple[list[dict[str, Any]], bool]]:
        """Pages of the events created in these unix seconds (both inclusive), newest first; and whether it is the last.

        Stripe keeps events for 30 days.
        """
        created = {"gte": created_from, "lte": created_to}
        async for page, last in self.pages("/v1/events", {"created": created}):
            yield page.value["data"], last
            if last:
                return

    async def pages(
        self,
        path: str,
        params: Mapping[str, Any] | None = None,
        *,
        account: str = "",
        after: str = "",
        patience: float = 60.0,
    ) -> AsyncIterator[tuple[Reply, bool]]:
        """The pages of a list (`/v1/customers`), from behind the object `after`; and whether each is the last.

        Every page is a reply of its own: what it shows is as old as that page. Raises what `read` raises.
        """
        behind = {"starting_after": after} if after else {}
        while True:
            page = await self.read(
                path, {"limit": PAGE, **(params or {}), **behind}, account=account, patience=patience
            )
            objects = page.value["data"]
            last = not page.value["has_more"] or not objects
            yield page, last
            if last:
                return
            behind = {"starting_after": objects[-1]["id"]}

    async def _get(self, path: str, account: str, params: Mapping[str, Any]) -> Reply:
        options = {"stripe_account": account} if account else {}
        stripe = self._stripe
        began = time.monotonic()
        try:
            reply = await self._client.raw_request_async("get", path, **params, **options)
        except stripe.RateLimitError as error:
            raise StripeUnavailable("Stripe: too many requests", _retry_after(error)) from error
        except (stripe.AuthenticationError, stripe.PermissionError) as error:
            # The library's message can quote the key.
            raise StripeKeyRefused(_kind(path, account, error.http_status)) from None
        except stripe.InvalidRequestError as error:
            if error.http_status == 404:
                second = _began(error.headers or {}, time.monotonic() - began)
                raise StripeGone(f"Stripe has nothing at {path}", second) from None
            raise StripeRefused(f"Stripe refuses GET {path}: {error.code or error.http_status}") from None
        except (stripe.APIConnectionError, stripe.APIError) as error:
            raise StripeUnavailable(f"Stripe is away: {type(error).__name__}") from error
        took = time.monotonic() - began
        value = json.loads(reply.body)
        if not isinstance(value, dict):
            raise StripeRefused(f"Stripe answered GET {path} with something that is no object")
        return Reply(value, reply.body.encode(), _began(reply.headers, took))

    async def _wait_for_budget(self) -> None:
        while True:
            async with self._pool.acquire(timeout=10) as db:
                wait = await db.fetchval(_SQL["take"], float(self._rate), self._patience)
                if wait is None:
                    await db.execute(_SQL["begin"])
                    continue
            if wait <= 0:
                return
            # Never through the night: somebody else may have been answered meanwhile.
            await asyncio.sleep(min(wait, 1.0))

    async def _note(self, query: str, parameter: float | str) -> None:
        async with self._pool.acquire(timeout=10) as db:
            await db.execute(_SQL[query], parameter)


def _kind(path: str, account: str, status: int | None) -> str:
    """What was asked for, without saying for which object: `GET /v1/customers (403)`."""
    kind = "/".join(path.split("/")[: 4 if path.startswith("/v2/") else 3])
    return f"GET {kind}{f' of {account}' if account else ''} ({status})"


async def together(asks: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
    """Ask several things, a few of them at once; what came of each, in order. The first error ends the rest."""
    free = asyncio.Semaphore(_AT_ONCE)

    async def one(ask: Coroutine[Any, Any, _T]) -> _T:
        async with free:
            return await ask

    waiting = list(asks)
    try:
        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(one(ask)) for ask in waiting]
    except ExceptionGroup as group:
        # One reason is enough for a person, and for whoever catches it by its type.
        raise group.exceptions[0] from None
    finally:
        for ask in waiting:
            ask.close()  # those that an error kept from being begun
    return [task.result() for task in asked]


def _began(headers: Mapping[str, str], took: float) -> int:
    """A second of Stripe's clock in which, or after which, a request began: its answer shows nothing older.

    `Date` is that clock when Stripe answered, in whole seconds (RFC 9110, 6.6.1). What the answer shows was looked up
    at some moment before that, and after the request began.
    """
    try:
        answered = parsedate_to_datetime(headers.get("Date") or headers.get("date") or "").timestamp()
    except (TypeError, ValueError):
        answered = floor(time.time())  # something between here and Stripe has taken it away
    return floor(answered - took)


def _retry_after(error: Any) -> float:
    try:
        return min(float((error.headers or {}).get("Retry-After", 0)), 60.0)
    except ValueError:
        return 0.0
