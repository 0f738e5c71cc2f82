"""Which fields an object has in which API version, and the templates that hold them all.

A template in `objects/` has the fields of every version, with what Stripe says when there is nothing to say.
`_ERAS` takes away those that a version does not have. Source: Stripe's changelog, above all 2025-03-31.basil
(billing periods on items, `invoice.parent`) and 2025-09-30.clover (`discount.source`).
"""

from functools import cache
from importlib.resources import files
from typing import Any

import msgspec

#: The API versions in which events can be rendered, oldest first. Each is as Stripe sent it while it was the
#: newest.
API_VERSIONS: tuple[str, ...] = (
    "2024-06-20",
    "2025-03-31.basil",
    "2025-09-30.clover",
    "2026-03-25.dahlia",
    "2026-10-28.endive",
)

#: The newest of them.
CURRENT_API_VERSION: str = API_VERSIONS[-1]

Json = dict[str, Any]

BASIL = "2025-03-31"
CLOVER = "2025-09-30"
DAHLIA = "2026-03-25"
ENDIVE = "2026-09-30"

#: Stripe cuts a list inside an object at this many; the rest is at the list's `url`.
NESTED_LIST_LIMIT = 10

_ALWAYS, _EVER = "", "9999"

#: Fields that not every version has: the version that brought them, and the one that took them away.
_ERAS: dict[str, dict[str, tuple[str, str]]] = {
    "customer": {"customer_account": (DAHLIA, _EVER)},
    "discount": {
        "coupon": (_ALWAYS, CLOVER),
        "customer_account": (DAHLIA, _EVER),
        "source": (CLOVER, _EVER),
        "subscription_item": (BASIL, _EVER),
    },
    "subscription": {
        "billing_mode": (CLOVER, _EVER),
        "billing_schedules": (ENDIVE, _EVER),
        "current_period_end": (_ALWAYS, BASIL),
        "current_period_start": (_ALWAYS, BASIL),
        "customer_account": (DAHLIA, _EVER),
        "discount": (_ALWAYS, BASIL),
        "managed_payments": (ENDIVE, _EVER),
        "plan": (_ALWAYS, BASIL),
        "quantity": (_ALWAYS, BASIL),
    },
    "subscription_item": {
        "current_period_end": (BASIL, _EVER),
        "current_period_start": (BASIL, _EVER),
    },
    "plan": {"aggregate_usage": (_ALWAYS, BASIL)},
    "invoice": {
        "amount_overpaid": (BASIL, _EVER),
        "application_fee_amount": (_ALWAYS, BASIL),
        "charge": (_ALWAYS, BASIL),
        "customer_account": (DAHLIA, _EVER),
        "discount": (_ALWAYS, BASIL),
        "paid": (_ALWAYS, BASIL),
        "paid_out_of_band": (_ALWAYS, BASIL),
        "parent": (BASIL, _EVER),
        "payment_intent": (_ALWAYS, BASIL),
        "quote": (_ALWAYS, BASIL),
        "subscription": (_ALWAYS, BASIL),
        "subscription_details": (_ALWAYS, BASIL),
        "tax": (_ALWAYS, BASIL),
        "total_pretax_credit_amounts": (BASIL, _EVER),
        "total_tax_amounts": (_ALWAYS, BASIL),
        "total_taxes": (BASIL, _EVER),
        "transfer_data": (_ALWAYS, BASIL),
    },
    "line_item": {
        "amount_excluding_tax": (_ALWAYS, BASIL),
        "parent": (BASIL, _EVER),
        "plan": (_ALWAYS, BASIL),
        "pretax_credit_amounts": (BASIL, _EVER),
        "price": (_ALWAYS, BASIL),
        "pricing": (BASIL, _EVER),
        "proration": (_ALWAYS, BASIL),
        "proration_details": (_ALWAYS, BASIL),
        "quantity_decimal": (ENDIVE, _EVER),
        "subscription_item": (_ALWAYS, BASIL),
        "subtotal": (ENDIVE, _EVER),
        "tax_amounts": (_ALWAYS, BASIL),
        "tax_rates": (_ALWAYS, BASIL),
        "taxes": (BASIL, _EVER),
        "type": (_ALWAYS, BASIL),
        "unit_amount_excluding_tax": (_ALWAYS, BASIL),
    },
    "payment_method": {"customer_account": (DAHLIA, _EVER)},
    "payment_intent": {
        "customer_account": (DAHLIA, _EVER),
        "excluded_payment_method_types": (CLOVER, _EVER),
        "invoice": (_ALWAYS, BASIL),
        "managed_payments": (ENDIVE, _EVER),
    },
    "charge": {"invoice": (_ALWAYS, BASIL)},
    "refund": {
        "customer": (DAHLIA, _EVER),
        "customer_account": (DAHLIA, _EVER),
        "payment_method": (DAHLIA, _EVER),
    },
}

_decode = msgspec.json.Decoder(Json).decode
_encode = msgspec.json.Encoder().encode

_TEMPLATES = {
    path.name.removesuffix(".json"): path.read_bytes()
    for path in files("kamiyo.simulator").joinpath("objects").iterdir()
    if path.name.endswith(".json")
}


def template(kind: str, version: str) -> Json:
    """The fields of a `kind` of object in `version`, with what Stripe says when there is nothing to say."""
    return _decode(_template(kind, version))


@cache
def _template(kind: str, version: str) -> bytes:
    fields = _decode(_TEMPLATES[kind])
    for name, (since, until) in _ERAS.get(kind, {}).items():
        if not since <= version < until:
            del fields[name]
    return _encode(fields)


def fill(kind: str, version: str, **values: Any) -> Json:
    """The template with its fields filled in. Values for fields that this version lacks are dropped."""
    shaped = template(kind, version)
    shaped.update((name, value) for name, value in values.items() if name in shaped)
    return shaped
