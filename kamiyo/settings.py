"""All settings: one validated object, built at a door and passed down.

Values come from the environment and from `.env` (the environment wins). A wrong one stops the start with a
sentence that names the variable and says what it takes. `.env.example` is generated from this file:
`python -m kamiyo.settings > .env.example`.
"""

import dataclasses
import json
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from dotenv import dotenv_values
from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

from kamiyo.errors import SettingsError


class Environment(StrEnum):
    """Where this runs: `production` refuses what is only convenient in `development`."""

    development = "development"
    production = "production"


class LogFormat(StrEnum):
    """`auto` is `console` on a terminal and `json` anywhere else."""

    auto = "auto"
    json = "json"
    console = "console"


#: The source of an event whose signing secret has no name of its own.
WEBHOOK = "webhook"

# Words that say of an event by which other road it came; an endpoint of that name could not be told from it.
_OTHER_ROADS = frozenset(
    {WEBHOOK, "reconcile", "eventbridge", "eventgrid", "simulator", "backfill", "audit", "shadow", "replay"}
)
_SOURCE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
_ACCOUNT = re.compile(r"acct_[A-Za-z0-9_]{1,200}")
_DRIVER = re.compile(r"\A(postgres|postgresql)\+[a-z0-9_]+(?=://)")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^:@\[\]]*)(:[0-9]*)?")

#: An admin key of fewer characters, or of fewer different ones, can be guessed.
SHORTEST_KEY, FEWEST_KINDS_OF_LETTERS = 24, 8

_PLACEHOLDER = re.compile(r"\.\.\.|…|your_|change.?me|example|secure_admin_key", re.IGNORECASE)

# As a whole: what merely holds such a word may be somebody's own.
_PRINTED = re.compile(r"(whsec_|[sr]k_(test|live)_)?(\.\.\.|…|x{3,}|your_[a-z_]+|change.?me)( or .*)?", re.IGNORECASE)

# How alike a name must be to one of ours to be taken for a slip: those of others must not be.
_ALIKE = 0.85


@dataclass(frozen=True, slots=True)
class SigningSecret:
    """What an endpoint's deliveries are signed with, and the name that their events are stored under."""

    source: str
    secret: str = dataclasses.field(repr=False)

    @property
    def account(self) -> str:
        """The account whose endpoint it is, where the name says so; empty otherwise."""
        return self.source if self.source.startswith("acct_") else ""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key of Stripe's API: the account that it belongs to (empty: one's own), and its mode."""

    account: str
    key: str = dataclasses.field(repr=False)

    @property
    def livemode(self) -> bool:
        """Whether it is a key of live mode."""
        return "_live_" in self.key


def _setting(name: str, default: Any, description: str, **bounds: Any) -> Any:
    return Field(default=default, validation_alias=name, description=description, **bounds)


class Settings(BaseSettings):
    """Kamiyo's settings. Every field's description is what `.env.example` and the reference say of it."""

    model_config = SettingsConfigDict(
        env_file=".env", env_file_encoding="utf-8", extra="ignore", frozen=True, hide_input_in_errors=True
    )

    stripe_webhook_secret: SecretStr = _setting(
        "STRIPE_WEBHOOK_SECRET",
        SecretStr(""),
        "Signing secret of the Stripe endpoint (whsec_…). Several, separated by commas, are all accepted: "
        "rotation, live and test, platform and Connect. Without one every delivery is answered 503.",
    )
    stripe_webhook_secrets: SecretStr = _setting(
        "STRIPE_WEBHOOK_SECRETS",
        SecretStr(""),
        "Signing secrets by the name of their endpoint, beside or instead of STRIPE_WEBHOOK_SECRET, as JSON: "
        '{"platform": "whsec_…", "connect": ["whsec_…", "whsec_…"]}. The name is stored with each event as its source. '
        "A name that is an account's id (acct_…) files events that name no account under that account.",
    )
    shadow_webhook_secret: SecretStr = _setting(
        "STRIPE_SHADOW_WEBHOOK_SECRET",
        SecretStr(""),
        "Signing secret of a twin endpoint (…/stripe?shadow=1) on an API version that is to be tried: what it delivers "
        "is only compared, see `kamiyo upgrade-report`. Never one of STRIPE_WEBHOOK_SECRET or STRIPE_WEBHOOK_SECRETS: "
        "so neither endpoint's events can come in by the other's door.",
    )
    admin_api_key: SecretStr = _setting(
        "ADMIN_API_KEY",
        SecretStr(""),
        "Key for the calls and pages of operators (header X-Admin-Key). Without one they answer 503. "
        "Make one with: openssl rand -hex 32",
    )
    stripe_secret_key: SecretStr = _setting(
        "STRIPE_SECRET_KEY",
        SecretStr(""),
        "Stripe API key (sk_… or rk_…). Receiving works without it; thin events, ties and events that were never "
        "delivered need it. Two, separated by a comma, for live and test mode. Connected accounts are read with it "
        "too.",
    )
    stripe_secret_keys: SecretStr = _setting(
        "STRIPE_SECRET_KEYS",
        SecretStr(""),
        "API keys of accounts that STRIPE_SECRET_KEY cannot read (members of an organisation, other accounts of one's "
        'own), as JSON: {"acct_…": "rk_live_…", "acct_…": ["rk_live_…", "rk_test_…"]}.',
    )
    stripe_account_id: str = _setting(
        "STRIPE_ACCOUNT_ID",
        "",
        "The id (acct_…) of one's own account. Events that name it are filed like those that name none. Needed only "
        "where an organisation's endpoint delivers one's own events as well.",
        pattern=r"^(acct_[A-Za-z0-9_]{1,200})?$",
    )
    stripe_api_base: str = _setting(
        "STRIPE_API_BASE", "https://api.stripe.com", "Where Stripe's API is; another address only for tests."
    )
    stripe_api_rate: int = _setting(
        "KAMIYO_STRIPE_API_RATE",
        20,
        "Requests a second to Stripe's API, of all processes together. Stripe allows about 100 live, 25 in test mode.",
        ge=1,
        le=100,
    )
    stripe_api_timeout: float = _setting(
        "KAMIYO_STRIPE_API_TIMEOUT", 20.0, "Seconds one request to Stripe's API may take.", gt=0, le=120
    )
    reconcile: bool = _setting(
        "KAMIYO_RECONCILE",
        True,
        "Compare with Stripe's own list of events every 15 minutes, one process of many. Needs STRIPE_SECRET_KEY.",
    )
    eventbridge_key: SecretStr = _setting(
        "KAMIYO_EVENTBRIDGE_KEY",
        SecretStr(""),
        "Key that Amazon EventBridge sends in the header X-Api-Key. Several, separated by commas, are all accepted: "
        "rotation. Without one the call answers 503. Make one with: openssl rand -hex 32",
    )
    eventgrid_key: SecretStr = _setting(
        "KAMIYO_EVENTGRID_KEY",
        SecretStr(""),
        "The same for Azure Event Grid, also in the header X-Api-Key.",
    )
    stripe_publishable_key: str = _setting(
        "STRIPE_PUBLISHABLE_KEY", "", "Stripe publishable key (pk_…). Not used here; kept beside the others."
    )
    database_url: SecretStr | None = _setting(
        "DATABASE_URL",
        None,
        "PostgreSQL 14 or newer, as postgresql://user:password@host:5432/name (a driver in it, postgresql+asyncpg, is "
        "passed over). Without it an embedded PostgreSQL is started, and its data kept in KAMIYO_DATA_DIR.",
    )
    data_dir: Path = _setting(
        "KAMIYO_DATA_DIR", Path(".kamiyo"), "Folder of the embedded PostgreSQL and of the development secret."
    )
    environment: Environment = _setting(
        "KAMIYO_ENV",
        Environment.production,
        "development or production. `make run` says development: it makes itself a signing secret and an admin key.",
    )
    host: str = _setting("HOST", "127.0.0.1", "Address `kamiyo serve` listens on; 0.0.0.0 for every interface.")
    port: int = _setting("PORT", 8000, "Port `kamiyo serve` listens on.", ge=1, le=65535)
    handlers: str = _setting(
        "KAMIYO_HANDLERS",
        "",
        "Python modules with @on(…) handlers, separated by commas, imported at the start: myapp.billing",
    )
    mirror: str = _setting(
        "KAMIYO_MIRROR",
        "",
        "Keep the latest state of objects as JSON in the table stripe_objects: all, or names of objects or event "
        "types, separated by commas (charge,refund,checkout.session). Their events are left to the workers.",
        pattern=r"^[a-z0-9_., ]*$",
    )
    auto_migrate: bool = _setting(
        "KAMIYO_AUTO_MIGRATE",
        True,
        "Complete missing migrations at the start. Off: the start says what to run, and stops.",
    )
    worker: bool = _setting(
        "KAMIYO_WORKER",
        True,
        "Process events inside the server too. Off where `kamiyo worker` runs on its own.",
    )
    worker_concurrency: int = _setting(
        "KAMIYO_WORKER_CONCURRENCY",
        4,
        "Batches a worker works on at the same time, each on a connection of its own.",
        ge=1,
        le=64,
    )
    worker_batch: int = _setting(
        "KAMIYO_WORKER_BATCH", 200, "Events a worker claims at a time, at most.", ge=1, le=5000
    )
    handler_timeout: float = _setting(
        "KAMIYO_HANDLER_TIMEOUT",
        30.0,
        "Seconds one handler may take; then its try has failed and is retried by the curve.",
        gt=0,
        le=3600,
    )
    idle_limit: float = _setting(
        "KAMIYO_IDLE_LIMIT",
        30.0,
        "Seconds beyond KAMIYO_HANDLER_TIMEOUT after which PostgreSQL ends a session that says nothing, so that a "
        "process that is stopped or cut off lets go of its customers. The watchdog acts after half of them.",
        ge=0.5,
        le=3600,
    )
    watchdog: bool = _setting(
        "KAMIYO_WATCHDOG",
        False,
        "End the process (exit status 70) when a handler blocks its event loop for good, so that whoever supervises it "
        "starts it anew. `kamiyo serve` and `kamiyo worker` turn it on; off inside an application of your own.",
    )
    first_retry_delay: float = _setting(
        "KAMIYO_FIRST_RETRY_DELAY",
        10.0,
        "Seconds before the second try of a failed event; each later wait is six times the one before.",
        ge=0.01,
        le=3600,
    )
    signature_tolerance: int = _setting(
        "KAMIYO_SIGNATURE_TOLERANCE",
        300,
        "Seconds a signature's time stamp may be old or early. Never 0: that would switch replay protection off.",
        ge=1,
        le=86400,
    )
    max_body_bytes: int = _setting(
        "KAMIYO_MAX_BODY_BYTES",
        1_048_576,
        "Longest body accepted, in bytes; a longer one is answered 413.",
        ge=1024,
    )
    max_waiting: int = _setting(
        "KAMIYO_MAX_WAITING",
        2000,
        "Deliveries that may wait for their commit in one process; beyond it they are answered 503 at once, "
        "so that Stripe delivers again later and memory stays bounded.",
        ge=1,
    )
    commit_timeout: float = _setting(
        "KAMIYO_COMMIT_TIMEOUT",
        10.0,
        "Seconds a delivery waits for its commit before it is answered 503. Stripe gives up after about 20.",
        gt=0,
        le=60,
    )
    pool_size: int = _setting("KAMIYO_POOL_SIZE", 10, "Database connections of one process, at most.", ge=4, le=500)
    shutdown_grace: float = _setting(
        "KAMIYO_SHUTDOWN_GRACE",
        20.0,
        "Seconds a stopping process may take to finish what is in flight.",
        gt=0,
        le=600,
    )
    metrics: bool = _setting("KAMIYO_METRICS", True, "Answer /metrics for Prometheus; off: 404.")
    traces: bool = _setting(
        "KAMIYO_TRACES",
        False,
        "Record each event's way as an OpenTelemetry trace; needs kamiyo-webhooks[otel]. Where to and how many is said "
        "by OpenTelemetry's own variables: OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_SAMPLER, OTEL_SERVICE_NAME, …",
    )
    trace_url: str = _setting(
        "KAMIYO_TRACE_URL",
        "",
        "Where a trace can be looked at, for the links on the dashboard; {trace_id} stands for its id: "
        "https://jaeger.example.com/trace/{trace_id}",
        pattern=r"^(https?://\S*\{trace_id\}\S*)?$",
    )
    alert_urls: SecretStr = _setting(
        "ALERT_URLS",
        SecretStr(""),
        "Whom to tell when something needs a person: Apprise URLs, separated by commas or spaces "
        "(mailto://…, discord://…, slack://…, pagerduty://…). Each incident is told once, and when it is over.",
    )
    discord_webhook_url: SecretStr = _setting(
        "DISCORD_WEBHOOK_URL",
        SecretStr(""),
        "A Discord channel to tell, as its settings give it: https://discord.com/…",
    )
    slack_webhook_url: SecretStr = _setting(
        "SLACK_WEBHOOK_URL", SecretStr(""), "A Slack channel to tell, as its app gives it: https://hooks.slack.com/…"
    )
    public_url: str = _setting(
        "KAMIYO_PUBLIC_URL",
        "",
        "Where operators reach this server, for the links in alerts: https://api.example.com",
        pattern=r"^(https?://\S+)?$",
    )
    log_level: str = _setting(
        "KAMIYO_LOG_LEVEL", "info", "debug, info, warning or error.", pattern="^(debug|info|warning|error)$"
    )
    log_format: LogFormat = _setting(
        "KAMIYO_LOG_FORMAT", LogFormat.auto, "auto (readable on a terminal, JSON elsewhere), json or console."
    )

    @field_validator("database_url", mode="before")
    @classmethod
    def _empty_is_unset(cls, value: Any) -> Any:
        # An application that has one for SQLAlchemy names a driver in it, postgresql+asyncpg://; the rest is the same.
        return (_DRIVER.sub(r"\1", value) if isinstance(value, str) else value) or None

    @field_validator("database_url")
    @classmethod
    def _is_postgres(cls, value: SecretStr | None) -> SecretStr | None:
        address = value.get_secret_value() if value is not None else "postgresql://"
        scheme, _, rest = address.partition("://")
        if scheme.strip() != scheme or scheme.startswith(("'", '"')):
            raise ValueError("must be without quotation marks and spaces around it")
        if scheme not in ("postgresql", "postgres"):
            raise ValueError("must be a PostgreSQL address: postgresql://user:password@host:5432/name")
        # What stands between the last @ and the path, a host or several, each with its port.
        hosts = rest.partition("?")[0].partition("/")[0].rpartition("@")[2]
        if "#" in rest or not all(_HOST.fullmatch(host) for host in hosts.split(",")):
            raise ValueError(
                "cannot be read: in the user's name and the password write # as %23, / as %2F, @ as %40, : as %3A"
            )
        return value

    @field_validator("log_level", mode="before")
    @classmethod
    def _in_small_letters(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @field_validator("stripe_webhook_secrets")
    @classmethod
    def _are_secrets_by_source(cls, value: SecretStr) -> SecretStr:
        named: dict[str, str] = {}
        for source, secret in _by_name(value, '{"platform": "whsec_…", "connect": ["whsec_…", "whsec_…"]}'):
            if not _SOURCE_NAME.fullmatch(source):
                raise ValueError("a name is letters, digits, - and _, up to 64 of them, and begins with a letter")
            if source in _OTHER_ROADS:
                raise ValueError(
                    f"an endpoint cannot be called {source}: that is how events of another road are stored"
                )
            if named.setdefault(secret, source) != source:
                raise ValueError(f"{named[secret]} and {source} have the same secret; each endpoint has one of its own")
        return value

    @field_validator("stripe_secret_key")
    @classmethod
    def _are_keys(cls, value: SecretStr) -> SecretStr:
        _one_for_each_mode(ApiKey("", key) for key in _listed(value))
        return value

    @field_validator("stripe_secret_keys")
    @classmethod
    def _are_keys_by_account(cls, value: SecretStr) -> SecretStr:
        keys = [ApiKey(*pair) for pair in _by_name(value, '{"acct_…": "rk_live_…"}')]
        if not all(_ACCOUNT.fullmatch(key.account) for key in keys):
            raise ValueError("each name must be an account's id, acct_…")
        _one_for_each_mode(keys)
        return value

    @property
    def signing_secrets(self) -> tuple[SigningSecret, ...]:
        """The signing secrets, those with a name first."""
        named = [SigningSecret(*pair) for pair in _by_name(self.stripe_webhook_secrets)]
        plain = [SigningSecret(WEBHOOK, secret) for secret in _listed(self.stripe_webhook_secret)]
        known = {secret.secret for secret in named}
        return (*named, *(secret for secret in plain if secret.secret not in known))

    @property
    def webhook_secrets(self) -> tuple[str, ...]:
        """What deliveries may be signed with, in the order of `signing_secrets`."""
        return tuple(secret.secret for secret in self.signing_secrets)

    @property
    def api_keys(self) -> tuple[ApiKey, ...]:
        """The keys of Stripe's API, those of one's own account first."""
        own = [ApiKey("", key) for key in _listed(self.stripe_secret_key)]
        return (*own, *(ApiKey(*pair) for pair in _by_name(self.stripe_secret_keys)))

    @property
    def eventbridge_keys(self) -> tuple[str, ...]:
        """Keys that Amazon EventBridge may show."""
        return _listed(self.eventbridge_key)

    @property
    def eventgrid_keys(self) -> tuple[str, ...]:
        """Keys that Azure Event Grid may show."""
        return _listed(self.eventgrid_key)

    @property
    def any_door_open(self) -> bool:
        """Whether events can come in by any road at all."""
        return bool(self.signing_secrets or self.eventbridge_keys or self.eventgrid_keys)

    @field_validator("shadow_webhook_secret")
    @classmethod
    def _is_another(cls, value: SecretStr, info: ValidationInfo) -> SecretStr:
        plain, named = info.data.get("stripe_webhook_secret"), info.data.get("stripe_webhook_secrets")
        real = {*(_listed(plain) if plain else ()), *(secret for _, secret in _by_name(named or SecretStr("")))}
        if set(_listed(value)) & real:
            raise ValueError("must be another than those of STRIPE_WEBHOOK_SECRET and STRIPE_WEBHOOK_SECRETS")
        return value

    @property
    def shadow_secrets(self) -> tuple[str, ...]:
        """The signing secrets of the twin endpoint; none where there is no such endpoint."""
        return _listed(self.shadow_webhook_secret)

    def may_read(self, account: str, *, livemode: bool) -> bool:
        """Whether objects of this account and mode can be read from Stripe: with its key, or with one's own.

        To a key of the other mode they do not exist.
        """
        return any(key.livemode == livemode and key.account in ("", account) for key in self.api_keys)

    @property
    def handler_modules(self) -> tuple[str, ...]:
        """Names of the modules to import for their handlers."""
        return tuple(part.strip() for part in self.handlers.split(",") if part.strip())

    @property
    def mirrored(self) -> frozenset[str]:
        """What `stripe_objects` keeps: names of objects and event types, or `all`."""
        return frozenset(part.strip() for part in self.mirror.split(",") if part.strip())

    @property
    def alert_channels(self) -> tuple[str, ...]:
        """Whom to tell, as Apprise URLs."""
        plain = (self.discord_webhook_url.get_secret_value(), self.slack_webhook_url.get_secret_value())
        listed = self.alert_urls.get_secret_value().replace(",", " ").split()
        return tuple(url for url in (*listed, *plain) if url)

    @property
    def development(self) -> bool:
        """Whether this process may be generous to a newcomer."""
        return self.environment is Environment.development


def _listed(value: SecretStr) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.get_secret_value().split(",") if part.strip())


def _by_name(value: SecretStr, example: str = "") -> Iterator[tuple[str, str]]:
    """Pairs of a JSON object whose values are texts or lists of texts. Raises ValueError with a sentence."""
    text = value.get_secret_value().strip()
    if not text:
        return
    try:
        pairs: Any = json.loads(text, object_pairs_hook=lambda pairs: pairs)
    except (ValueError, RecursionError):
        # What the parser says quotes nothing, but the text itself would be shown as the error's cause.
        pairs = None
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise ValueError(f"must be a JSON object on one line, without quotation marks around it: {example}") from None
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("says one name twice; give it a list")
    for name, given in pairs:
        values = given if isinstance(given, list) and given else [given]
        if not all(isinstance(one, str) and one.strip() for one in values):
            raise ValueError(f"each name takes one text or a list of them: {example}")
        yield from ((name, one.strip()) for one in values)


def _one_for_each_mode(keys: Iterable[ApiKey]) -> None:
    seen: set[tuple[str, bool]] = set()
    for key in keys:
        if (key.account, key.livemode) in seen:
            raise ValueError("has two keys of one mode for one account; give one of live mode and one of test mode")
        seen.add((key.account, key.livemode))


_Overrides = Annotated[Any, "values by environment variable name; they win over everything"]


def load_settings(**overrides: _Overrides) -> Settings:
    """Read the environment and `.env`.

    Raises SettingsError with one line for each variable that is wrong: its name and what it takes, never its value.
    """
    try:
        return Settings(**overrides)
    except ValidationError as error:
        lines = [f"{_variable(problem['loc'])}: {_takes(problem)}" for problem in error.errors()]
        raise SettingsError("\n".join(lines)) from None


def _variable(location: tuple[int | str, ...]) -> str:
    return str(location[0]) if location else "settings"


def _takes(problem: Any) -> str:
    field = _field_of(_variable(problem["loc"]))
    said = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "string_pattern_mismatch":
        said = "has another form than it must have"
    sentence = said[:1].lower() + said[1:]
    return f"{sentence}. {field.description}" if field and field.description else sentence


def _field_of(variable: str) -> FieldInfo | None:
    return next((field for field in Settings.model_fields.values() if field.validation_alias == variable), None)


def is_placeholder(secret: str) -> bool:
    """Whether it is what a guide prints in a secret's place, and so known to everybody."""
    return _PLACEHOLDER.search(secret) is not None


def in_force(settings: Settings) -> Settings:
    """The settings as a server takes them: in production a placeholder counts as not set.

    Whoever has read the guide could sign events with it, or come in as an operator.
    """
    if settings.development:
        return settings
    real: dict[str, SecretStr] = {}
    for name in ("stripe_webhook_secret", "admin_api_key", "stripe_secret_key"):
        given = _listed(getattr(settings, name))
        left = [secret for secret in given if not _PRINTED.fullmatch(secret)]
        if len(left) < len(given):
            real[name] = SecretStr(",".join(left))
    named = [*_by_name(settings.stripe_webhook_secrets)]
    by_source: dict[str, list[str]] = {}
    for source, secret in named:
        if not _PRINTED.fullmatch(secret):
            by_source.setdefault(source, []).append(secret)
    if sum(map(len, by_source.values())) < len(named):
        real["stripe_webhook_secrets"] = SecretStr(json.dumps(by_source))
    return settings.model_copy(update=real) if real else settings


def is_guessable(key: str) -> bool:
    """Whether a key is so short, or of so few different characters, that it can be found by trying."""
    return len(key) < SHORTEST_KEY or len(set(key)) < FEWEST_KINDS_OF_LETTERS


def doubts(settings: Settings) -> Iterator[tuple[str, str]]:
    """Variables with which a start goes well and what follows does not, each with a sentence; never a value."""
    taken = in_force(settings)

    def unset(given: object, left: object) -> str:
        return "" if given == left else ", and so taken as not set"

    if any(is_placeholder(secret) for secret in settings.webhook_secrets):
        yield (
            "STRIPE_WEBHOOK_SECRET",
            "a placeholder that anyone can read in the guide, not a signing secret of Stripe's"
            + unset(settings.webhook_secrets, taken.webhook_secrets),
        )
    key = settings.admin_api_key.get_secret_value()
    if key and is_placeholder(key):
        yield (
            "ADMIN_API_KEY",
            f"a placeholder that anyone can read in the guide{unset(settings.admin_api_key, taken.admin_api_key)}; "
            "make one with: openssl rand -hex 32",
        )
    elif key and is_guessable(key):
        yield "ADMIN_API_KEY", "so short that it can be guessed; make one with: openssl rand -hex 32"
    if any(is_placeholder(key.key) for key in settings.api_keys):
        yield (
            "STRIPE_SECRET_KEY",
            f"a placeholder, not a key of Stripe's{unset(settings.api_keys, taken.api_keys)}",
        )
    if settings.database_url is None and not settings.development:
        yield (
            "DATABASE_URL",
            "not set: an embedded PostgreSQL keeps the data in KAMIYO_DATA_DIR, backed up by nobody",
        )
    if settings.worker and settings.pool_size < settings.worker_concurrency + 4:
        yield (
            "KAMIYO_POOL_SIZE",
            "less than four above KAMIYO_WORKER_CONCURRENCY, which leaves too few connections for all else",
        )
    for name, meant in _slips():
        yield name, f"not a setting, and so without effect; {meant} is one"


def _slips() -> Iterator[tuple[str, str]]:
    """Variables that are none of ours and look like one that is not set, each with that."""
    file = Settings.model_config.get("env_file")
    given = {*os.environ, *(dotenv_values(file) if isinstance(file, str) else ())}
    ours = {str(field.validation_alias) for field in Settings.model_fields.values()}
    for name in sorted(given - ours):
        if name.startswith(("KAMIYO_", "STRIPE_")):
            for meant in get_close_matches(name, ours - given, n=1, cutoff=_ALIKE):
                yield name, meant


def env_example() -> str:
    """The text of `.env.example`: every variable with what it does and its default."""
    lines = [
        "# Kamiyo's settings. Copy to .env and change what you need; the environment wins over this file.",
        "# Generated: python -m kamiyo.settings > .env.example",
        "",
    ]
    for field in Settings.model_fields.values():
        lines += [f"# {line}" for line in textwrap.wrap(field.description or "", 110)]
        lines += [f"# {field.validation_alias}={_shown(field.default)}", ""]
    return "\n".join(lines)


def _shown(default: Any) -> str:
    if default is None or isinstance(default, SecretStr):
        return ""
    return str(default).lower() if isinstance(default, bool) else str(default)


if __name__ == "__main__":
    sys.stdout.write(env_example())
