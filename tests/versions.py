"""The four objects as each API version words them, in files that can be read and compared.

`tests/data/stripe/<version>/` holds a customer, a subscription, an invoice and a payment method of one and the same
life, and `tests/data/stripe/README.md` says what changed from one version to the next. Both are written by
`python -m tests.versions`, and `tests/test_versions.py` holds them to what the simulator says.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from kamiyo.simulator import API_VERSIONS, World, encode
from kamiyo.simulator.facts import Fact, Line
from kamiyo.simulator.shapes import shape
from tests.turns import NOW

FOLDER = Path(__file__).parent / "data" / "stripe"
README = FOLDER / "README.md"

#: The objects, each with an event type that shows it.
OBJECTS = {
    "customer": "customer.updated",
    "subscription": "customer.subscription.updated",
    "invoice": "invoice.paid",
    "payment_method": "payment_method.updated",
}

_ABOUT = """# Stripe's objects

`*.json` in this folder are Stripe's own examples, in the shape of the newest version; `event_types.txt` lists its
snapshot event types. The folders hold one customer, subscription, invoice and payment method as each API version words
them; `diff -u tests/data/stripe/2024-06-20/invoice.json tests/data/stripe/2025-03-31.basil/invoice.json` shows what an
upgrade changes. They are as Stripe sent them while that version was the newest: what a later month added, Stripe adds
to older versions too.

Written by `python -m tests.versions`.

## What changed

`[]` is each entry of a list. Values are the same, where they were kept."""


def facts() -> dict[str, Fact]:
    """What is true of the four: one life in which every column has something to say."""
    world = World(8, start=NOW)
    metadata = {"user_id": "42"}
    customer = world.create_customer(email="jenny@example.com", name="Jenny Rosen", country="DE", metadata=metadata)
    world.add_discount(customer, 25)
    method = world.attach(customer)
    world.set_default(customer, method)
    world.update_customer(customer, phone="+15555555555", description="A regular")
    subscription = world.subscribe(customer, "pro", quantity=3, payment_method=method, metadata=metadata)
    cancelled = world.subscriptions[subscription]
    paid = world.invoices[cancelled.latest_invoice or ""]
    by_hand = Line(id="il_1ByHand", description="Setup", amount=500, period_start=NOW, period_end=NOW)
    return {
        "customer": world.customers[customer],
        "subscription": replace(
            cancelled,
            trial_start=NOW,
            trial_end=NOW,
            cancel_at=NOW + 3,
            canceled_at=NOW + 3,
            ended_at=NOW + 3,
        ),
        "invoice": replace(paid, lines=(*paid.lines, by_hand), due_date=NOW + 4, metadata=metadata),
        "payment_method": replace(world.payment_methods[method], metadata=metadata),
    }


def worded(version: str) -> dict[str, dict[str, Any]]:
    """The four objects as `version` words them."""
    return {name: shape(fact, version, livemode=False) for name, fact in facts().items()}


def written(version: str, name: str) -> dict[str, Any]:
    """One of the four out of its file."""
    found: dict[str, Any] = json.loads(_file(version, name).read_text(encoding="utf-8"))
    return found


def fields(value: Any, path: str = "") -> Iterator[str]:
    """The paths of all fields inside an object, those of a list's entries with `[]`."""
    for name, item in value.items() if isinstance(value, dict) else ():
        yield f"{path}{name}"
        yield from fields(item, f"{path}{name}.")
    for item in value if isinstance(value, list) else ():
        yield from fields(item, f"{path.removesuffix('.')}[].")


def changes(name: str, old: str, new: str) -> tuple[list[str], list[str]]:
    """The fields of an object that are gone in `new`, and those that came; only the outermost of each."""
    before, after = set(fields(written(old, name))), set(fields(written(new, name)))
    return _outermost(before - after), _outermost(after - before)


def _outermost(paths: set[str]) -> list[str]:
    return sorted(path for path in paths if not any(path.startswith((f"{p}.", f"{p}[")) for p in paths))


def readme() -> str:
    """What changed from version to version, from the files."""
    lines = [_ABOUT]
    for old, new in pairwise(API_VERSIONS):
        lines += ["", f"### {new}, after {old}", ""]
        for name in OBJECTS:
            gone, came = changes(name, old, new)
            said = [f"{word} {', '.join(f'`{path}`' for path in paths)}" for word, paths in _words(gone, came)]
            lines.append(f"- **{name}**: {'; '.join(said) or 'nothing'}")
    return "\n".join([*lines, ""])


def _words(gone: list[str], came: list[str]) -> list[tuple[str, list[str]]]:
    return [(word, paths) for word, paths in (("gone", gone), ("new", came)) if paths]


def _file(version: str, name: str) -> Path:
    return FOLDER / version / f"{name}.json"


def _write() -> None:
    for version in API_VERSIONS:
        for name, value in worded(version).items():
            _file(version, name).parent.mkdir(exist_ok=True)
            _file(version, name).write_bytes(encode(value) + b"\n")
    README.write_text(readme(), encoding="utf-8")


if __name__ == "__main__":
    _write()
