"""A running server, asked from outside as Stripe would.

A delivery without a signature must be refused for that, and one that is signed, but is not an event, must be refused
for *that*. So the secret, the clock, the path and the proxy are proved without storing anything.
"""

import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from urllib.parse import urlsplit

import httpx
from prometheus_client.parser import text_string_to_metric_families

from kamiyo.doctor.configuration import named_secrets
from kamiyo.doctor.finding import STRIPE_PATH, Finding, Subject, failed, network, passed, shown, warning
from kamiyo.settings import Settings
from kamiyo.signature import sign

HEALTH_PATH = "/api/v1/webhooks/health"

# Laid out as Stripe does it, with a letter that is no ASCII: whatever writes JSON anew on the way changes these bytes.
_NO_EVENT = '{\n  "object": "kamiyo.doctor",\n  "note": "é, 1.0"\n}'.encode()


async def answers(subject: Subject) -> AsyncIterator[Finding]:
    # Directly, as Stripe would: no proxy of this shell's environment.
    async with httpx.AsyncClient(timeout=10, trust_env=False, verify=ssl.create_default_context()) as client:
        yield await _health(client, subject.server)
        yield await _metrics(client, subject.server, subject.settings)
        if subject.settings.webhook_secrets or not subject.settings.any_door_open:
            yield await _signatures(client, subject.server, subject.settings)
            yield await _endpoint(client, subject)
        for road, keys in (
            ("eventbridge", subject.settings.eventbridge_keys),
            ("eventgrid", subject.settings.eventgrid_keys),
        ):
            if keys:
                yield await _road(client, subject, road, keys)


async def _health(client: httpx.AsyncClient, server: str) -> Finding:
    check, url = "health", f"{server}{HEALTH_PATH}"
    try:
        answer = await client.get(url)
        status = answer.json()["status"]
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return failed(
            check,
            f"{shown(url)} does not answer: {type(error).__name__}",
            "Start `kamiyo serve`, or say with --url where the server is.",
        )
    except (ValueError, KeyError, TypeError):
        return failed(
            check,
            f"{shown(url)} answers {answer.status_code}, but not as Kamiyo does",
            "Say with --url where Kamiyo is; something else answers there.",
        )
    if status == "healthy":
        return passed(check, f"{shown(url)} says healthy")
    judge = warning if status == "degraded" else failed
    return judge(
        check,
        f"{shown(url)} says {status}",
        "See the checks of database, workers, events and failures; what each means: docs/operations.md, “Monitor”.",
    )


async def _metrics(client: httpx.AsyncClient, server: str, settings: Settings) -> Finding:
    check, url = "metrics", f"{server}/metrics"
    try:
        answer = await client.get(url)
        families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return failed(check, f"{shown(url)} does not answer: {type(error).__name__}", "See the check of health.")
    except ValueError:
        families = {}
    if answer.status_code == 404 and not settings.metrics:
        return warning(check, "KAMIYO_METRICS is off", "Set KAMIYO_METRICS=true, and let Prometheus scrape /metrics.")
    if answer.status_code != 200 or not {"webhook_events", "webhook_processing_duration_seconds"} <= families.keys():
        return failed(
            check,
            f"{shown(url)} answers {answer.status_code}, without Kamiyo's metrics",
            "Let /metrics reach Kamiyo: a proxy or another application answers there.",
        )
    refused: Counter[str] = Counter()
    for sample in families["webhook_rejected"].samples if "webhook_rejected" in families else ():
        if sample.name == "webhook_rejected_total" and sample.labels["reason"] in _REFUSALS:
            refused[sample.labels["reason"]] += int(sample.value)
    worst = [reason for reason, count in refused.most_common() if count]
    if worst:
        told = ", ".join(f"{refused[reason]} {reason}" for reason in worst)
        return warning(
            check, f"{shown(url)} has them; deliveries were refused since the start: {told}", _REFUSALS[worst[0]]
        )
    return passed(check, f"{shown(url)} has them, and counts no refused delivery that asks for a person")


#: What mends each reason of `webhook_rejected_total`. A missing signature is not among them: browsers and strangers
#: cause it, and so does this examination.
_REFUSALS = {
    "signature_no_match": "Verify that STRIPE_WEBHOOK_SECRET is the secret of the endpoint that sends, and that no "
    "proxy changes the body.",
    "signature_too_old": "Compare this machine's clock (timedatectl), or find what holds deliveries back.",
    "signature_too_new": "Compare this machine's clock (timedatectl).",
    "signature_malformed": "Let the proxy pass the header Stripe-Signature on as it came.",
    "databaseunavailable": "See the check of the database; Stripe delivers these again.",
    "overloaded": "Start more server processes (kamiyo serve --workers), or look at the database's disk.",
    "secretmissing": "Set STRIPE_WEBHOOK_SECRET, and start the server again.",
    "api_key": "Compare the header X-Api-Key that EventBridge or Event Grid sends with KAMIYO_EVENTBRIDGE_KEY and "
    "KAMIYO_EVENTGRID_KEY: Event Grid drops what is answered 401.",
    "roadclosed": "Set KAMIYO_EVENTBRIDGE_KEY or KAMIYO_EVENTGRID_KEY, and start the server again.",
    "too_large": "Raise KAMIYO_MAX_BODY_BYTES, if it is Stripe who sends them.",
}


async def _signatures(client: httpx.AsyncClient, server: str, settings: Settings) -> Finding:
    url = f"{server}{STRIPE_PATH}"
    return await _knock(client, "signature", url, settings) or passed(
        "signature", f"{shown(url)} refuses what is unsigned, and knows each of the secrets set here"
    )


async def _endpoint(client: httpx.AsyncClient, subject: Subject) -> Finding:
    check, url = "endpoint", subject.endpoint
    if not url:
        return warning(
            check,
            "where Stripe delivers to is not known, so it was not tried",
            "Set KAMIYO_PUBLIC_URL to the server's public address, or give --endpoint https://…",
        )
    parts = urlsplit(url)
    local = parts.hostname in ("localhost", "127.0.0.1", "::1")
    if parts.scheme != "https" and not (local and subject.settings.development):
        return failed(
            check,
            f"{shown(url)} is not HTTPS: Stripe delivers live events to HTTPS only",
            "Put a TLS proxy before Kamiyo, and name its https:// address in Stripe and in KAMIYO_PUBLIC_URL.",
        )
    return await _knock(client, check, url, subject.settings) or passed(
        check, f"{shown(url)} is reachable, and passes body and signature on unchanged"
    )


async def _knock(client: httpx.AsyncClient, check: str, url: str, settings: Settings) -> Finding | None:
    """Deliver nothing, unsigned and signed; None when each is refused for the right reason."""
    where = shown(url)
    try:
        answer = await client.post(url, content=_NO_EVENT, headers={"Content-Type": "application/json"})
        if answer.status_code != 400 or _detail(answer) != "Missing Stripe signature header":
            return failed(check, f"{where} answers an unsigned delivery {answer.status_code}", _wrong(answer))
        for called, secret in named_secrets(settings):
            headers = {
                "Content-Type": "application/json; charset=utf-8",
                "Stripe-Signature": sign(_NO_EVENT, secret, int(time.time())),
            }
            answer = await client.post(url, content=_NO_EVENT, headers=headers)
            detail = _detail(answer)
            if detail == "Missing Stripe signature header":
                return failed(
                    check,
                    f"{where} does not get the header Stripe-Signature",
                    "Let the proxy pass the header Stripe-Signature on.",
                )
            if detail != "Invalid payload":
                return failed(
                    check,
                    f"{where} refuses what is signed with a secret: {called}",
                    "Start the server again with this secret. If it has it: a proxy changes the body, or a clock is "
                    "wrong; the server's log line delivery_rejected says which.",
                )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return failed(
            check,
            f"{where} cannot be reached: {network(error)}",
            "Check the address, its DNS entry, its certificate, and the firewall.",
        )
    return None


async def _road(client: httpx.AsyncClient, subject: Subject, road: str, keys: Sequence[str]) -> Finding:
    """Deliver nothing by another road: without a key, and with each of them."""
    variable = f"KAMIYO_{road.upper()}_KEY"
    servers = [subject.server]
    if subject.endpoint.endswith(STRIPE_PATH):
        servers.append(subject.endpoint.removesuffix(STRIPE_PATH))
    for url in (f"{server}{STRIPE_PATH.removesuffix('stripe')}{road}" for server in servers):
        where = shown(url)
        try:
            answer = await client.post(url, content=_NO_EVENT, headers={"Content-Type": "application/json"})
            if answer.status_code != 401:
                return failed(
                    road,
                    f"{where} answers a delivery without a key {answer.status_code}",
                    f"Start the server again with this {variable}; let the proxy pass POST on this path on.",
                )
            for number, key in enumerate(keys, 1):
                headers = {"Content-Type": "application/json", "X-Api-Key": key}
                answer = await client.post(url, content=_NO_EVENT, headers=headers)
                if answer.status_code != 400 or _detail(answer) != "Invalid payload":
                    return failed(
                        road,
                        f"{where} answers key number {number} of {variable} with {answer.status_code}",
                        f"Start the server again with this {variable}; let the proxy pass the header X-Api-Key on.",
                    )
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return failed(
                road, f"{where} cannot be reached: {network(error)}", "See the checks of health and endpoint."
            )
    return passed(road, f"{' and '.join(map(shown, servers))} takes what shows a key of {variable}, and nothing else")


def _wrong(answer: httpx.Response) -> str:
    if answer.is_redirect:
        return "Name the address that it redirects to: Stripe follows no redirects."
    mends = {
        401: "Let the proxy admit POST on this path without a login: Stripe signs instead.",
        403: "Let the firewall or proxy admit POST on this path: Stripe has no cookie and no CSRF token.",
        404: f"The path must be {STRIPE_PATH}, and the proxy must pass it on.",
        405: f"The path must be {STRIPE_PATH}, and the proxy must pass POST on.",
        503: "The server has no STRIPE_WEBHOOK_SECRET, or no database: see its log.",
    }
    return mends.get(answer.status_code, "Something else than Kamiyo answers there: check the proxy and the address.")


def _detail(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return ""
