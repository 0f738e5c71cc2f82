"""How Stripe words customers, their coupons and their payment methods."""

from kamiyo.simulator.facts import Customer, Discount, PaymentMethod
from kamiyo.simulator.shapes.eras import Json, fill


def customer(fact: Customer, version: str) -> Json:
    shaped = fill(
        "customer",
        version,
        id=fact.id,
        address={**_NO_ADDRESS, "country": fact.country},
        balance=fact.balance,
        created=fact.created,
        currency=fact.currency,
        delinquent=fact.delinquent,
        description=fact.description,
        discount=discount(fact.discount, version) if fact.discount else None,
        email=fact.email,
        invoice_prefix=fact.invoice_prefix,
        metadata=dict(fact.metadata),
        name=fact.name,
        phone=fact.phone,
    )
    shaped["invoice_settings"]["default_payment_method"] = fact.default_payment_method
    return shaped


_NO_ADDRESS = dict.fromkeys(("city", "country", "line1", "line2", "postal_code", "state"))


def discount(fact: Discount, version: str) -> Json:
    return fill(
        "discount",
        version,
        id=fact.id,
        customer=fact.customer,
        start=fact.created,
        # Until Clover the whole coupon; since then its id, under `source`.
        coupon={
            "id": fact.coupon,
            "object": "coupon",
            "amount_off": None,
            "created": fact.created,
            "currency": None,
            "duration": "forever",
            "duration_in_months": None,
            "livemode": False,
            "max_redemptions": None,
            "metadata": {},
            "name": f"{fact.percent_off} % off",
            "percent_off": float(fact.percent_off),
            "redeem_by": None,
            "times_redeemed": 1,
            "valid": True,
        },
        source={"coupon": fact.coupon, "type": "coupon"},
    )


def payment_method(fact: PaymentMethod, version: str) -> Json:
    shaped = fill(
        "payment_method",
        version,
        id=fact.id,
        created=fact.created,
        customer=fact.customer,
        metadata=dict(fact.metadata),
        type=fact.type,
    )
    shaped["billing_details"]["email"] = fact.email
    # The details are under a key named like the type; the other types have none.
    details = {kind: shaped.pop(kind) for kind in ("card", "link", "us_bank_account")}[fact.type]
    if fact.type == "card":
        details["networks"]["available"] = [fact.brand]
        details.update(display_brand=fact.brand, **card(fact))
    elif fact.type == "us_bank_account":
        details.update(fingerprint=fact.fingerprint, last4=fact.last4)
    else:
        details["email"] = fact.email
    shaped[fact.type] = details
    return shaped


def card(fact: PaymentMethod) -> Json:
    return {
        "brand": fact.brand,
        "country": fact.country,
        "exp_month": fact.exp_month,
        "exp_year": fact.exp_year,
        "fingerprint": fact.fingerprint,
        "funding": fact.funding,
        "last4": fact.last4,
    }
