"""How Stripe words invoices, and the payment intents, charges and refunds around them."""

from kamiyo.simulator.facts import Charge, Invoice, Line, PaymentIntent, Refund
from kamiyo.simulator.shapes.customers import card, discount
from kamiyo.simulator.shapes.eras import NESTED_LIST_LIMIT, Json, fill
from kamiyo.simulator.shapes.subscriptions import plan, price


def invoice(fact: Invoice, version: str) -> Json:
    discounts = [{"amount": fact.discount_amount, "discount": fact.discount.id}] if fact.discount else []
    shaped = fill(
        "invoice",
        version,
        id=fact.id,
        amount_due=fact.amount_due,
        amount_overpaid=fact.amount_overpaid,
        amount_paid=fact.amount_paid,
        amount_remaining=fact.amount_remaining,
        attempt_count=fact.attempt_count,
        attempted=fact.attempted,
        auto_advance=fact.status == "draft" or fact.next_payment_attempt is not None,
        billing_reason=fact.billing_reason,
        charge=fact.charge,
        collection_method=fact.collection_method,
        created=fact.created,
        currency=fact.currency,
        customer=fact.customer,
        customer_email=fact.customer_email,
        customer_name=fact.customer_name,
        discount=discount(fact.discount, version) if fact.discount else None,
        discounts=[fact.discount.id] if fact.discount else [],
        due_date=fact.due_date,
        effective_at=fact.finalized_at,
        ending_balance=fact.starting_balance + fact.balance_applied if fact.finalized_at else None,
        hosted_invoice_url=fact.hosted_invoice_url,
        invoice_pdf=fact.invoice_pdf,
        last_finalization_error=_FINALIZATION_ERROR if fact.finalization_failed else None,
        metadata=dict(fact.metadata),
        next_payment_attempt=fact.next_payment_attempt,
        number=fact.number,
        paid=fact.status == "paid",
        paid_out_of_band=fact.paid_out_of_band,
        parent=_invoice_parent(fact),
        payment_intent=fact.payment_intent,
        period_end=fact.period_end,
        period_start=fact.period_start,
        starting_balance=fact.starting_balance,
        status=fact.status,
        status_transitions={
            "finalized_at": fact.finalized_at,
            "marked_uncollectible_at": fact.marked_uncollectible_at,
            "paid_at": fact.paid_at,
            "voided_at": fact.voided_at,
        },
        # Until Basil; since then under `parent`.
        subscription=fact.subscription,
        subscription_details={"metadata": {} if fact.subscription else None},
        subtotal=fact.subtotal,
        subtotal_excluding_tax=fact.subtotal,
        tax=fact.tax if fact.tax_percent else None,
        total=fact.total,
        total_discount_amounts=discounts,
        total_excluding_tax=fact.total - fact.tax,
        total_tax_amounts=[_old_tax(fact)] if fact.tax_percent else [],
        total_taxes=[_new_tax(fact)] if fact.tax_percent else [],
    )
    shaped["lines"]["data"] = [_line(fact, line, version) for line in fact.lines[:NESTED_LIST_LIMIT]]
    shaped["lines"]["has_more"] = len(fact.lines) > NESTED_LIST_LIMIT
    shaped["lines"]["url"] = f"/v1/invoices/{fact.id or 'upcoming'}/lines"
    if not fact.id:
        del shaped["id"]  # a preview of an invoice that does not exist yet
    return shaped


_FINALIZATION_ERROR = {
    "code": "customer_tax_location_invalid",
    "message": "The customer's location isn't recognized.",
    "type": "invalid_request_error",
}


def _invoice_parent(fact: Invoice) -> Json | None:
    if fact.subscription is None:
        return None
    return {
        "quote_details": None,
        "subscription_details": {"metadata": {}, "subscription": fact.subscription},
        "type": "subscription_details",
    }


def _old_tax(fact: Invoice) -> Json:
    return {
        "amount": fact.tax,
        "inclusive": False,
        "tax_rate": f"txr_{fact.tax_percent}",
        "taxability_reason": "standard_rated",
        "taxable_amount": fact.total - fact.tax,
    }


def _new_tax(fact: Invoice) -> Json:
    return {
        "amount": fact.tax,
        "tax_behavior": "exclusive",
        "tax_rate_details": {"tax_rate": f"txr_{fact.tax_percent}"},
        "taxability_reason": "standard_rated",
        "taxable_amount": fact.total - fact.tax,
        "type": "tax_rate_details",
    }


def _line(invoice: Invoice, line: Line, version: str) -> Json:
    amount = line.price.unit_amount if line.price else line.amount
    shaped = fill(
        "line_item",
        version,
        id=line.id,
        amount=line.amount,
        amount_excluding_tax=line.amount,
        currency=invoice.currency,
        description=line.description,
        discountable=not line.proration,
        invoice=invoice.id or None,
        invoice_item=None if line.item else f"ii_{line.id[3:]}",
        parent=_line_parent(invoice, line),
        period={"end": line.period_end, "start": line.period_start},
        plan=plan(line.price, version) if line.price else None,
        price=price(line.price, version) if line.price else None,
        pricing=_pricing(line, amount),
        proration=line.proration,
        quantity=line.quantity,
        subscription=invoice.subscription,
        subscription_item=line.item,
        subtotal=line.amount,
        type="subscription" if line.item else "invoiceitem",
        unit_amount_excluding_tax=str(amount),
    )
    # Until Basil a line had the one that it came from; since then they are under `parent`, where there is always both.
    for origin in ("invoice_item", "subscription_item"):
        if shaped.get(origin, "") is None:
            del shaped[origin]
    return shaped


def _line_parent(invoice: Invoice, line: Line) -> Json:
    details = {"proration": line.proration, "proration_details": {"credited_items": None}}
    if line.item is None:
        invoice_item = {**details, "invoice_item": f"ii_{line.id[3:]}", "subscription": None}
        return {
            "invoice_item_details": invoice_item,
            "subscription_item_details": None,
            "type": "invoice_item_details",
        }
    subscribed = {"invoice_item": None, "subscription": invoice.subscription, "subscription_item": line.item}
    return {
        "invoice_item_details": None,
        "subscription_item_details": {**details, **subscribed},
        "type": "subscription_item_details",
    }


def _pricing(line: Line, amount: int) -> Json:
    details = {"price": line.price.id, "product": line.price.product} if line.price else None
    return {"price_details": details, "type": "price_details", "unit_amount_decimal": str(amount)}


def payment_intent(fact: PaymentIntent, version: str) -> Json:
    return fill(
        "payment_intent",
        version,
        id=fact.id,
        amount=fact.amount,
        amount_received=fact.amount_received,
        canceled_at=fact.canceled_at,
        client_secret=f"{fact.id}_secret_simulated",
        created=fact.created,
        currency=fact.currency,
        customer=fact.customer,
        invoice=fact.invoice,
        last_payment_error=_CARD_DECLINED if fact.declined else None,
        latest_charge=fact.latest_charge,
        payment_method=fact.payment_method,
        setup_future_usage="off_session",
        status=fact.status,
    )


_CARD_DECLINED = {
    "code": "card_declined",
    "decline_code": "insufficient_funds",
    "message": "Your card has insufficient funds.",
    "type": "card_error",
}


def charge(fact: Charge, version: str) -> Json:
    taken = fact.status == "succeeded"
    method = fact.payment_method
    shaped = fill(
        "charge",
        version,
        id=fact.id,
        amount=fact.amount,
        amount_captured=fact.amount if taken and fact.captured else 0,
        amount_refunded=fact.amount_refunded,
        balance_transaction=f"txn_{fact.id[3:]}" if taken else None,
        captured=taken and fact.captured,
        created=fact.created,
        currency=fact.currency,
        customer=fact.customer,
        failure_code=None if taken else _CARD_DECLINED["code"],
        failure_message=None if taken else _CARD_DECLINED["message"],
        invoice=fact.invoice,
        paid=taken,
        payment_intent=fact.payment_intent,
        payment_method=method.id,
        receipt_url=f"https://pay.stripe.com/receipts/payment/{fact.id}" if taken else None,
        refunded=fact.amount_refunded == fact.amount,
        status=fact.status,
    )
    shaped["billing_details"].update(email=method.email, name=fact.customer_name)
    if method.type == "card":
        shaped["payment_method_details"]["card"].update(card(method), network=method.brand)
    else:
        bank = {"fingerprint": method.fingerprint, "last4": method.last4} if method.last4 else {}
        shaped["payment_method_details"] = {method.type: bank, "type": method.type}
    if not taken:
        shaped["outcome"].update(
            network_status="declined_by_network",
            reason=_CARD_DECLINED["decline_code"],
            seller_message="The bank returned the decline code `insufficient_funds`.",
            type="issuer_declined",
        )
    return shaped


def refund(fact: Refund, version: str) -> Json:
    return fill(
        "refund",
        version,
        id=fact.id,
        amount=fact.amount,
        balance_transaction=f"txn_{fact.id[3:]}",
        charge=fact.charge,
        created=fact.created,
        currency=fact.currency,
        payment_intent=fact.payment_intent,
        status=fact.status,
    )
