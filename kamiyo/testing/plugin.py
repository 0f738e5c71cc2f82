"""The fixtures, as pytest finds them: by the entry point `pytest11` of the installation, or `-p kamiyo.testing.plugin`.

    kamiyo_database    a migrated database with clean tables, for one test; while it is in use the environment names it
    kamiyo_schema      yours to override: the tables of your own application
    kamiyo_postgres    the server that serves the run

Nothing happens in a run whose tests ask for none of them.
"""

import os
from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from kamiyo.testing.database import Database, Schema


def _database() -> Any:
    # Not at the top: see `kamiyo/testing/__init__.py`.
    return import_module("kamiyo.testing.database")


@pytest.fixture(scope="session")
def kamiyo_postgres() -> Iterator[str]:
    """The address of this run's PostgreSQL: an embedded one, thrown away at the end.

    `KAMIYO_TEST_DATABASE_URL` names another server; its role must be a superuser, as `postgres` of a container is.
    """
    given = os.environ.get("KAMIYO_TEST_DATABASE_URL")
    if given:
        yield given
        return
    with _database().embedded() as url:
        yield url


@pytest.fixture(scope="session")
def kamiyo_schema() -> "Schema":
    """The tables of the application under test, on top of Kamiyo's: none.

    Override it in your `conftest.py`, session-scoped too: SQL as text, the path of an .sql file, a callable that takes
    the database's address (to run Alembic, say), or a list of such, in order.
    """
    return ()


@pytest.fixture(scope="session")
def _kamiyo_shared_database(kamiyo_postgres: str, kamiyo_schema: "Schema") -> "Iterator[Database]":
    with _database().made(kamiyo_postgres, kamiyo_schema) as database:
        yield database


@pytest.fixture
def kamiyo_database(_kamiyo_shared_database: "Database") -> "Iterator[Database]":
    """A database with Kamiyo's tables and yours, as clean as they were made.

    While the test runs, the environment says so: DATABASE_URL names this database, STRIPE_WEBHOOK_SECRET and
    ADMIN_API_KEY are the kit's, and Stripe, and whoever is told of alerts, are out of reach.
    """
    module = _database()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in module.environment(_kamiyo_shared_database).items():
            patch.setenv(name, value)
        with module.in_use(_kamiyo_shared_database):
            yield _kamiyo_shared_database
