"""The settings: keys and secrets, the settings' file, the log, the handlers' modules."""

import itertools
import re
import stat
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

from kamiyo import handlers
from kamiyo.doctor.finding import Finding, count, failed, passed, warning
from kamiyo.errors import SettingsError
from kamiyo.event import snapshot_type
from kamiyo.mirror import ALL
from kamiyo.settings import WEBHOOK, LogFormat, Settings, doubts, is_guessable, is_placeholder
from kamiyo.simulator import EVENT_TYPES, OBJECTS

# Each has a check of its own.
_CHECKED_ELSEWHERE = ("STRIPE_WEBHOOK_SECRET", "ADMIN_API_KEY", "STRIPE_SECRET_KEY")


def secrets(settings: Settings) -> Iterator[Finding]:
    """The signing secrets, the admin key and Stripe's keys: count, shape, strength and mode."""
    yield _signing_secrets(settings)
    yield _admin_key(settings)
    yield from _road_keys(settings)
    yield _stripe_keys(settings)


def named_secrets(settings: Settings) -> list[tuple[str, str]]:
    """Each signing secret with what to call it."""
    numbers = itertools.count(1)
    return [
        (f"that of {one.source} in STRIPE_WEBHOOK_SECRETS", one.secret)
        if one.source != WEBHOOK
        else (f"number {next(numbers)} of STRIPE_WEBHOOK_SECRET", one.secret)
        for one in settings.signing_secrets
    ]


def _signing_secrets(settings: Settings) -> Finding:
    check, copy = "signing secret", "Copy the endpoint's signing secret (whsec_…) from the Stripe dashboard into "
    given = settings.webhook_secrets
    if not given and settings.any_door_open:
        return passed(check, "STRIPE_WEBHOOK_SECRET is not set: events come by Amazon EventBridge or Azure Event Grid")
    if not given:
        return failed(
            check,
            "STRIPE_WEBHOOK_SECRET is not set, so every delivery is answered 503",
            f"{copy}STRIPE_WEBHOOK_SECRET.",
        )
    names = " and ".join(
        name
        for name, value in (
            ("STRIPE_WEBHOOK_SECRET", settings.stripe_webhook_secret),
            ("STRIPE_WEBHOOK_SECRETS", settings.stripe_webhook_secrets),
        )
        if value.get_secret_value()
    )
    seen = f"{names} {'hold' if ' and ' in names else 'holds'} {count(len(given), 'secret')}"
    for called, secret in named_secrets(settings):
        what = f"{seen}; {called} "
        if secret.startswith(("sk_", "rk_", "pk_")):
            return failed(check, f"{what}is an API key", f"{copy}its place.")
        if secret.startswith("we_"):
            return failed(check, f"{what}is an endpoint's id", f"{copy}its place: it is shown beside the id.")
        if is_placeholder(secret):
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
    plain = [secret for secret in settings.signing_secrets if secret.source == WEBHOOK]
    if len(plain) > 4:
        return warning(
            check,
            f"{seen}: each of them lets deliveries in",
            "Name those of several endpoints in STRIPE_WEBHOOK_SECRETS, and take out of STRIPE_WEBHOOK_SECRET those "
            "that no endpoint signs with any more, after a rotation say.",
        )
    return passed(check, f"{seen}, shaped as Stripe's are")


def _admin_key(settings: Settings) -> Finding:
    check, key = "admin key", settings.admin_api_key.get_secret_value()
    mend = "Set ADMIN_API_KEY to what this prints: openssl rand -hex 32"
    if not key:
        return failed(check, "ADMIN_API_KEY is not set, so the calls of operators answer 503", mend)
    if is_placeholder(key):
        return failed(check, "ADMIN_API_KEY is a placeholder, which anyone can read in the guide", mend)
    if key in secret_values(settings):
        return failed(check, "ADMIN_API_KEY is the same as another secret", mend)
    if is_guessable(key):
        return failed(
            check,
            f"ADMIN_API_KEY has {len(key)} characters, {len(set(key))} different ones: it can be guessed",
            mend,
        )
    return passed(check, f"ADMIN_API_KEY has {len(key)} characters, {len(set(key))} different ones")


def _road_keys(settings: Settings) -> Iterator[Finding]:
    for variable, keys in (
        ("KAMIYO_EVENTBRIDGE_KEY", settings.eventbridge_keys),
        ("KAMIYO_EVENTGRID_KEY", settings.eventgrid_keys),
    ):
        check, mend = variable, f"Set {variable}, and the header X-Api-Key there, to: openssl rand -hex 32"
        if any(is_guessable(key) for key in keys):
            yield failed(check, f"{variable} can be guessed: whoever has it can write events", mend)
        elif settings.admin_api_key.get_secret_value() in keys or set(keys) & set(settings.webhook_secrets):
            yield failed(check, f"{variable} is the same as another secret", mend)
        elif keys:
            yield passed(check, f"{variable} holds {count(len(keys), 'key')}, long enough")


def secret_values(settings: Settings) -> tuple[str, ...]:
    """Every secret but the admin key and the channels' addresses."""
    keys = (key.key for key in settings.api_keys)
    return (*settings.webhook_secrets, *keys, *settings.eventbridge_keys, *settings.eventgrid_keys)


def _stripe_keys(settings: Settings) -> Finding:
    check, public = "stripe key", settings.stripe_publishable_key
    if not settings.api_keys:
        return warning(
            check,
            "STRIPE_SECRET_KEY is not set: events that were never delivered stay unknown, and the endpoints that "
            "Stripe knows were not looked at",
            "Set STRIPE_SECRET_KEY to a restricted key (rk_…) that may read events and webhook endpoints.",
        )
    seen = []
    for key in settings.api_keys:
        called = f"STRIPE_SECRET_KEYS: the key of {key.account}" if key.account else "STRIPE_SECRET_KEY"
        shape = re.match(r"(sk|rk)_(live|test)_", key.key)
        if key.key.startswith("pk_"):
            return failed(
                check, f"{called} is a publishable key", "Set it to the secret or a restricted key (sk_… or rk_…)."
            )
        if not shape or is_placeholder(key.key):
            return failed(
                check,
                f"{called} does not look like a key of Stripe's",
                "Copy it anew from the Stripe dashboard: it begins with rk_live_, rk_test_, sk_live_ or sk_test_.",
            )
        seen.append(f"{called} is a {'restricted' if shape[1] == 'rk' else 'full'} key of {shape[2]} mode")
    modes = ["live" if key.livemode else "test" for key in settings.api_keys if not key.account]
    if public and modes and not any(f"_{mode}_" in public for mode in modes):
        return failed(
            check,
            f"STRIPE_SECRET_KEY is a {modes[0]} key, and STRIPE_PUBLISHABLE_KEY is not",
            "Take both from the same mode of the same account.",
        )
    if modes == ["test"] and not settings.development:
        return warning(
            check,
            "STRIPE_SECRET_KEY is a test key: live events are not compared with Stripe's list",
            "In production set the key of live mode; for a trial set KAMIYO_ENV=development.",
        )
    return passed(check, "; ".join(seen))


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


def slips(settings: Settings) -> Iterator[Finding]:
    """Variables that look like a setting and are none: a slip of the pen has no effect, and no error either.

    And what has an effect that nobody may have meant.
    """
    for name, said in doubts(settings):
        if name not in _CHECKED_ELSEWHERE:
            mend = f"Correct the name of {name}, or take it out."
            if name == "DATABASE_URL":
                mend = "Set DATABASE_URL to a PostgreSQL of your own; for a trial set KAMIYO_ENV=development."
            yield warning("settings", f"{name} is {said}", mend)


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


def own_handlers(settings: Settings) -> Finding:
    try:
        handlers.load(settings.handler_modules)
    except SettingsError as error:
        return failed("handlers", str(error), "Mend the module, or its name in KAMIYO_HANDLERS.")
    own = handlers.registry.types()
    modules = ", ".join(settings.handler_modules) or "none"
    for name in own:
        if snapshot_type(name) not in EVENT_TYPES and not name.startswith("v2."):
            close = get_close_matches(name, EVENT_TYPES, n=1)
            return warning(
                "handlers",
                f"a handler is registered for {name}, and Stripe has no such type that this Kamiyo knows",
                f"Did you mean {close[0]}?" if close else "Look at the name in Stripe's list of event types.",
            )
    return passed("handlers", f"modules: {modules}; {count(len(own), 'event type')} with a handler of your own")


def mirrored(settings: Settings) -> Iterator[Finding]:
    """Whether events of Stripe's show what KAMIYO_MIRROR names."""
    names = sorted(settings.mirrored)
    if not names:
        return
    known = {ALL, *OBJECTS, *EVENT_TYPES}
    for name in names:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            yield warning(
                "mirror",
                f"KAMIYO_MIRROR names {name}, and no event of Stripe's that this Kamiyo knows has an object or a type "
                "of that name",
                f"Did you mean {close[0]}?" if close else "Take the name as Stripe writes it under “object”: charge.",
            )
    if known.issuperset(names):
        yield passed("mirror", f"stripe_objects keeps {'every object' if ALL in names else ', '.join(names)}")
