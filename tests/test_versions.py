"""What Stripe says in each of its API versions comes to the same rows, and what changed between them can be read."""

from datetime import UTC, datetime
from typing import Any

import pytest
import stripe

from kamiyo.projections import Row, row_of
from kamiyo.shapes import COLUMNS
from kamiyo.simulator import API_VERSIONS, CURRENT_API_VERSION
from tests import versions
from tests.conftest import event_json
from tests.turns import NOW, read

RECEIVED = datetime(2026, 9, 21, tzinfo=UTC)

#: Columns that only an end fills.
_ENDS = {"deleted_at", "detached_at"}


def row(version: str, name: str) -> Row:
    """The billing row that one of the four comes to, out of its file."""
    body = event_json(
        "evt_1", versions.OBJECTS[name], versions.written(version, name), created=NOW, api_version=version
    )
    told = row_of(read(body), RECEIVED)
    assert told is not None
    return told


@pytest.mark.parametrize("name", versions.OBJECTS)
def test_one_object_in_every_version_comes_to_one_row_with_every_column(name: str) -> None:
    first = row(API_VERSIONS[0], name)
    columns = dict(zip(COLUMNS[first.table], first.values, strict=True))
    assert {column for column, value in columns.items() if value in (None, "{}", "[]")} <= _ENDS
    for version in API_VERSIONS[1:]:
        assert row(version, name) == first, version


def test_the_files_are_what_the_simulator_says_and_the_readme_what_the_files_say() -> None:
    for version in API_VERSIONS:
        said = versions.worded(version)
        assert {name: versions.written(version, name) for name in versions.OBJECTS} == said, "python -m tests.versions"
    assert versions.README.read_text(encoding="utf-8") == versions.readme(), "run: python -m tests.versions"
    assert {path.name for path in versions.FOLDER.iterdir() if path.is_dir()} == set(API_VERSIONS)


@pytest.mark.parametrize("name", versions.OBJECTS)
def test_the_newest_shape_has_no_field_that_stripes_library_does_not_know(name: str) -> None:
    assert stripe.api_version == CURRENT_API_VERSION
    told = versions.written(CURRENT_API_VERSION, name)
    parts: list[tuple[type[Any], dict[str, Any]]] = [(_CLASSES[name], told)]
    if name == "subscription":
        parts += [(stripe.SubscriptionItem, item) for item in told["items"]["data"]]
        parts += [(stripe.Price, item["price"]) for item in told["items"]["data"]]
    if name == "invoice":
        parts += [(stripe.InvoiceLineItem, line) for line in told["lines"]["data"]]
    # Undocumented, and in the events of every version where a subscription has a single item.
    undocumented = {"plan", "quantity"} if name == "subscription" else set()
    for known, value in parts:
        assert value.keys() - known.__annotations__.keys() <= undocumented, known


_CLASSES: dict[str, type[Any]] = {
    "customer": stripe.Customer,
    "subscription": stripe.Subscription,
    "invoice": stripe.Invoice,
    "payment_method": stripe.PaymentMethod,
}
