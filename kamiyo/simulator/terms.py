"""The terms on which the simulated account bills: currencies, taxes, and how long a billing cycle is."""

from datetime import UTC, datetime

HOUR = 3_600
DAY = 24 * HOUR

_COUNTRIES = {"US": ("usd", 0), "GB": ("gbp", 20), "DE": ("eur", 19), "FR": ("eur", 20)}


def currency_of(country: str) -> str:
    """The currency in which customers of `country` are billed."""
    return _COUNTRIES.get(country, ("usd", 0))[0]


def tax_of(country: str) -> int:
    """The tax added to invoices of customers of `country`, in percent."""
    return _COUNTRIES.get(country, ("usd", 0))[1]


def cycle_end(anchor: int, after: int, interval: str) -> int:
    """The first end after `after` of a billing cycle (a `month` or a `year` long) that began at `anchor`.

    Like Stripe's, it keeps the anchor's day of the month, and takes the last day where a month is shorter.
    """
    months = 12 if interval == "year" else 1
    count = max(1, (after - anchor) // (months * 31 * DAY))
    while (end := _plus_months(anchor, count * months)) <= after:
        count += 1
    return end


def _plus_months(moment: int, months: int) -> int:
    start = datetime.fromtimestamp(moment, UTC)
    year, month = divmod(start.year * 12 + start.month - 1 + months, 12)
    first_of_next = datetime(year + (month == 11), (month + 1) % 12 + 1, 1, tzinfo=UTC)
    last_day = datetime.fromtimestamp(first_of_next.timestamp() - DAY, UTC).day
    return int(start.replace(year=year, month=month + 1, day=min(start.day, last_day)).timestamp())
