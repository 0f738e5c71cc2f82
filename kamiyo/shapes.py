"""The shapes of Stripe's four objects, and the columns they become: the same from every API version.

Only the fields that are kept are read, in whichever place a version has them. Nothing here knows of events, order or
the database: an object goes in, the values of its columns come out.

Source for what moved between versions: Stripe's changelog, 2025-03-31.basil, and `docs/decisions/`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

#: The four tables, in the order they are written (every writer keeps it, so that none can deadlock another).
TABLES = ("customers", "subscriptions", "invoices", "payment_methods")

#: Where Stripe's API has the objects of the four tables, by the type of object.
PATHS = {
    "customer": "/v1/customers",
    "subscription": "/v1/subscriptions",
    "invoice": "/v1/invoices",
    "payment_method": "/v1/payment_methods",
}


# ── Shapes: only the fields that are kept, in every version's place ─────────────────────────────────────────────

_Int = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_Time = Annotated[int, msgspec.Meta(ge=-62_135_596_800, le=253_402_300_799)]
_Reference = Any  # an id, or the whole object where the endpoint expands it


class _InvoiceSettings(msgspec.Struct):
    default_payment_method: _Reference = None


class _Customer(msgspec.Struct):
    email: str | None = None
    name: str | None = None
    phone: str | None = None
    description: str | None = None
    currency: str | None = None
    balance: _Int | None = None
    delinquent: bool | None = None
    invoice_settings: _InvoiceSettings | None = None
    metadata: dict[str, Any] | None = None
    created: _Time | None = None
    deleted: bool = False


class _Price(msgspec.Struct):
    id: str | None = None


class _Item(msgspec.Struct):
    id: str | None = None
    price: _Price | None = None
    plan: _Price | None = None
    quantity: _Int | None = None
    current_period_start: _Time | None = None
    current_period_end: _Time | None = None


class _Items(msgspec.Struct):
    data: list[_Item] = []


class _Subscription(msgspec.Struct):
    customer: _Reference = None
    customer_account: _Reference = None
    status: str | None = None
    currency: str | None = None
    items: _Items | None = None
    current_period_start: _Time | None = None
    current_period_end: _Time | None = None
    cancel_at_period_end: bool | None = None
    cancel_at: _Time | None = None
    canceled_at: _Time | None = None
    ended_at: _Time | None = None
    trial_start: _Time | None = None
    trial_end: _Time | None = None
    default_payment_method: _Reference = None
    latest_invoice: _Reference = None
    collection_method: str | None = None
    metadata: dict[str, Any] | None = None
    created: _Time | None = None


class _SubscriptionDetails(msgspec.Struct):
    subscription: _Reference = None


class _Parent(msgspec.Struct):
    subscription_details: _SubscriptionDetails | None = None


class _Transitions(msgspec.Struct):
    paid_at: _Time | None = None


class _Invoice(msgspec.Struct):
    customer: _Reference = None
    customer_account: _Reference = None
    subscription: _Reference = None
    parent: _Parent | None = None
    number: str | None = None
    status: str | None = None
    currency: str | None = None
    amount_due: _Int | None = None
    amount_paid: _Int | None = None
    amount_remaining: _Int | None = None
    subtotal: _Int | None = None
    total: _Int | None = None
    attempt_count: _Int | None = None
    billing_reason: str | None = None
    collection_method: str | None = None
    due_date: _Time | None = None
    period_start: _Time | None = None
    period_end: _Time | None = None
    status_transitions: _Transitions | None = None
    hosted_invoice_url: str | None = None
    invoice_pdf: str | None = None
    metadata: dict[str, Any] | None = None
    created: _Time | None = None


class _PaymentMethod(msgspec.Struct):
    customer: _Reference = None
    customer_account: _Reference = None
    type: str | None = None
    card: dict[str, Any] | None = None
    us_bank_account: dict[str, Any] | None = None
    sepa_debit: dict[str, Any] | None = None
    bacs_debit: dict[str, Any] | None = None
    au_becs_debit: dict[str, Any] | None = None
    acss_debit: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    created: _Time | None = None


# ── From shape to columns ───────────────────────────────────────────────────────────────────────────────────────

#: The columns that an object's own fields become, in the order in which `Kind.columns_of` gives their values.
COLUMNS: dict[str, tuple[str, ...]] = {
    table: tuple(names.split())
    for table, names in {
        "customers": """
            email name phone description currency balance delinquent default_payment_method metadata created
            deleted_at
        """,
        "subscriptions": """
            customer status currency price quantity items current_period_start current_period_end
            cancel_at_period_end cancel_at canceled_at ended_at trial_start trial_end default_payment_method
            latest_invoice collection_method metadata created
        """,
        "invoices": """
            customer subscription number status currency amount_due amount_paid amount_remaining subtotal total
            attempt_count billing_reason collection_method due_date period_start period_end paid_at
            hosted_invoice_url invoice_pdf metadata created deleted_at
        """,
        "payment_methods": """
            customer type brand last4 exp_month exp_year funding country fingerprint metadata created
            detached_at
        """,
    }.items()
}


def _customer(o: _Customer, ended: int | None) -> tuple[Any, ...]:
    settings = o.invoice_settings
    return (
        *(o.email, o.name, o.phone, o.description, o.currency, o.balance, o.delinquent),
        reference(settings.default_payment_method) if settings else None,
        *(_json(o.metadata), o.created, ended),
    )


def _subscription(o: _Subscription, ended: int | None) -> tuple[Any, ...]:
    items = o.items.data if o.items else []
    first = items[0] if items else _Item()
    return (
        *(reference(o.customer) or reference(o.customer_account), o.status, o.currency, _price(first), first.quantity),
        _encode([{"id": item.id, "price": _price(item), "quantity": item.quantity} for item in items]).decode(),
        # Until 2025-03-31.basil the period was the subscription's; since then each item has its own.
        o.current_period_start if o.current_period_start is not None else first.current_period_start,
        o.current_period_end if o.current_period_end is not None else first.current_period_end,
        *(o.cancel_at_period_end, o.cancel_at, o.canceled_at, o.ended_at, o.trial_start, o.trial_end),
        *(reference(o.default_payment_method), reference(o.latest_invoice), o.collection_method),
        *(_json(o.metadata), o.created),
    )


def _invoice(o: _Invoice, ended: int | None) -> tuple[Any, ...]:
    details = o.parent.subscription_details if o.parent else None
    return (
        reference(o.customer) or reference(o.customer_account),
        # Basil moved it to parent.subscription_details.
        reference(details.subscription) if details else reference(o.subscription),
        *(o.number, o.status, o.currency, o.amount_due, o.amount_paid, o.amount_remaining, o.subtotal, o.total),
        *(o.attempt_count, o.billing_reason, o.collection_method, o.due_date, o.period_start, o.period_end),
        o.status_transitions.paid_at if o.status_transitions else None,
        *(o.hosted_invoice_url, o.invoice_pdf, _json(o.metadata), o.created, ended),
    )


def _payment_method(o: _PaymentMethod, ended: int | None) -> tuple[Any, ...]:
    # The details live under a key named like the type. Other types have nothing that fits these columns.
    known = o.card or o.us_bank_account or o.sepa_debit or o.bacs_debit or o.au_becs_debit or o.acss_debit
    details = _Details(known or {})
    return (
        None if ended is not None else reference(o.customer) or reference(o.customer_account),
        *(o.type, details.text("brand"), details.text("last4")),
        *(details.number("exp_month"), details.number("exp_year")),
        *(details.text("funding"), details.text("country"), details.text("fingerprint")),
        *(_json(o.metadata), o.created, ended),
    )


@dataclass(frozen=True, slots=True)
class _Details:
    fields: dict[str, Any]

    def text(self, name: str) -> str | None:
        value = self.fields.get(name)
        return value if isinstance(value, str) else None

    def number(self, name: str) -> int | None:
        value = self.fields.get(name)
        return value if isinstance(value, int) and abs(value) < 2**63 else None


@dataclass(frozen=True, slots=True)
class Kind:
    """One of the four objects: its table, its shape, and the way from one to the other.

    `columns_of(shaped, ended)` gives the values of `COLUMNS[table]`; `ended` is the second in which the object's life
    was over (None: it is not). `read` takes an event's body to a struct whose `data.object` is shaped; it raises
    msgspec.DecodeError, or its ValidationError where a field has a type that Stripe does not document.
    """

    table: str
    shape: type[msgspec.Struct]
    columns_of: Callable[[Any, int | None], tuple[Any, ...]]
    read: Callable[[bytes], Any]


def _kind(table: str, shape: type[msgspec.Struct], columns_of: Callable[[Any, int | None], tuple[Any, ...]]) -> Kind:
    data = msgspec.defstruct(f"{shape.__name__}Data", [("object", shape)])
    whole = msgspec.defstruct(f"{shape.__name__}Event", [("data", data)])
    return Kind(table, shape, columns_of, msgspec.json.Decoder(whole).decode)


#: The four, by Stripe's name of the object.
KINDS: dict[str, Kind] = {
    "customer": _kind("customers", _Customer, _customer),
    "subscription": _kind("subscriptions", _Subscription, _subscription),
    "invoice": _kind("invoices", _Invoice, _invoice),
    "payment_method": _kind("payment_methods", _PaymentMethod, _payment_method),
}


# ── Values ───────────────────────────────────────────────────────────────────────────────────────────────────────

_encode = msgspec.json.Encoder(order="deterministic").encode


def _json(value: dict[str, Any] | None) -> str:
    return _encode(value).decode() if value else "{}"


def reference(value: Any) -> str | None:
    """An id, whether Stripe gives it or the whole object; None for anything else."""
    if isinstance(value, dict):
        value = value.get("id")
    return value if isinstance(value, str) and value else None


def _price(item: _Item) -> str | None:
    return (item.price.id if item.price else None) or (item.plan.id if item.plan else None)


def without_nul(value: Any) -> Any:
    """JSON's value without U+0000, which PostgreSQL's text and jsonb cannot hold."""
    if isinstance(value, str):
        return value.replace("\0", "\N{REPLACEMENT CHARACTER}")
    if isinstance(value, list):
        return [without_nul(item) for item in value]
    if isinstance(value, dict):
        return {without_nul(key): without_nul(item) for key, item in value.items()}
    return value


def overlaid(now: Any, before: dict[str, Any]) -> dict[str, Any]:
    """An object as it was before an event, from what it is `now` and the event's `previous_attributes`."""
    # Stripe gives changed keys only; of a changed hash only the changed keys within; lists whole. A key that was
    # not there before is given as null, which in metadata (text only) is the same as not being there.
    merged = dict(now) if isinstance(now, dict) else {}
    for name, value in before.items():
        merged[name] = overlaid(merged.get(name), value) if isinstance(value, dict) else value
    metadata = merged.get("metadata")
    if isinstance(metadata, dict):
        merged["metadata"] = {name: value for name, value in metadata.items() if value is not None}
    return merged
