"""How moments, durations and amounts read on a page."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TypeAlias

import asyncpg
from markupsafe import Markup

#: Values by name: a row of the database, or anything that is read like one.
Fields: TypeAlias = Mapping[str, Any] | asyncpg.Record

_MINUTE, _HOUR, _DAY = 60, 3600, 86400

#: Currencies whose smallest unit is the unit itself, and those with a thousand of them. Source: Stripe's
#: documentation, "Supported currencies" (zero-decimal, three-decimal).
_WHOLE = frozenset(
    {
        *("bif", "clp", "djf", "gnf", "jpy", "kmf", "krw", "mga", "pyg", "rwf"),
        *("vnd", "vuv", "xaf", "xof", "xpf"),
    }
)
_THOUSANDTHS = frozenset({"bhd", "jod", "kwd", "omr", "tnd"})

#: The end of a group of three digits: a narrow no-break space, which no locale takes for a decimal sign.
_THIN = "\N{NARROW NO-BREAK SPACE}"


def relative(moment: datetime, now: datetime) -> str:
    """`3 min ago`, `in 40 s`: the largest unit that fits, as the script on the page words it too."""
    seconds = (now - moment).total_seconds()
    size = abs(seconds)
    if size < 1:
        return "now"
    if size < _MINUTE:
        text = f"{size:.0f} s"
    elif size < 90 * _MINUTE:
        text = f"{size / _MINUTE:.0f} min"
    elif size < 36 * _HOUR:
        text = f"{size / _HOUR:.0f} h"
    else:
        text = f"{size / _DAY:.0f} d"
    return f"{text} ago" if seconds > 0 else f"in {text}"


def exact(moment: datetime) -> str:
    """The moment in UTC, to the millisecond where there are any."""
    moment = moment.astimezone(UTC)
    thousandths = f".{moment.microsecond // 1000:03d}" if moment.microsecond else ""
    return f"{moment:%Y-%m-%d %H:%M:%S}{thousandths} UTC"


def when(moment: datetime | None, now: datetime) -> Markup:
    """A `<time>` that says how long ago, with the exact moment in its title; a dash for none."""
    if moment is None:
        return Markup('<span class="none">–</span>')
    return Markup('<time datetime="{}" title="{}" data-rel>{}</time>').format(
        moment.astimezone(UTC).isoformat(), exact(moment), relative(moment, now)
    )


def at(moment: datetime | None) -> Markup:
    """A `<time>` that says the exact moment itself; a dash for none."""
    if moment is None:
        return Markup('<span class="none">–</span>')
    return Markup('<time datetime="{}">{}</time>').format(moment.astimezone(UTC).isoformat(), exact(moment))


def day(moment: datetime) -> str:
    """A day as a heading: `Monday, 23 November 2026`."""
    moment = moment.astimezone(UTC)
    return f"{moment:%A}, {moment.day} {moment:%B %Y}"


def span(seconds: float | None) -> str:
    """A length of time: `850 µs`, `3.2 ms`, `1.4 s`, `12 min`, `3 h`, `2 d`; a dash for none."""
    if seconds is None:
        return "–"
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{_short(seconds * 1e3)} ms"
    if seconds < 90:
        return f"{_short(seconds)} s"
    if seconds < 90 * _MINUTE:
        return f"{seconds / _MINUTE:.0f} min"
    return f"{seconds / _HOUR:.0f} h" if seconds < 36 * _HOUR else f"{seconds / _DAY:.0f} d"


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def count(number: int | None, most: int | None = None) -> str:
    """A whole number in groups of three. Beyond `most` nobody counted: `10 000+`."""
    if number is None:
        return "–"
    if most is not None and number >= most:
        return f"{most:,}+".replace(",", _THIN)
    return f"{number:,}".replace(",", _THIN)


def percent(share: float | None) -> str:
    """A share of one as percent, with more digits the smaller it is; a dash for none."""
    if share is None:
        return "–"
    if share == 0 or share >= 0.1:
        return f"{share:.0%}".replace("%", f"{_THIN}%")
    return f"{share * 100:.1f}{_THIN}%" if share >= 0.001 else f"< 0.1{_THIN}%"


def plural(number: int, one: str, many: str | None = None) -> str:
    """`1 event`, `2 events`."""
    return f"{count(number)} {one if number == 1 else many or one + 's'}"


def money(amount: int | None, currency: str | None) -> str:
    """An amount in the currency's smallest unit, as people write it: `1 049.00 EUR`, `500 JPY`."""
    if amount is None:
        return "–"
    if not currency:
        return count(amount)
    digits = 0 if currency in _WHOLE else 3 if currency in _THOUSANDTHS else 2
    whole, rest = divmod(abs(amount), 10**digits)
    fraction = f".{rest:0{digits}d}" if digits else ""
    return f"{'−' if amount < 0 else ''}{count(whole)}{fraction}{_THIN}{currency.upper()}"
