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
    """No key of Stripe's API is set, so Stripe cannot be asked."""

    def __init__(self) -> None:
        super().__init__(
            "STRIPE_SECRET_KEY is not set, so Stripe cannot be asked. A restricted key (rk_…) that may read "
            "events, customers, subscriptions, invoices and payment methods is enough."
        )


class StripeRefused(StripeError):
    """Stripe refuses the key or the request; asking again does not help."""


class StripeKeyRefused(StripeRefused):
    """Stripe refuses a key for `what` (403), or for `every` request (401): a person must mend it, or set another."""

    def __init__(self, key: str, what: str, *, every: bool) -> None:
        super().__init__(f"Stripe refuses {key} for {what}")
        self.what = what
        self.every = every


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


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is asked for, and with whose key: that of `owner` (empty: one's own)."""

    path: str
    account: str
    owner: str
    livemode: bool

    @property
    def kind(self) -> str:
        """Without saying for which object: `GET /v1/customers of acct_1 in test mode (403)`."""
        kind = "/".join(self.path.split("/")[: 4 if self.path.startswith("/v2/") else 3])
        return f"GET {kind}{_of(self.account)} in {_mode(self.livemode)} mode (403)"

    @property
    def every(self) -> str:
        """Whatever is asked for with that key."""
        return f"every request{_of(self.owner)} in {_mode(self.livemode)} mode (401)"


def _of(account: str) -> str:
    return f" of {account}" if account else ""


def _mode(livemode: bool) -> str:
    return "live" if livemode else "test"


class StripeApi:
    """Reads from Stripe with the keys of the settings. Raises StripeKeyMissing when there is none.

    `keyed` are the accounts that have a key, each with its mode ('' is one's own). `livemode` is the mode that is read
    where a call names none: that of the first key unless it is given here.
    """

    def __init__(self, pool: Pool, settings: Settings, *, livemode: bool | None = None) -> None:
        keys = settings.api_keys
        if not keys:
            raise StripeKeyMissing
        # The library takes 30 MB and half a second: only where Stripe is asked at all.
        self._stripe: Any = import_module("stripe")
        self._http: Any = self._stripe.HTTPXClient(timeout=settings.stripe_api_timeout)
        self._clients: dict[tuple[str, bool], Any] = {
            (key.account, key.livemode): self._stripe.StripeClient(
                key.key,
                base_addresses={"api": settings.stripe_api_base},
                # Retrying is ours: the budget must hold over all processes.
                max_network_retries=0,
                http_client=self._http,
            )
            for key in keys
        }
        self._pool = pool
        self._rate = settings.stripe_api_rate
        self._patience = settings.stripe_api_timeout
        self.keyed = tuple(self._clients)
        self.livemode = keys[0].livemode if livemode is None else livemode

    async def pause(self) -> float:
        """Seconds until Stripe may be asked again: 0 unless the circuit is open."""
        async with self._pool.acquire(timeout=10) as db:
            return float(await db.fetchval(_SQL["pause"]))

    async def close(self) -> None:
        """Let go of the connections."""
        await self._http.close_async()

    def reaches(self, account: str, livemode: bool) -> bool:
        """Whether there is a key that may read this account in this mode: its own, or the platform's."""
        return (account, livemode) in self._clients or ("", livemode) in self._clients

    async def read(
        self,
        path: str,
        params: Mapping[str, Any] | None = None,
        *,
        account: str = "",
        livemode: bool | None = None,
        patience: float = 60.0,
        once: bool = False,
        keeps_refusal: bool = False,
    ) -> Reply:
        """GET `path` (`/v1/…`) of `account` with `params`; its JSON object.

        With the account's own key where it has one, with the platform's in the account's name otherwise. Raises
        StripeRefused where neither has a key of the mode.

        Waits for the budget and for Stripe, up to `patience` seconds; then raises StripeUnavailable. With `once`, so
        does the first answer that is none (429, 5xx): the caller has others to ask about. Raises StripeGone for a 404,
        StripeKeyRefused for 401 and 403, and StripeRefused for anything else that asking again cannot mend.

        With `keeps_refusal`, that a key is refused is kept for the alerts until Stripe answers for the same: somebody
        waits for it.
        """
        livemode = self.livemode if livemode is None else livemode
        client, options = self._way_to(account, livemode)
        asked = _Asked(path, account, "" if options else account, livemode)
        try:
            async with asyncio.timeout(patience) as limit:
                while True:
                    await self._wait_for_budget()
                    try:
                        reply = await self._get(client, asked, {**(params or {}), **options})
                    except StripeUnavailable as busy:
                        await self._note("refused", busy.after)
                        if once:
                            raise
                    except StripeKeyRefused as refused:
                        await self._note("key_refused", refused.what if keeps_refusal else None)
                        raise
                    except StripeError:
                        await self._note("answered", asked.kind, asked.every)
                        raise
                    else:
                        await self._note("answered", asked.kind, asked.every)
                        return reply
        except TimeoutError as error:
            if not limit.expired():
                # It keeps the budget, and what Stripe has answered.
                raise StripeUnavailable(
                    f"PostgreSQL did not answer in time while Stripe was asked for {path}"
                ) from error
            raise StripeUnavailable(f"Stripe did not answer {path} within {patience:g} s") from error

    async def events(
        self,
        *,
        created_from: int,
        created_to: int,
        account: str = "",
        livemode: bool | None = None,
        after_event: str = "",
    ) -> AsyncIterator[tuple[list[dict[str, Any]], bool]]:
        """Pages of the events created in these unix seconds (both inclusive), newest first; and whether it is the last.

        `after_event` goes on behind that event. Stripe keeps events for 30 days.
        """
        created = {"gte": created_from, "lte": created_to}
        pages = self.pages("/v1/events", {"created": created}, account=account, livemode=livemode, after=after_event)
        async for page, last in pages:
            yield page.value["data"], last
            if last:
                return

    async def pages(
        self,
        path: str,
        params: Mapping[str, Any] | None = None,
        *,
        account: str = "",
        livemode: bool | None = None,
        after: str = "",
        patience: float = 60.0,
    ) -> AsyncIterator[tuple[Reply, bool]]:
        """The pages of a list (`/v1/customers`), from behind the object `after`; and whether each is the last.

        Every page is a reply of its own: what it shows is as old as that page. Raises what `read` raises.
        """
        behind = {"starting_after": after} if after else {}
        while True:
            asked = {"limit": PAGE, **(params or {}), **behind}
            page = await self.read(path, asked, account=account, livemode=livemode, patience=patience)
            objects = page.value["data"]
            last = not page.value["has_more"] or not objects
            yield page, last
            if last:
                return
            behind = {"starting_after": objects[-1]["id"]}

    def _way_to(self, account: str, livemode: bool) -> tuple[Any, dict[str, str]]:
        client = self._clients.get((account, livemode))
        if client is not None:
            return client, {}
        client = self._clients.get(("", livemode))
        if client is None or not account:
            whose = f"{account}, and none of one's own" if account else "one's own account"
            raise StripeRefused(
                f"No key of {_mode(livemode)} mode is set for {whose}: see STRIPE_SECRET_KEY, STRIPE_SECRET_KEYS"
            )
        return client, {"stripe_account": account}

    async def _get(self, client: Any, asked: _Asked, params: Mapping[str, Any]) -> Reply:
        stripe, path = self._stripe, asked.path
        began = time.monotonic()
        try:
            reply = await client.raw_request_async("get", path, **params)
        except stripe.RateLimitError as error:
            raise StripeUnavailable("Stripe: too many requests", _retry_after(error)) from error
        except (stripe.AuthenticationError, stripe.PermissionError) as error:
            # The library's message can quote the key.
            every = error.http_status == 401
            raise StripeKeyRefused(*(_key_of(asked.owner), asked.every if every else asked.kind), every=every) from None
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

    async def _note(self, query: str, *parameters: float | str | None) -> None:
        async with self._pool.acquire(timeout=10) as db:
            await db.execute(_SQL[query], *parameters)


def _key_of(account: str) -> str:
    return f"the key of {account} in STRIPE_SECRET_KEYS" if account else "STRIPE_SECRET_KEY"


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
