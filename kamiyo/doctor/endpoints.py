"""What Stripe knows: its endpoints that deliver here, and its clock."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx

from kamiyo import handlers
from kamiyo.database import DATABASE_ERRORS, Pool
from kamiyo.doctor.finding import STRIPE_PATH, Finding, Subject, count, failed, passed, shown, warning, words
from kamiyo.doctor.postgresql import CLOCK_SECONDS, clock
from kamiyo.settings import Settings
from kamiyo.simulator import EVENT_TYPES
from kamiyo.stripe_api import StripeApi, StripeError, StripeGone, StripeRefused

#: The newest API version whose shapes this Kamiyo was tried with.
NEWEST_API_VERSION = "2026-10-28"

_NOT_ASKED: tuple[type[BaseException], ...] = (*DATABASE_ERRORS, KeyError, TypeError)


async def stripe(subject: Subject, pool: Pool | None) -> list[Finding]:
    """The endpoints that Stripe has for the key's account and mode, and its clock. Nothing without a key."""
    settings = subject.settings
    if not settings.api_keys:
        return []
    if pool is None:
        return [
            warning("stripe", "was not asked: the requests' budget is kept in the database", "Mend the database first.")
        ]
    api = StripeApi(pool, settings)
    found: list[Finding] = []
    try:
        for account, livemode in api.keyed:
            if account:
                found.append(await _account_opened(api, account, livemode))
            else:
                endpoints = await _endpoints_of(api, livemode)
                found += endpoints_known(endpoints, subject, livemode=livemode)
    except StripeRefused as error:
        may = "Let the key read webhook endpoints (Stripe dashboard, API keys), or set one that exists."
        return [*found, failed("stripe", str(error), may)]
    except StripeError as error:
        return [warning("stripe", str(error), "Run this again later; look at the network between here and Stripe.")]
    except _NOT_ASKED as error:
        return [warning("stripe", f"was not asked: {words(error)}", "Mend the database first; run `kamiyo migrate`.")]
    finally:
        await api.close()
    return [*found, *await _stripes_clock(settings)]


async def _account_opened(api: StripeApi, account: str, livemode: bool) -> Finding:
    """Whether a key of STRIPE_SECRET_KEYS may read events, and is the key of the account whose name it has."""
    check = f"key of {account}"
    try:
        await api.read("/v1/events", {"limit": 1}, account=account, livemode=livemode, patience=20)
    except StripeRefused as error:
        return failed(
            check, str(error), "Let the key read events (Stripe dashboard, API keys), or set one that exists."
        )
    mode = "live" if livemode else "test"
    try:
        said = (await api.read("/v1/account", account=account, livemode=livemode, patience=20)).value.get("id")
    except (StripeRefused, StripeGone):
        return passed(check, f"may read events of {mode} mode; whose key it is, it may not read")
    if said != account:
        return failed(
            check, f"is the key of {said}", f"Name it so in STRIPE_SECRET_KEYS, or copy the key of {account}."
        )
    return passed(check, f"may read events of {mode} mode")


async def _endpoints_of(api: StripeApi, livemode: bool) -> list[dict[str, Any]]:
    endpoints: list[dict[str, Any]] = []
    async for page, _ in api.pages("/v1/webhook_endpoints", livemode=livemode, patience=20):
        endpoints += page.value["data"]
    return endpoints


def endpoints_known(endpoints: Iterable[dict[str, Any]], subject: Subject, *, livemode: bool) -> Iterator[Finding]:
    """What Stripe's list of webhook endpoints says of those that deliver here.

    Source: Stripe's API reference, "The Webhook Endpoint object": `enabled_events` is ["*"] for all events but those
    that must be chosen one by one, `api_version` null for the account's default, `status` enabled or disabled.
    """
    every = list(endpoints)
    mode = "live" if livemode else "test"
    ours = [one for one in every if _is_ours(one, subject.endpoint)]
    if not ours:
        wanted = shown(subject.endpoint) if subject.endpoint else f"a path {STRIPE_PATH}"
        yield failed(
            "stripe endpoints",
            f"Stripe knows {count(len(every), 'endpoint')} in {mode} mode, and none has {wanted}",
            f"Add the endpoint in the Stripe dashboard, in {mode} mode: https://your-host{STRIPE_PATH}",
        )
        return
    for one in ours:
        yield _endpoint_known(one, mode, subject.settings.mirrored)
    if any(_is_twin(one) for one in every) and not subject.settings.shadow_secrets:
        yield warning(
            "twin endpoint",
            f"Stripe delivers to …{STRIPE_PATH}?shadow in {mode} mode, and STRIPE_SHADOW_WEBHOOK_SECRET is not set: "
            "these deliveries are refused",
            "Set it to that endpoint's signing secret, or remove the endpoint in the Stripe dashboard.",
        )
    enabled = [one for one in ours if one["status"] == "enabled"]
    if len({one["url"] for one in enabled}) < len(enabled):
        yield warning(
            "stripe endpoints",
            f"{len(enabled)} enabled endpoints of {mode} mode deliver to the same address, each event once for each",
            "Keep one of them, if they do not differ in their accounts (Connect).",
        )
    if len(enabled) > len(subject.settings.webhook_secrets):
        yield failed(
            "stripe endpoints",
            f"{len(enabled)} enabled endpoints of {mode} mode deliver here, and the settings hold "
            f"{count(len(subject.settings.webhook_secrets), 'secret')}: the others' deliveries are refused",
            "Each endpoint has a secret of its own: set them all, separated by commas.",
        )


def _is_ours(endpoint: dict[str, Any], url: str) -> bool:
    theirs = str(endpoint["url"])
    if _is_twin(endpoint):
        return False
    if url:
        return theirs.rstrip("/").lower() == url.rstrip("/").lower()
    return urlsplit(theirs).path.rstrip("/") == STRIPE_PATH


def _is_twin(endpoint: dict[str, Any]) -> bool:
    # What it delivers is compared, and never counted: see `kamiyo/shadow.py`.
    theirs = urlsplit(str(endpoint["url"]))
    return theirs.path.rstrip("/") == STRIPE_PATH and "shadow" in theirs.query


def _endpoint_known(endpoint: dict[str, Any], mode: str, mirrored: frozenset[str]) -> Finding:
    check = f"endpoint {endpoint['id']}"
    seen = f"{mode} mode, {shown(str(endpoint['url']))}"
    if endpoint["status"] != "enabled":
        return failed(
            check,
            f"{seen}: it is {endpoint['status']}, so nothing is delivered",
            "Enable it in the Stripe dashboard, then fetch what is missing: kamiyo reconcile --since 7d",
        )
    if urlsplit(str(endpoint["url"])).scheme != "https":
        return failed(check, f"{seen}: not HTTPS", "Change its address in the Stripe dashboard to https://…")
    wanted = endpoint["enabled_events"]
    needed = dict.fromkeys((*handlers.supported_types(), *sorted(mirrored.intersection(EVENT_TYPES))))
    lacking = [] if "*" in wanted else [name for name in needed if name not in wanted]
    if lacking:
        return failed(
            check,
            f"{seen}: it does not send {', '.join(lacking)}, which change something here",
            "Add these types to the endpoint in the Stripe dashboard, or let it send all events.",
        )
    version = endpoint.get("api_version")
    if version is None:
        return warning(
            check,
            f"{seen}: its API version is the account's default, and changes with it",
            "Make an endpoint with an API version of its own, and remove this one.",
        )
    if str(version)[:10] > NEWEST_API_VERSION:
        return warning(
            check,
            f"{seen}: API version {version} is newer than those this Kamiyo was tried with ({NEWEST_API_VERSION})",
            "Upgrade Kamiyo, or make an endpoint of an older API version.",
        )
    many = "all events" if "*" in wanted else count(len(wanted), "event type")
    return passed(check, f"{seen}: enabled, sends {many}, API version {version}")


async def _stripes_clock(settings: Settings) -> list[Finding]:
    try:
        async with httpx.AsyncClient(timeout=10) as client:
            before = time.time()
            answer = await client.head(settings.stripe_api_base)
            said = parsedate_to_datetime(answer.headers["Date"])
    except (httpx.HTTPError, httpx.InvalidURL, KeyError, ValueError):
        return []
    # An HTTP date has whole seconds.
    ahead = said.replace(tzinfo=said.tzinfo or UTC).timestamp() + 0.5 - (before + time.time()) / 2
    return [replace(clock("Stripe's", ahead, CLOCK_SECONDS + 1), check="stripe clock")]
