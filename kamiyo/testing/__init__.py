"""For the tests of whoever writes handlers: Stripe's deliveries, in disorder, against a real PostgreSQL.

    from kamiyo.testing import assert_exactly_once, stories
    from myapp.main import app

    def test_every_paid_invoice_grants_credits_once(kamiyo_database):
        story = stories.dunning(seed=1)
        kamiyo_database.execute("INSERT INTO accounts (stripe_customer) VALUES ($1)", story.customer)
        assert_exactly_once(app, story, "SELECT stripe_customer, credits FROM accounts")

The fixtures (`kamiyo_database`, `kamiyo_schema`, `kamiyo_postgres`) come with the installation: see `plugin.py`. Every
function blocks until what it says is true, so it fits plain tests and async ones alike: `docs/testing.md`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kamiyo.testing import stories
    from kamiyo.testing.database import SECRET, Database, KitError, Settled
    from kamiyo.testing.deliveries import PATH, Signed, deliver, signed
    from kamiyo.testing.exactly_once import assert_exactly_once
    from kamiyo.testing.stories import Story

__all__ = [
    "PATH",
    "SECRET",
    "Database",
    "KitError",
    "Settled",
    "Signed",
    "Story",
    "assert_exactly_once",
    "deliver",
    "signed",
    "stories",
]

_PLACES = {
    **dict.fromkeys(("SECRET", "Database", "KitError", "Settled"), "database"),
    **dict.fromkeys(("PATH", "Signed", "deliver", "signed"), "deliveries"),
    "assert_exactly_once": "exactly_once",
    "Story": "stories",
}


def __getattr__(name: str) -> Any:
    # pytest imports this package, for the plugin in it, in every run of every project that has Kamiyo installed. What
    # a run does not use must cost it nothing.
    if name == "stories":
        return import_module("kamiyo.testing.stories")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"kamiyo.testing.{_PLACES[name]}"), name)
