"""How Stripe words what is sold and who subscribed to it."""

from kamiyo.simulator.facts import Item, Price, Product, Subscription
from kamiyo.simulator.shapes.eras import NESTED_LIST_LIMIT, Json, fill


def product(fact: Product, version: str) -> Json:
    return fill(
        "product",
        version,
        id=fact.id,
        active=fact.active,
        created=fact.created,
        default_price=None,
        name=fact.name,
        updated=fact.created,
    )


def price(fact: Price, version: str) -> Json:
    shaped = fill(
        "price",
        version,
        id=fact.id,
        active=fact.active,
        created=fact.created,
        currency=fact.currency,
        nickname=fact.nickname,
        product=fact.product,
        unit_amount=fact.unit_amount,
        unit_amount_decimal=str(fact.unit_amount),
    )
    shaped["recurring"]["interval"] = fact.interval
    return shaped


def plan(fact: Price, version: str) -> Json:
    """A price as the plan it also is: the older name under which Stripe still shows it."""
    return fill(
        "plan",
        version,
        id=fact.id,
        active=fact.active,
        amount=fact.unit_amount,
        amount_decimal=str(fact.unit_amount),
        created=fact.created,
        currency=fact.currency,
        interval=fact.interval,
        nickname=fact.nickname,
        product=fact.product,
    )


def subscription(fact: Subscription, version: str) -> Json:
    single = fact.items[0] if len(fact.items) == 1 else None
    shaped = fill(
        "subscription",
        version,
        id=fact.id,
        billing_cycle_anchor=fact.billing_cycle_anchor,
        cancel_at=fact.cancel_at,
        cancel_at_period_end=fact.cancel_at_period_end,
        canceled_at=fact.canceled_at,
        collection_method=fact.collection_method,
        created=fact.created,
        currency=fact.currency,
        # Until Basil the subscription had the billing period; since then each of its items has one.
        current_period_end=fact.current_period_end,
        current_period_start=fact.current_period_start,
        customer=fact.customer,
        days_until_due=fact.days_until_due,
        default_payment_method=fact.default_payment_method,
        ended_at=fact.ended_at,
        latest_invoice=fact.latest_invoice,
        metadata=dict(fact.metadata),
        pending_update=_pending_update(fact),
        plan=plan(single.price, version) if single else None,
        quantity=single.quantity if single else None,
        start_date=fact.created,
        status=fact.status,
        trial_end=fact.trial_end,
        trial_start=fact.trial_start,
    )
    shaped["cancellation_details"]["reason"] = fact.cancellation_reason
    shaped["items"]["data"] = [_item(fact, item, version) for item in fact.items[:NESTED_LIST_LIMIT]]
    shaped["items"]["has_more"] = len(fact.items) > NESTED_LIST_LIMIT
    shaped["items"]["url"] = f"/v1/subscription_items?subscription={fact.id}"
    if fact.pauses_without_card:
        shaped["trial_settings"]["end_behavior"]["missing_payment_method"] = "pause"
    return shaped


def _item(subscription: Subscription, item: Item, version: str) -> Json:
    return fill(
        "subscription_item",
        version,
        id=item.id,
        created=item.created,
        current_period_end=subscription.current_period_end,
        current_period_start=subscription.current_period_start,
        plan=plan(item.price, version),
        price=price(item.price, version),
        quantity=item.quantity,
        subscription=subscription.id,
    )


def _pending_update(fact: Subscription) -> Json | None:
    if fact.pending_update is None:
        return None
    wanted = [{"id": i.id, "price": i.price.id, "quantity": i.quantity} for i in fact.pending_update.items]
    return {
        "billing_cycle_anchor": None,
        "expires_at": fact.pending_update.expires_at,
        "subscription_items": wanted,
        "trial_end": None,
        "trial_from_plan": None,
    }
