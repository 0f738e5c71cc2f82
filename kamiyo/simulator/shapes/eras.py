"""Which fields an object has in which API version, and the templates that hold them all.

A template in `objects/` has the fields of every version, with what Stripe says when there is nothing to say.
`_ERAS` takes away those that a version does not have. Sources: Stripe's changelog, above all 2025-03-31.basil
(billing periods on items, `invoice.parent`) and 2025-09-30.clover (`discount.source`), and the classes of Stripe's
Python library from release to release, which say when a field came that the changelog does not call breaking.
"""

from bisect import bisect_right
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

ACACIA = "2024-09-30"
BASIL = "2025-03-31"
CLOVER = "2025-09-30"
DAHLIA = "2026-03-25"
ENDIVE = "2026-09-30"

#: Stripe cuts a list inside an object at this many; the rest is at the list's `url`.
NESTED_LIST_LIMIT = 10

_ALWAYS = ""

#: Fields that not every version has: the version that brought them, the one that took them away, the one that brought
#: them back. Versions between the great ones are dates of their own: each month's adds, and takes nothing away.
_ERAS: dict[str, dict[str, tuple[str, ...]]] = {
    "customer": {"customer_account": ("2025-12-15",)},
    "discount": {
        "coupon": (_ALWAYS, CLOVER),
        "customer_account": ("2025-12-15",),
        "source": (CLOVER,),
    },
    "subscription": {
        "automatic_tax.disabled_reason": ("2024-12-18",),
        "billing_mode": ("2025-06-30",),
        "billing_schedules": ("2026-05-27",),
        # Basil took them away, and three months later they were back.
        "billing_thresholds": (_ALWAYS, BASIL, "2025-05-28"),
        "current_period_end": (_ALWAYS, BASIL),
        "current_period_start": (_ALWAYS, BASIL),
        "customer_account": ("2025-12-15",),
        "discount": (_ALWAYS, BASIL),
        "managed_payments": ("2026-04-22",),
        # `plan` and `quantity` are documented for none, and in the events of all, where there is a single item.
    },
    "subscription_item": {
        "billing_thresholds": (_ALWAYS, BASIL, "2025-05-28"),
        "current_period_end": (BASIL,),
        "current_period_start": (BASIL,),
    },
    "plan": {"aggregate_usage": (_ALWAYS, BASIL)},
    "price": {"recurring.aggregate_usage": (_ALWAYS, BASIL)},
    "invoice": {
        "amount_overpaid": (BASIL,),
        "application_fee_amount": (_ALWAYS, BASIL),
        "automatic_tax.disabled_reason": ("2024-12-18",),
        "automatic_tax.provider": ("2025-04-30",),
        "automatically_finalizes_at": (ACACIA,),
        "charge": (_ALWAYS, BASIL),
        "customer_account": ("2025-12-15",),
        "discount": (_ALWAYS, BASIL),
        "paid": (_ALWAYS, BASIL),
        "paid_out_of_band": (_ALWAYS, BASIL),
        "parent": (BASIL,),
        "payment_intent": (_ALWAYS, BASIL),
        "quote": (_ALWAYS, BASIL),
        "subscription": (_ALWAYS, BASIL),
        "subscription_details": (_ALWAYS, BASIL),
        "tax": (_ALWAYS, BASIL),
        "total_pretax_credit_amounts": (ACACIA,),
        "total_tax_amounts": (_ALWAYS, BASIL),
        "total_taxes": (BASIL,),
        "transfer_data": (_ALWAYS, BASIL),
    },
    "line_item": {
        "amount_excluding_tax": (_ALWAYS, BASIL),
        "invoice_item": (_ALWAYS, BASIL),
        "parent": (BASIL,),
        "plan": (_ALWAYS, BASIL),
        "pretax_credit_amounts": (ACACIA,),
        "price": (_ALWAYS, BASIL),
        "pricing": (BASIL,),
        "proration": (_ALWAYS, BASIL),
        "proration_details": (_ALWAYS, BASIL),
        "quantity_decimal": (DAHLIA,),
        "subscription_item": (_ALWAYS, BASIL),
        "subtotal": ("2025-12-15",),
        "tax_amounts": (_ALWAYS, BASIL),
        "tax_rates": (_ALWAYS, BASIL),
        "taxes": (BASIL,),
        "type": (_ALWAYS, BASIL),
        "unit_amount_excluding_tax": (_ALWAYS, BASIL),
    },
    "payment_method": {
        "billing_details.tax_id": ("2025-04-30",),
        "card.regulated_status": ("2024-12-18",),
        "customer_account": ("2025-12-15",),
    },
    "payment_intent": {
        "customer_account": ("2025-12-15",),
        "excluded_payment_method_types": ("2025-08-27",),
        "invoice": (_ALWAYS, BASIL),
        "managed_payments": ("2026-04-22",),
    },
    "charge": {
        "billing_details.tax_id": ("2025-04-30",),
        "invoice": (_ALWAYS, BASIL),
        "payment_method_details.card.authorization_code": (ACACIA,),
        "payment_method_details.card.network_transaction_id": ("2024-12-18",),
        "payment_method_details.card.regulated_status": ("2024-12-18",),
    },
    "refund": {
        "customer": (ENDIVE,),
        "customer_account": (ENDIVE,),
        "payment_method": (ENDIVE,),
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
    for name, bounds in _ERAS.get(kind, {}).items():
        if bisect_right(bounds, version) % 2 == 0:
            *path, last = name.split(".")
            inside: Json | None = fields
            for step in path:
                inside = inside and inside[step]
            if inside is not None:
                del inside[last]
    return _encode(fields)


def fill(kind: str, version: str, **values: Any) -> Json:
    """The template with its fields filled in. Values for fields that this version lacks are dropped."""
    shaped = template(kind, version)
    shaped.update((name, value) for name, value in values.items() if name in shaped)
    return shaped
