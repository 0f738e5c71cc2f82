"""Is this installation ready, and if not, which sentence mends it?

Each check looks at one thing, says what it saw, and comes to `pass`, `warn` or `fail`. It covers the guide's
production checklist and its common issues. Nothing is changed: no migration is run, no event is stored, no row is
written but the budget that all readers of Stripe's API share. What is said holds no secret.

A running server is asked from outside, as Stripe would: a delivery without a signature must be refused for that, and
one that is signed, but is not an event, must be refused for *that*. So the secret, the clock, the path and the proxy
are proved without storing anything.
"""

import re
import ssl
import stat
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC
from email.utils import parsedate_to_datetime
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import asyncpg
import httpx
from prometheus_client.parser import text_string_to_metric_families

from kamiyo import database, handlers, inbox
from kamiyo.database import DATABASE_ERRORS, Connection, Pool, load_queries
from kamiyo.errors import SettingsError
from kamiyo.settings import LogFormat, Settings
from kamiyo.signature import sign
from kamiyo.stripe_api import PAGE, StripeApi, StripeError, StripeRefused

_SQL = load_queries("doctor.sql")

#: The oldest PostgreSQL that has everything Kamiyo asks of it (idle_session_timeout is new in 14).
OLDEST_POSTGRES = 140000

#: The newest API version whose shapes this Kamiyo was tried with.
NEWEST_API_VERSION = "2026-10-28"

STRIPE_PATH = "/api/v1/webhooks/stripe"
HEALTH_PATH = "/api/v1/webhooks/health"

_NOT_ASKED: tuple[type[BaseException], ...] = (*DATABASE_ERRORS, KeyError, TypeError)

_CLOCK_SECONDS = 2.0
_SHORTEST_ADMIN_KEY = 24
_FEWEST_KINDS_OF_LETTERS = 8
_PLACEHOLDER = re.compile(r"\.\.\.|…|your_|change.?me|example|secure_admin_key", re.IGNORECASE)

# Laid out as Stripe does it, with a letter that is no ASCII: whatever writes JSON anew on the way changes these bytes.
_NO_EVENT = '{\n  "object": "kamiyo.doctor",\n  "note": "é, 1.0"\n}'.encode()


class Verdict(StrEnum):
    """What a check comes to."""

    passed = "pass"
    warning = "warn"
    failed = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: its name, verdict, what was looked at and seen, and the sentence that mends it (none for a pass)."""

    check: str
    verdict: Verdict
    seen: str
    mend: str = ""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is examined.

    `database_url` is None where there is no database yet; `server` the address of a running server as operators reach
    it, `endpoint` where Stripe delivers to (empty: not known). `env_file` is where settings were read from.
    """

    settings: Settings
    database_url: str | None
    server: str
    endpoint: str = ""
    send_test: bool = False
    env_file: Path = field(default_factory=lambda: Path(".env"))


def passed(check: str, seen: str) -> Finding:
    """It is as it should be."""
    return Finding(check, Verdict.passed, seen)


def warning(check: str, seen: str, mend: str) -> Finding:
    """It works, but somebody will be sorry; or it could not be looked at."""
    return Finding(check, Verdict.warning, seen, mend)


def failed(check: str, seen: str, mend: str) -> Finding:
    """Events are lost, refused or not processed while this is so, or strangers may come in."""
    return Finding(check, Verdict.failed, seen, mend)


async def examine(subject: Subject, *, heard: Callable[[Finding], None] = lambda finding: None) -> list[Finding]:
    """Every finding, in the order of the checks; `heard` is told each as it is made."""
    found: list[Finding] = []
    async for finding in _examine(subject):
        clean = _without_secrets(finding, subject)
        heard(clean)
        found.append(clean)
    return found


async def _examine(subject: Subject) -> AsyncIterator[Finding]:
    for finding in (*secrets(subject.settings), *env_file(subject.env_file), *logs(subject.settings)):
        yield finding
    yield _handlers(subject.settings)
    async with _opened(subject) as (db, pool, refused):
        if db is None:
            yield refused
        else:
            async for finding in _database(db, subject):
                yield finding
        async for finding in _server(subject):
            yield finding
        for finding in await alerts(subject.settings, send_test=subject.send_test):
            yield finding
        for finding in await stripe(subject, pool):
            yield finding


# ── Settings ────────────────────────────────────────────────────────────────────────────────────────────────────


def secrets(settings: Settings) -> Iterator[Finding]:
    """The signing secrets, the admin key and Stripe's keys: count, shape, strength and mode."""
    yield _signing_secrets(settings.webhook_secrets)
    yield _admin_key(settings)
    yield _stripe_keys(settings)


def _signing_secrets(given: Sequence[str]) -> Finding:
    check, copy = "signing secret", "Copy the endpoint's signing secret (whsec_…) from the Stripe dashboard into "
    if not given:
        return failed(
            check,
            "STRIPE_WEBHOOK_SECRET is not set, so every delivery is answered 503",
            f"{copy}STRIPE_WEBHOOK_SECRET.",
        )
    seen = f"STRIPE_WEBHOOK_SECRET holds {_count(len(given), 'secret')}"
    for number, secret in enumerate(given, 1):
        what = f"{seen}; number {number} "
        if secret.startswith(("sk_", "rk_", "pk_")):
            return failed(check, f"{what}is an API key", f"{copy}its place.")
        if secret.startswith("we_"):
            return failed(check, f"{what}is an endpoint's id", f"{copy}its place: it is shown beside the id.")
        if _PLACEHOLDER.search(secret):
            return failed(check, f"{what}is a placeholder", f"{copy}its place.")
        if not secret.startswith("whsec_"):
            return failed(check, f"{what}does not begin with whsec_", f"{copy}its place, whole.")
        if not re.fullmatch(r"whsec_[A-Za-z0-9+/=_-]{24,}", secret):
            return failed(
                check,
                f"{what}is too short, or has characters that Stripe's secrets do not have",
                f"{copy}its place, whole and without quotation marks or spaces.",
            )
    if len(set(given)) < len(given):
        return warning(check, f"{seen}, one of them twice", "Take the second copy out of STRIPE_WEBHOOK_SECRET.")
    if len(given) > 4:
        return warning(
            check,
            f"{seen}: each of them lets deliveries in",
            "Take out of STRIPE_WEBHOOK_SECRET those that no endpoint signs with any more, after a rotation say.",
        )
    return passed(check, f"{seen}, shaped as Stripe's are")


def _admin_key(settings: Settings) -> Finding:
    check, key = "admin key", settings.admin_api_key.get_secret_value()
    mend = "Set ADMIN_API_KEY to what this prints: openssl rand -hex 32"
    if not key:
        return failed(check, "ADMIN_API_KEY is not set, so the calls of operators answer 503", mend)
    if _PLACEHOLDER.search(key):
        return failed(check, "ADMIN_API_KEY is a placeholder, which anyone can read in the guide", mend)
    if key in (*settings.webhook_secrets, settings.stripe_secret_key.get_secret_value()):
        return failed(check, "ADMIN_API_KEY is the same as another secret", mend)
    if len(key) < _SHORTEST_ADMIN_KEY or len(set(key)) < _FEWEST_KINDS_OF_LETTERS:
        return failed(
            check,
            f"ADMIN_API_KEY has {len(key)} characters, {len(set(key))} different ones: it can be guessed",
            mend,
        )
    return passed(check, f"ADMIN_API_KEY has {len(key)} characters, {len(set(key))} different ones")


def _stripe_keys(settings: Settings) -> Finding:
    check = "stripe key"
    key, public = settings.stripe_secret_key.get_secret_value(), settings.stripe_publishable_key
    if not key:
        return warning(
            check,
            "STRIPE_SECRET_KEY is not set: events that were never delivered stay unknown, and the endpoints that "
            "Stripe knows were not looked at",
            "Set STRIPE_SECRET_KEY to a restricted key (rk_…) that may read events and webhook endpoints.",
        )
    shape = re.match(r"(sk|rk)_(live|test)_", key)
    if key.startswith("pk_"):
        return failed(
            check, "STRIPE_SECRET_KEY is a publishable key", "Set it to the secret or a restricted key (sk_… or rk_…)."
        )
    if not shape or _PLACEHOLDER.search(key):
        return failed(
            check,
            "STRIPE_SECRET_KEY does not look like a key of Stripe's",
            "Copy it anew from the Stripe dashboard: it begins with rk_live_, rk_test_, sk_live_ or sk_test_.",
        )
    mode = shape[2]
    if public and f"_{mode}_" not in public:
        return failed(
            check,
            f"STRIPE_SECRET_KEY is a {mode} key, and STRIPE_PUBLISHABLE_KEY is not",
            "Take both from the same mode of the same account.",
        )
    if mode == "test" and not settings.development:
        return warning(
            check,
            "STRIPE_SECRET_KEY is a test key: live events are not compared with Stripe's list",
            "In production set the key of live mode; for a trial set KAMIYO_ENV=development.",
        )
    kind = "restricted" if shape[1] == "rk" else "full"
    return passed(check, f"STRIPE_SECRET_KEY is a {kind} key of {mode} mode")


def env_file(path: Path) -> Iterator[Finding]:
    """Whether others on this machine can read the settings' file, where there is one."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return
    if stat.S_IMODE(mode) & (stat.S_IRWXG | stat.S_IRWXO):
        yield warning(
            "settings file",
            f"{path} can be read by others on this machine (mode {stat.S_IMODE(mode):o})",
            f"chmod 600 {path}",
        )
    else:
        yield passed("settings file", f"{path} is readable by its owner alone")


def logs(settings: Settings) -> Iterator[Finding]:
    """How loud the log is, and in which form. Whether somebody reads it cannot be seen from here."""
    seen = f"KAMIYO_LOG_LEVEL is {settings.log_level}, KAMIYO_LOG_FORMAT is {settings.log_format.value}"
    if settings.log_level == "error":
        yield warning("logs", f"{seen}: refused deliveries and failed tries are not logged", "KAMIYO_LOG_LEVEL=info")
    elif settings.log_level == "debug" and not settings.development:
        yield warning("logs", f"{seen}: more than anyone reads", "KAMIYO_LOG_LEVEL=info")
    elif settings.log_format is LogFormat.console and not settings.development:
        yield warning("logs", f"{seen}: no log collector can read that", "KAMIYO_LOG_FORMAT=json")
    else:
        yield passed("logs", f"{seen}; collect standard error, and watch the lines of level error")


def _handlers(settings: Settings) -> Finding:
    try:
        handlers.load(settings.handler_modules)
    except SettingsError as error:
        return failed("handlers", str(error), "Mend the module, or its name in KAMIYO_HANDLERS.")
    own = handlers.registry.types()
    modules = ", ".join(settings.handler_modules) or "none"
    return passed("handlers", f"modules: {modules}; {_count(len(own), 'event type')} with a handler of your own")


# ── The database ────────────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def _opened(subject: Subject) -> AsyncIterator[tuple[Connection | None, Pool | None, Finding]]:
    nothing = failed(
        "database",
        "DATABASE_URL is not set, and there is no embedded PostgreSQL yet",
        "Set DATABASE_URL to your PostgreSQL; for a trial, start once with `make run`.",
    )
    if subject.database_url is None:
        yield None, None, nothing
        return
    try:
        db = await asyncpg.connect(
            subject.database_url, timeout=5, server_settings={"application_name": "kamiyo doctor", "timezone": "UTC"}
        )
    except ValueError:
        # Its words can quote a piece of the password.
        mend = "Write postgresql://user:password@host:5432/name; percent-encode what is special in the password."
        yield None, None, failed("database", "DATABASE_URL cannot be read as an address", mend)
        return
    except DATABASE_ERRORS as error:
        yield (
            None,
            None,
            failed(
                "database",
                f"no connection: {_words(error)}",
                "Check DATABASE_URL, that PostgreSQL runs, and that it lets this machine in.",
            ),
        )
        return
    pool = await database.open_pool(subject.database_url, size=2, application="kamiyo doctor", idle_limit=60)
    try:
        yield db, pool, nothing
    finally:
        await db.close()
        pool.terminate()


async def _database(db: Connection, subject: Subject) -> AsyncIterator[Finding]:
    server = await db.fetchrow(_SQL["server"])
    assert server is not None  # noqa: S101 - a SELECT without FROM has exactly one row
    yield database_server(server["version_number"], server["version"], read_only=server["read_only"])
    yield durability(fsync=server["fsync"], full_pages=server["full_page_writes"], commit=server["synchronous_commit"])
    yield await _clock(db)
    missing = await database.missing_migrations(db)
    if missing:
        yield failed("migrations", f"the database lacks {', '.join(missing)}", "Run: kamiyo migrate")
        return
    yield passed("migrations", f"all {len(database.migration_files())} are there")
    yield await _role(db, subject.settings)
    yield await _workers(db)
    for look in (_processed, _failures, _compared):
        try:
            yield await look(db, subject.settings)
        except asyncpg.InsufficientPrivilegeError as error:
            yield warning("events", f"could not be looked at: {_words(error)}", "See the check of the role, above.")


def database_server(number: int, version: str, *, read_only: bool) -> Finding:
    """PostgreSQL's version (`number` as its server_version_num), and whether it takes writes."""
    if number < OLDEST_POSTGRES:
        return failed("database", f"PostgreSQL {version}", "Upgrade PostgreSQL to 14 or newer.")
    if read_only:
        return failed(
            "database",
            f"PostgreSQL {version} takes no writes: it is a standby, or default_transaction_read_only is on",
            "Let DATABASE_URL name the primary.",
        )
    return passed("database", f"PostgreSQL {version} answers, and takes writes")


def durability(*, fsync: bool, full_pages: bool, commit: str) -> Finding:
    """Whether what was answered 200 is on disk."""
    off = [
        name
        for name, on in (("fsync", fsync), ("full_page_writes", full_pages), ("synchronous_commit", commit != "off"))
        if not on
    ]
    if off:
        return failed(
            "durability",
            f"{' and '.join(off)} {'is' if len(off) == 1 else 'are'} off: an event that was answered 200 can be lost "
            "when the power fails",
            "; ".join(f"ALTER SYSTEM SET {name} = on" for name in off) + "; SELECT pg_reload_conf()",
        )
    return passed("durability", "fsync, full_page_writes and synchronous_commit are on")


async def _clock(db: Connection) -> Finding:
    before = time.time()
    theirs = float(await db.fetchval(_SQL["clock"]))
    return clock("the database's", theirs - (before + time.time()) / 2, _CLOCK_SECONDS)


def clock(whose: str, ahead: float, allowed: float) -> Finding:
    """How far another clock is ahead of ours, in seconds."""
    if abs(ahead) > allowed:
        return failed(
            "clock",
            f"{whose} clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this machine's: retries come "
            "at the wrong time, and right signatures can be refused as too old or too new",
            "Let NTP keep the time on both machines: timedatectl set-ntp true",
        )
    return passed("clock", f"{whose} clock and this machine's agree to within {allowed:g} s")


async def _role(db: Connection, settings: Settings) -> Finding:
    role, rights = await db.fetchrow(_SQL["role"]), await db.fetchrow(_SQL["rights"])
    assert role is not None and rights is not None  # noqa: S101 - the current role exists, an aggregate has one row
    page = "docs/operations.md, “The database role”"
    if rights["lacking"]:
        return failed(
            "role",
            f"{role['name']} may not read and write {', '.join(rights['lacking'][:4])}"
            + (" and others" if len(rights["lacking"]) > 4 else ""),
            f"Grant them as {page}, shows.",
        )
    if settings.database_url is None:
        return passed("role", "the embedded PostgreSQL's own, reached through its socket alone")
    if role["superuser"]:
        return warning(
            "role", f"{role['name']} is a superuser of PostgreSQL", f"Give Kamiyo a role of its own: {page}."
        )
    if settings.auto_migrate and not rights["owner"]:
        return warning(
            "role",
            f"{role['name']} may not change the tables, and KAMIYO_AUTO_MIGRATE is on: a start after an upgrade fails",
            "Set KAMIYO_AUTO_MIGRATE=false, and run `kamiyo migrate` as the owner.",
        )
    return passed("role", f"{role['name']} may read and write all tables, and is no superuser")


async def _workers(db: Connection) -> Finding:
    count = int(await db.fetchval(_SQL["workers"]))
    if not count:
        return failed(
            "workers",
            "no worker is connected to the database",
            "Start `kamiyo worker`, or a server with KAMIYO_WORKER=true.",
        )
    return passed("workers", f"{_count(count, 'process')} with a worker connected")


async def _processed(db: Connection, settings: Settings) -> Finding:
    row = await inbox.queue(db)
    count = int(await db.fetchval(_SQL["processed"]))
    if row["oldest_due_seconds"] > 300:
        return failed(
            "events",
            f"the oldest due event has waited for {row['oldest_due_seconds'] / 60:.0f} minutes",
            "Start more workers, or look for a slow handler: docs/operations.md, “Events wait”.",
        )
    if not count:
        return warning(
            "events",
            "none was processed yet",
            "Send one: stripe trigger customer.created, or ./scripts/test_webhooks.sh",
        )
    return passed("events", f"{'1000 or more' if count == 1000 else count} are processed, {row['backlog']} are waiting")


async def _failures(db: Connection, settings: Settings) -> Finding:
    row, dead = await inbox.health(db), (await inbox.queue(db))["dead"]
    events, bad = row["events_last_24h"], row["failed_events_last_24h"]
    causes = ", ".join(
        f"{cause['error_type']} ({cause['fingerprint']}, {_count(cause['events'], 'event')})"
        for cause in await db.fetch(_SQL["failures"])
    )
    seen = f"{bad} of the last day's {_count(events, 'event')} failed, {dead} dead in all"
    seen += f"; causes: {causes}" if causes else ""
    mend = "Mend the cause, then: kamiyo replay --status failed (see kamiyo events list --status failed)"
    if bad > 0.2 * events:
        return failed("failures", seen, mend)
    if dead or bad > 0.1 * events:
        return warning("failures", seen, mend)
    return passed("failures", seen)


async def _compared(db: Connection, settings: Settings) -> Finding:
    row = await db.fetchrow(_SQL["compared"])
    check = "comparison"
    if not settings.stripe_secret_key.get_secret_value() or not settings.reconcile:
        why = "KAMIYO_RECONCILE is off" if settings.stripe_secret_key.get_secret_value() else "there is no key"
        return warning(
            check,
            f"events are not compared with Stripe's own list: {why}",
            "Set STRIPE_SECRET_KEY and KAMIYO_RECONCILE=true.",
        )
    ago: float | None = row["seconds_ago"] if row is not None else None
    if ago is None or ago > 3600:
        when = "never" if ago is None else f"{ago / 3600:.0f} hours ago"
        return warning(
            check,
            f"the last comparison with Stripe's list of events: {when}",
            "Let a worker run with STRIPE_SECRET_KEY, or run: kamiyo reconcile",
        )
    if row is not None and row["missed"]:
        return warning(
            check,
            f"the last one found {_count(row['missed'], 'event')} that never came; they are in now",
            "Look at the endpoint's failed deliveries in the Stripe dashboard.",
        )
    return passed(check, f"the last one, {ago / 60:.0f} minutes ago, found nothing missing")


# ── A running server ────────────────────────────────────────────────────────────────────────────────────────────


async def _server(subject: Subject) -> AsyncIterator[Finding]:
    # Directly, as Stripe would: no proxy of this shell's environment.
    async with httpx.AsyncClient(timeout=10, trust_env=False, verify=ssl.create_default_context()) as client:
        yield await _health(client, subject.server)
        yield await _metrics(client, subject.server, subject.settings)
        yield await _signatures(client, subject.server, subject.settings)
        yield await _endpoint(client, subject)


async def _health(client: httpx.AsyncClient, server: str) -> Finding:
    check, url = "health", f"{server}{HEALTH_PATH}"
    try:
        answer = await client.get(url)
        status = answer.json()["status"]
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return failed(
            check,
            f"{_shown(url)} does not answer: {type(error).__name__}",
            "Start `kamiyo serve`, or say with --url where the server is.",
        )
    except (ValueError, KeyError, TypeError):
        return failed(
            check,
            f"{_shown(url)} answers {answer.status_code}, but not as Kamiyo does",
            "Say with --url where Kamiyo is; something else answers there.",
        )
    if status == "healthy":
        return passed(check, f"{_shown(url)} says healthy")
    judge = warning if status == "degraded" else failed
    return judge(
        check,
        f"{_shown(url)} says {status}",
        "See the checks of database, workers, events and failures; what each means: docs/operations.md, “Monitor”.",
    )


async def _metrics(client: httpx.AsyncClient, server: str, settings: Settings) -> Finding:
    check, url = "metrics", f"{server}/metrics"
    try:
        answer = await client.get(url)
        families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return failed(check, f"{_shown(url)} does not answer: {type(error).__name__}", "See the check of health.")
    except ValueError:
        families = {}
    if answer.status_code == 404 and not settings.metrics:
        return warning(check, "KAMIYO_METRICS is off", "Set KAMIYO_METRICS=true, and let Prometheus scrape /metrics.")
    if answer.status_code != 200 or not {"webhook_events", "webhook_processing_duration_seconds"} <= families.keys():
        return failed(
            check,
            f"{_shown(url)} answers {answer.status_code}, without Kamiyo's metrics",
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
            check, f"{_shown(url)} has them; deliveries were refused since the start: {told}", _REFUSALS[worst[0]]
        )
    return passed(check, f"{_shown(url)} has them, and counts no refused delivery that asks for a person")


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
    "too_large": "Raise KAMIYO_MAX_BODY_BYTES, if it is Stripe who sends them.",
}


async def _signatures(client: httpx.AsyncClient, server: str, settings: Settings) -> Finding:
    url = f"{server}{STRIPE_PATH}"
    return await _knock(client, "signature", url, settings) or passed(
        "signature", f"{_shown(url)} refuses what is unsigned, and knows each of the secrets set here"
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
            f"{_shown(url)} is not HTTPS: Stripe delivers live events to HTTPS only",
            "Put a TLS proxy before Kamiyo, and name its https:// address in Stripe and in KAMIYO_PUBLIC_URL.",
        )
    return await _knock(client, check, url, subject.settings) or passed(
        check, f"{_shown(url)} is reachable, and passes body and signature on unchanged"
    )


async def _knock(client: httpx.AsyncClient, check: str, url: str, settings: Settings) -> Finding | None:
    """Deliver nothing, unsigned and signed; None when each is refused for the right reason."""
    where = _shown(url)
    try:
        answer = await client.post(url, content=_NO_EVENT, headers={"Content-Type": "application/json"})
        if answer.status_code != 400 or _detail(answer) != "Missing Stripe signature header":
            return failed(check, f"{where} answers an unsigned delivery {answer.status_code}", _wrong(answer))
        for number, secret in enumerate(settings.webhook_secrets, 1):
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
                    f"{where} refuses what is signed with secret number {number} of STRIPE_WEBHOOK_SECRET",
                    "Start the server again with this secret. If it has it: a proxy changes the body, or a clock is "
                    "wrong; the server's log line delivery_rejected says which.",
                )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return failed(
            check,
            f"{where} cannot be reached: {_network(error)}",
            "Check the address, its DNS entry, its certificate, and the firewall.",
        )
    return None


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


# ── Whom to tell ────────────────────────────────────────────────────────────────────────────────────────────────


async def alerts(settings: Settings, *, send_test: bool) -> list[Finding]:
    """Whether there is someone to tell; with `send_test`, whether each channel takes a message."""
    check = "alerts"
    if not settings.alert_channels:
        return [
            warning(
                check,
                "nobody is told when events die or the database is away",
                "Set DISCORD_WEBHOOK_URL, SLACK_WEBHOOK_URL or ALERT_URLS, then: kamiyo doctor --send-test",
            )
        ]
    # Apprise and its hundred plugins take 36 MB: only where there is someone to tell.
    apprise: Any = import_module("apprise")
    found = []
    for number, url in enumerate(settings.alert_channels, 1):
        # Never the address itself: it holds the key to the channel.
        name = f"channel {number} ({url.split(':', 1)[0]}://…)"
        channel = apprise.Apprise()
        if not channel.add(url):
            mend = "Correct it in ALERT_URLS, DISCORD_WEBHOOK_URL or SLACK_WEBHOOK_URL."
            found.append(failed(check, f"{name} is no address that Apprise understands", mend))
        elif not send_test:
            found.append(passed(check, f"{name} is configured; --send-test proves that it reaches a person"))
        elif await channel.async_notify(
            title="Kamiyo: a test", body="kamiyo doctor --send-test asked for this. Nothing is wrong."
        ):
            found.append(passed(check, f"{name} took a test message"))
        else:
            found.append(
                failed(
                    check, f"{name} did not take a test message", "Make the channel's address anew, and set it here."
                )
            )
    return found


# ── What Stripe knows ───────────────────────────────────────────────────────────────────────────────────────────


async def stripe(subject: Subject, pool: Pool | None) -> list[Finding]:
    """The endpoints that Stripe has for the key's account and mode, and its clock. Nothing without a key."""
    settings = subject.settings
    if not settings.stripe_secret_key.get_secret_value():
        return []
    if pool is None:
        return [
            warning("stripe", "was not asked: the requests' budget is kept in the database", "Mend the database first.")
        ]
    api = StripeApi(pool, settings)
    try:
        endpoints = await _endpoints_of(api)
    except StripeRefused as error:
        may = "Let the key read webhook endpoints (Stripe dashboard, API keys), or set one that exists."
        return [failed("stripe", str(error), may)]
    except StripeError as error:
        return [warning("stripe", str(error), "Run this again later; look at the network between here and Stripe.")]
    except _NOT_ASKED as error:
        return [warning("stripe", f"was not asked: {_words(error)}", "Mend the database first; run `kamiyo migrate`.")]
    finally:
        await api.close()
    found = list(endpoints_known(endpoints, subject, livemode=api.livemode))
    return [*found, *await _stripes_clock(settings)]


async def _endpoints_of(api: StripeApi) -> list[dict[str, Any]]:
    endpoints: list[dict[str, Any]] = []
    after: dict[str, str] = {}
    while True:
        page = await api.read("/v1/webhook_endpoints", {"limit": PAGE, **after}, patience=20)
        endpoints += page["data"]
        if not page["has_more"] or not page["data"]:
            return endpoints
        after = {"starting_after": endpoints[-1]["id"]}


def endpoints_known(endpoints: Iterable[dict[str, Any]], subject: Subject, *, livemode: bool) -> Iterator[Finding]:
    """What Stripe's list of webhook endpoints says of those that deliver here.

    Source: Stripe's API reference, "The Webhook Endpoint object": `enabled_events` is ["*"] for all events but those
    that must be chosen one by one, `api_version` null for the account's default, `status` enabled or disabled.
    """
    every = list(endpoints)
    mode = "live" if livemode else "test"
    ours = [one for one in every if _is_ours(one, subject.endpoint)]
    if not ours:
        wanted = _shown(subject.endpoint) if subject.endpoint else f"a path {STRIPE_PATH}"
        yield failed(
            "stripe endpoints",
            f"Stripe knows {_count(len(every), 'endpoint')} in {mode} mode, and none has {wanted}",
            f"Add the endpoint in the Stripe dashboard, in {mode} mode: https://your-host{STRIPE_PATH}",
        )
        return
    for one in ours:
        yield _endpoint_known(one, mode)
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
            f"{len(enabled)} enabled endpoints of {mode} mode deliver here, and STRIPE_WEBHOOK_SECRET holds "
            f"{_count(len(subject.settings.webhook_secrets), 'secret')}: the others' deliveries are refused",
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
    return theirs.path == STRIPE_PATH and "shadow" in theirs.query


def _endpoint_known(endpoint: dict[str, Any], mode: str) -> Finding:
    check = f"endpoint {endpoint['id']}"
    seen = f"{mode} mode, {_shown(str(endpoint['url']))}"
    if endpoint["status"] != "enabled":
        return failed(
            check,
            f"{seen}: it is {endpoint['status']}, so nothing is delivered",
            "Enable it in the Stripe dashboard, then fetch what is missing: kamiyo reconcile --since 7d",
        )
    if urlsplit(str(endpoint["url"])).scheme != "https":
        return failed(check, f"{seen}: not HTTPS", "Change its address in the Stripe dashboard to https://…")
    if str(endpoint["url"]).endswith("/"):
        return failed(
            check,
            f"{seen}: the slash at the end is another path, which is answered with a redirect",
            "Take the slash off in the Stripe dashboard: Stripe follows no redirects.",
        )
    wanted = endpoint["enabled_events"]
    lacking = [] if "*" in wanted else [name for name in handlers.supported_types() if name not in wanted]
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
    many = "all events" if "*" in wanted else _count(len(wanted), "event type")
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
    return [replace(clock("Stripe's", ahead, _CLOCK_SECONDS + 1), check="stripe clock")]


# ── Words ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _count(number: int, what: str) -> str:
    plural = "es" if what.endswith("s") else "s"
    return f"{number} {what}" if number == 1 else f"{number} {what}{plural}"


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _network(error: Exception) -> str:
    text = str(error)
    certificate = re.search(r"certificate verify failed: ([\w' -]+)", text)
    return f"its certificate is refused ({certificate[1].strip()})" if certificate else type(error).__name__


def _shown(url: str) -> str:
    """An address without what may be secret in it: user, password, query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _without_secrets(finding: Finding, subject: Subject) -> Finding:
    # No check puts one in; this is for the words of others (PostgreSQL's, an importing handler's) that are passed on.
    settings = subject.settings
    url = settings.database_url.get_secret_value() if settings.database_url else ""
    password = re.match(r"\w+://[^:/]*:(.*)@", url)
    known = {
        *settings.webhook_secrets,
        settings.admin_api_key.get_secret_value(),
        settings.stripe_secret_key.get_secret_value(),
        *settings.alert_channels,
        *((url, password[1], unquote(password[1])) if password else ()),
    }
    seen, mend = finding.seen, finding.mend
    for secret in sorted((one for one in known if len(one) >= 4), key=len, reverse=True):
        seen, mend = seen.replace(secret, "•••"), mend.replace(secret, "•••")
    return replace(finding, seen=seen, mend=mend)
