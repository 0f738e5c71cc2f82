"""What a check comes to, and what is examined."""

import re
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from urllib.parse import urlsplit

from kamiyo.settings import Settings

STRIPE_PATH = "/api/v1/webhooks/stripe"


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


def count(number: int, what: str) -> str:
    plural = "es" if what.endswith("s") else "s"
    return f"{number} {what}" if number == 1 else f"{number} {what}{plural}"


def words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def network(error: Exception) -> str:
    text = str(error)
    certificate = re.search(r"certificate verify failed: ([\w' -]+)", text)
    return f"its certificate is refused ({certificate[1].strip()})" if certificate else type(error).__name__


def shown(url: str) -> str:
    """An address without what may be secret in it: user, password, query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
