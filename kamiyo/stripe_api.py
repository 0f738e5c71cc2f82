"""Stripe's API, as far as it is read here: within a budget that all processes share.

Reads never fail an event: where Stripe says "too much" (429), fails (5xx) or cannot be reached, all processes pause,
longer each time, and whoever asked waits or comes again later.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from importlib import import_module
from typing import Any

from kamiyo.database import Pool, load_queries
from kamiyo.errors import KamiyoError
from kamiyo.settings import Settings

_SQL = load_queries("stripe_api.sql")

#: Objects on one page of a list, at most. Source: Stripe's API reference, "Pagination".
PAGE = 100


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


class StripeGone(StripeError):
    """Stripe has no such object."""


class StripeUnavailable(StripeError):
    """Stripe is busy or away; `after` seconds from now it may answer."""

    def __init__(self, message: str, after: float = 0.0) -> None:
        super().__init__(message)
        self.after = after


class StripeApi:
    """Reads from Stripe with the key of the settings. Raises StripeKeyMissing when there is none."""

    def __init__(self, pool: Pool, settings: Settings) -> None:
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
        self._rate = settings.stripe_api_rate
        self.livemode = "_live_" in key

    async def close(self) -> None:
        """Let go of the connections."""
        await self._http.close_async()

    async def read(
        self, path: str, params: Mapping[str, Any] | None = None, *, account: str = "", patience: float = 60.0
    ) -> dict[str, Any]:
        """GET `path` (`/v1/…`) with `params`, and return its JSON object.

        Waits for the budget and for Stripe, up to `patience` seconds; then raises StripeUnavailable. Raises StripeGone
        for a 404 and StripeRefused for anything else that asking again cannot mend.
        """
        try:
            async with asyncio.timeout(patience):
                while True:
                    await self._wait_for_budget()
                    try:
                        return await self._get(path, account, params or {})
                    except StripeUnavailable as busy:
                        await self._note("refused", busy.after)
        except TimeoutError as error:
            raise StripeUnavailable(f"Stripe did not answer {path} within {patience:g} s") from error

    async def events(self, *, created_from: int, created_to: int) -> AsyncIterator[tuple[list[dict[str, Any]], bool]]:
        """Pages of the events created in these unix seconds (both inclusive), newest first; and whether it is the last.

        Stripe keeps events for 30 days.
        """
        after: dict[str, str] = {}
        while True:
            created = {"gte": created_from, "lte": created_to}
            page = await self.read("/v1/events", {"limit": PAGE, "created": created, **after})
            events: list[dict[str, Any]] = page["data"]
            more = bool(page["has_more"]) and bool(events)
            yield events, not more
            if not more:
                return
            after = {"starting_after": events[-1]["id"]}

    async def _get(self, path: str, account: str, params: Mapping[str, Any]) -> dict[str, Any]:
        options = {"stripe_account": account} if account else {}
        stripe = self._stripe
        try:
            reply = await self._client.raw_request_async("get", path, **params, **options)
        except stripe.RateLimitError as error:
            raise StripeUnavailable("Stripe: too many requests", _retry_after(error)) from error
        except (stripe.AuthenticationError, stripe.PermissionError) as error:
            # The library's message can quote the key.
            raise StripeRefused(f"Stripe refuses STRIPE_SECRET_KEY for GET {path} ({error.http_status})") from None
        except stripe.InvalidRequestError as error:
            if error.http_status == 404:
                raise StripeGone(f"Stripe has nothing at {path}") from None
            raise StripeRefused(f"Stripe refuses GET {path}: {error.code or error.http_status}") from None
        except (stripe.APIConnectionError, stripe.APIError) as error:
            raise StripeUnavailable(f"Stripe is away: {type(error).__name__}") from error
        await self._note("answered")
        value = json.loads(reply.body)
        if not isinstance(value, dict):
            raise StripeRefused(f"Stripe answered GET {path} with something that is no object")
        return value

    async def _wait_for_budget(self) -> None:
        while True:
            async with self._pool.acquire(timeout=10) as db:
                wait = await db.fetchval(_SQL["take"], float(self._rate))
                if wait is None:
                    await db.execute(_SQL["begin"])
                    continue
            if wait <= 0:
                return
            # Never through the night: somebody else may have been answered meanwhile.
            await asyncio.sleep(min(wait, 1.0))

    async def _note(self, query: str, *parameters: float) -> None:
        async with self._pool.acquire(timeout=10) as db:
            await db.execute(_SQL[query], *parameters)


def _retry_after(error: Any) -> float:
    try:
        return min(float((error.headers or {}).get("Retry-After", 0)), 60.0)
    except ValueError:
        return 0.0
