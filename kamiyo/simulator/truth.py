"""What the billing tables must say, read off the facts.

This is the judge in tests that deliver events in any order, any number of times. It shares nothing with the
code that renders events, so that a mistake in a shape cannot make itself right.
"""

from kamiyo.simulator.facts import Customer, Invoice, PaymentMethod, Subscription
from kamiyo.simulator.ledger import Ledger

#: Table, object id, column, value. Times are unix seconds or None.
Truth = dict[str, dict[str, dict[str, object]]]


def truth_of(world: Ledger) -> Truth:
    """The four tables of `billing.*` as they must be once every event of `world` is applied."""
    return {
        "customers": {fact.id: _customer(world, fact) for fact in world.customers.values()},
        "subscriptions": {fact.id: _subscription(world, fact) for fact in world.subscriptions.values()},
        "invoices": {fact.id: _invoice(world, fact) for fact in world.invoices.values()},
        "payment_methods": {fact.id: _payment_method(world, fact) for fact in world.payment_methods.values()},
    }


def _whose(world: Ledger, object_id: str) -> dict[str, object]:
    return {"account": world.account, "livemode": world.livemode, "id": object_id}


def _customer(world: Ledger, fact: Customer) -> dict[str, object]:
    return _whose(world, fact.id) | {
        "metadata": dict(fact.metadata),
        "created": fact.created,
        "email": fact.email,
        "name": fact.name,
        "phone": fact.phone,
        "description": fact.description,
        "currency": fact.currency,
        "balance": fact.balance,
        "delinquent": fact.delinquent,
        "default_payment_method": fact.default_payment_method,
        "deleted_at": fact.deleted_at,
    }


def _subscription(world: Ledger, fact: Subscription) -> dict[str, object]:
    items = [{"id": item.id, "price": item.price.id, "quantity": item.quantity} for item in fact.items]
    return _whose(world, fact.id) | {
        "metadata": dict(fact.metadata),
        "created": fact.created,
        "customer": fact.customer,
        "status": fact.status,
        "currency": fact.currency,
        "price": fact.items[0].price.id,
        "quantity": fact.items[0].quantity,
        "items": items,
        "current_period_start": fact.current_period_start,
        "current_period_end": fact.current_period_end,
        "cancel_at_period_end": fact.cancel_at_period_end,
        "cancel_at": fact.cancel_at,
        "canceled_at": fact.canceled_at,
        "ended_at": fact.ended_at,
        "trial_start": fact.trial_start,
        "trial_end": fact.trial_end,
        "default_payment_method": fact.default_payment_method,
        "latest_invoice": fact.latest_invoice,
        "collection_method": fact.collection_method,
    }


def _invoice(world: Ledger, fact: Invoice) -> dict[str, object]:
    return _whose(world, fact.id) | {
        "metadata": dict(fact.metadata),
        "created": fact.created,
        "customer": fact.customer,
        "subscription": fact.subscription,
        "number": fact.number,
        "status": fact.status,
        "currency": fact.currency,
        "amount_due": fact.amount_due,
        "amount_paid": fact.amount_paid,
        "amount_remaining": fact.amount_remaining,
        "subtotal": fact.subtotal,
        "total": fact.total,
        "attempt_count": fact.attempt_count,
        "billing_reason": fact.billing_reason,
        "collection_method": fact.collection_method,
        "due_date": fact.due_date,
        "period_start": fact.period_start,
        "period_end": fact.period_end,
        "paid_at": fact.paid_at,
        "hosted_invoice_url": fact.hosted_invoice_url,
        "invoice_pdf": fact.invoice_pdf,
        "deleted_at": fact.deleted_at,
    }


def _payment_method(world: Ledger, fact: PaymentMethod) -> dict[str, object]:
    return _whose(world, fact.id) | {
        "metadata": dict(fact.metadata),
        "created": fact.created,
        "customer": fact.customer,
        "type": fact.type,
        "brand": fact.brand,
        "last4": fact.last4,
        "exp_month": fact.exp_month,
        "exp_year": fact.exp_year,
        "funding": fact.funding,
        "country": fact.country,
        "fingerprint": fact.fingerprint,
        "detached_at": fact.detached_at,
    }
