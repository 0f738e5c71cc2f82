"""How Stripe words an object in each API version: a template of that version, filled with what is true."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import msgspec

from kamiyo.simulator.facts import (
    Charge,
    Customer,
    Discount,
    Fact,
    Invoice,
    PaymentIntent,
    PaymentMethod,
    Plain,
    Price,
    Product,
    Refund,
    Subscription,
)
from kamiyo.simulator.shapes.customers import customer, discount, payment_method
from kamiyo.simulator.shapes.eras import API_VERSIONS, CURRENT_API_VERSION, Json, template
from kamiyo.simulator.shapes.invoices import charge, invoice, payment_intent, refund
from kamiyo.simulator.shapes.subscriptions import plan, price, product, subscription

__all__ = ["API_VERSIONS", "CURRENT_API_VERSION", "Json", "plan", "shape", "template"]


_decode = msgspec.json.Decoder(Json).decode
_encode = msgspec.json.Encoder().encode


def shape(fact: Fact, version: str, *, livemode: bool) -> Json:
    """A fact as the JSON object that Stripe shows in `version`. The result is the caller's own."""
    shaped = _SHAPES[type(fact)](fact, version)
    if livemode:
        _go_live(shaped)
    return shaped


def _go_live(value: Any) -> None:
    """The objects inside an object say `livemode` as well."""
    if isinstance(value, dict):
        if "livemode" in value:
            value["livemode"] = True
        for item in value.values():
            _go_live(item)
    elif isinstance(value, list):
        for item in value:
            _go_live(item)


def _plain(fact: Plain, version: str) -> Json:
    return _decode(_encode(fact.value))  # a copy, so that nobody changes the fact


_SHAPES = cast(
    Mapping[type[Fact], Callable[[Fact, str], Json]],
    {
        Charge: charge,
        Customer: customer,
        Discount: discount,
        Invoice: invoice,
        PaymentIntent: payment_intent,
        PaymentMethod: payment_method,
        Plain: _plain,
        Price: price,
        Product: product,
        Refund: refund,
        Subscription: subscription,
    },
)
