"""Invoices and the money for them: drafted, finalized, paid, declined, overdue, void."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kamiyo.simulator.customers import Customers
from kamiyo.simulator.facts import Charge, Invoice, Line, PaymentIntent, PaymentMethod, Refund
from kamiyo.simulator.ledger import merged
from kamiyo.simulator.terms import DAY, HOUR, tax_of

#: How long a draft waits before Stripe finalizes it, in seconds: time for the receiver to add lines.
DRAFT_SECONDS = HOUR

#: Days until an invoice that could not be paid is tried again, by the number of tries so far. Then Stripe
#: gives up.
RETRY_DAYS = {1: 3, 2: 5, 3: 7}


class Invoices(Customers):
    """Operations on invoices. What an invoice does to its subscription is added in `world`."""

    def create_invoice(
        self,
        customer: str,
        amount: int,
        *,
        description: str = "Consulting",
        days_until_due: int | None = None,
    ) -> str:
        """Draft an invoice by hand, outside any subscription; give its id.

        With `days_until_due` it will be sent to the customer to pay, otherwise their payment method is
        charged.
        """
        self._asked()
        self._with_currency(customer)
        line = Line(
            id=self._id("il_1"),
            description=description,
            amount=amount,
            period_start=self.now,
            period_end=self.now,
        )
        return self._draft(customer, [line], reason="manual", days_until_due=days_until_due).id

    def invoices_of(self, customer: str) -> Sequence[Invoice]:
        """Every invoice a customer ever had, oldest first."""
        return [self.invoices[invoice] for invoice in self._billed.get(customer, ())]

    def update_invoice(self, invoice: str, **metadata: str | None) -> None:
        """Change an invoice's metadata, key by key; None removes a key."""
        self._asked()
        fact = self.invoices[invoice]
        self._change("invoice.updated", fact, metadata=merged(fact.metadata, metadata))

    def delete_draft(self, invoice: str) -> None:
        """Delete a draft that belongs to no subscription. Raises ValueError for any other invoice."""
        self._asked()
        fact = self._in(invoice, "draft")
        if fact.subscription is not None:
            raise ValueError("a subscription's draft cannot be deleted")
        self._become("invoice.deleted", fact, deleted_at=self.now)

    def fail_finalization(self, invoice: str) -> None:
        """Stripe tries to finalize a draft and cannot: the tax location is unknown. It stays a draft."""
        self._by_itself()
        fact = self._change("invoice.updated", self._in(invoice, "draft"), finalization_failed=True)
        self.say("invoice.finalization_failed", fact)

    def finalize(self, invoice: str) -> None:
        """Finalize a draft: it gets its number and its page, and is sent if the customer pays by hand."""
        self._asked()
        self._finalize(self._in(invoice, "draft"))

    def pay(self, invoice: str) -> None:
        """Charge an open invoice to the customer's payment method, and have it."""
        self._asked()
        self._pay(self._in(invoice, "open", "uncollectible"))

    def decline(self, invoice: str) -> None:
        """Charge an open invoice to the customer's payment method, if there is one, and get nothing."""
        self._asked()
        self._decline(self._in(invoice, "open"))

    def retry(self, invoice: str, *, pays: bool) -> None:
        """Let time pass until Stripe tries an unpaid invoice again, and say how that ends."""
        fact = self._in(invoice, "open")
        self._by_itself(fact.next_payment_attempt)
        if pays:
            self._pay(fact)
        else:
            self._decline(fact)

    def require_action(self, invoice: str) -> None:
        """Charge an open invoice, and be told that the customer must first confirm it with their bank."""
        self._asked()
        fact = self._in(invoice, "open")
        self._intend(fact, "payment_intent.requires_action", status="requires_action")
        fact = self._change("invoice.updated", fact, attempted=True, attempt_count=fact.attempt_count + 1)
        self.say("invoice.payment_action_required", fact)

    def pay_out_of_band(self, invoice: str, *, overpaid: int = 0) -> None:
        """Mark an open invoice as paid by other means: no charge, and no `invoice.payment_succeeded`.

        What came in too much, `overpaid`, becomes the customer's credit.
        """
        self._asked()
        fact = self._in(invoice, "open", "uncollectible")
        fact = self._change(
            "invoice.updated",
            fact,
            status="paid",
            amount_paid=fact.amount_due,
            amount_overpaid=overpaid,
            paid_out_of_band=True,
            paid_at=self.now,
            next_payment_attempt=None,
        )
        self.say("invoice.paid", fact)
        if overpaid:
            self.say("invoice.overpaid", fact)
            customer = self.customers[fact.customer]
            self._change("customer.updated", customer, balance=customer.balance - overpaid)
        self._after_payment(fact)

    def void(self, invoice: str) -> None:
        """Void an open invoice: it is as if it had never been asked for. It never leaves that state."""
        self._asked()
        self._void(self._in(invoice, "open", "uncollectible"))

    def mark_uncollectible(self, invoice: str) -> None:
        """Write an open invoice off. It can still be paid or voided."""
        self._asked()
        fact = self._in(invoice, "open")
        fact = self._change(
            "invoice.updated",
            fact,
            status="uncollectible",
            marked_uncollectible_at=self.now,
            next_payment_attempt=None,
        )
        self.say("invoice.marked_uncollectible", fact)

    def remind(self, invoice: str, event_type: str) -> None:
        """Stripe speaks of an open invoice without changing it.

        `event_type` is one of `invoice.will_be_due` (three days before), `invoice.overdue` (just after it
        was due), `invoice.payment_attempt_required`.
        """
        fact = self._in(invoice, "open")
        due = fact.due_date or self.now
        self._by_itself({"invoice.will_be_due": due - 3 * DAY, "invoice.overdue": due + 1}.get(event_type))
        self.say(event_type, fact)

    def refund(self, charge: str, amount: int | None = None) -> None:
        """Give a charge back, wholly or in part. The invoice stays paid."""
        self._asked()
        fact = self.charges[charge]
        given = amount if amount is not None else fact.amount - fact.amount_refunded
        if not 0 < given <= fact.amount - fact.amount_refunded:
            raise ValueError("more than is left of the charge")
        refund = Refund(
            id=self._id("re_1"),
            created=self.now,
            charge=charge,
            payment_intent=fact.payment_intent,
            amount=given,
            currency=fact.currency,
        )
        self._change("charge.refunded", fact, amount_refunded=fact.amount_refunded + given)
        self._create("refund.created", refund)

    # ── Steps that several operations share ─────────────────────────────────────────────────────────────────

    def _in(self, invoice: str, *statuses: str) -> Invoice:
        fact = self.invoices[invoice]
        self._living(fact.customer)
        if fact.status not in statuses or fact.deleted_at is not None:
            raise ValueError(f"the invoice is {'deleted' if fact.deleted_at else fact.status}")
        return fact

    def _unpaid(self, customer: str) -> list[Invoice]:
        return [invoice for invoice in self.invoices_of(customer) if invoice.status == "open"]

    def _draft(
        self,
        customer: str,
        lines: Sequence[Line],
        *,
        reason: str,
        days_until_due: int | None = None,
        invoice_id: str | None = None,
        subscription: str | None = None,
        period: tuple[int, int] | None = None,
    ) -> Invoice:
        owner = self.customers[customer]
        start, end = period or (self.now, self.now)
        invoice = Invoice(
            id=invoice_id or self._id("in_1"),
            created=self.now,
            account=self.account,
            customer=customer,
            customer_email=owner.email,
            customer_name=owner.name,
            subscription=subscription,
            currency=owner.currency or "usd",
            lines=tuple(lines),
            billing_reason=reason,
            collection_method="charge_automatically" if days_until_due is None else "send_invoice",
            period_start=start,
            period_end=end,
            discount=owner.discount,
            tax_percent=tax_of(owner.country),
            due_date=None if days_until_due is None else self.now + days_until_due * DAY,
            next_payment_attempt=self.now + DRAFT_SECONDS if days_until_due is None else None,
        )
        self._billed.setdefault(customer, []).append(invoice.id)
        return self._create("invoice.created", invoice)

    def _finalize(self, invoice: Invoice) -> Invoice:
        owner = self.customers[invoice.customer]
        invoice = replace(invoice, starting_balance=owner.balance)
        intent = self._id("pi_3") if invoice.amount_due else None
        invoice = self._become(
            "invoice.finalized",
            invoice,
            status="open",
            number=self._invoice_number(),
            finalized_at=self.now,
            finalization_failed=False,
            next_payment_attempt=None,
            payment_intent=intent,
        )
        if invoice.balance_applied:
            self._change("customer.updated", owner, balance=owner.balance + invoice.balance_applied)
        if intent:
            self._start_intent(invoice, intent)
        if invoice.collection_method == "send_invoice":
            self.say("invoice.sent", invoice)
        if invoice.amount_due == 0:
            # Nothing to collect: Stripe marks it paid in the same breath, without a charge.
            invoice = self._settle(invoice)
        return invoice

    def _pay(self, invoice: Invoice) -> Invoice:
        method = self._method_for(invoice)
        if method is None:
            raise ValueError("the customer has no payment method")
        charge = self._charge(invoice, method, "succeeded")
        if self.payments:
            self.say("charge.succeeded", charge)
        self._intend(
            invoice,
            "payment_intent.succeeded",
            status="succeeded",
            amount_received=invoice.amount_remaining,
            payment_method=method.id,
            latest_charge=charge.id,
            declined=False,
        )
        attempts = invoice.attempt_count + 1
        return self._settle(replace(invoice, charge=charge.id, attempt_count=attempts, attempted=True), before=invoice)

    def _settle(self, invoice: Invoice, *, before: Invoice | None = None) -> Invoice:
        paid = self._keep(
            replace(
                invoice,
                status="paid",
                amount_paid=invoice.amount_due,
                attempted=True,
                paid_at=self.now,
                next_payment_attempt=None,
            )
        )
        self.say("invoice.updated", paid, before=before or invoice)
        self.say("invoice.payment_succeeded", paid)
        self.say("invoice.paid", paid)
        self._after_payment(paid)
        return paid

    def _decline(self, invoice: Invoice) -> Invoice:
        method = self._method_for(invoice)
        # Without a payment method the attempt fails before there is a charge.
        charge = self._charge(invoice, method, "failed") if method else None
        if charge and self.payments:
            self.say("charge.failed", charge)
        self._intend(
            invoice,
            "payment_intent.payment_failed",
            status="requires_payment_method",
            latest_charge=charge.id if charge else None,
            declined=charge is not None,
        )
        attempts = invoice.attempt_count + 1
        by_hand = invoice.collection_method == "send_invoice" or invoice.billing_reason == "subscription_create"
        wait = None if by_hand else RETRY_DAYS.get(attempts)
        invoice = self._change(
            "invoice.updated",
            invoice,
            attempt_count=attempts,
            attempted=True,
            charge=charge.id if charge else invoice.charge,
            next_payment_attempt=self.now + wait * DAY if wait else None,
        )
        self.say("invoice.payment_failed", invoice)
        self._after_failure(invoice)
        return invoice

    def _void(self, invoice: Invoice) -> None:
        if invoice.payment_intent:
            self._intend(invoice, "payment_intent.canceled", status="canceled", canceled_at=self.now)
        invoice = self._change("invoice.updated", invoice, status="void", voided_at=self.now, next_payment_attempt=None)
        self.say("invoice.voided", invoice)

    def _method_for(self, invoice: Invoice) -> PaymentMethod | None:
        subscription = self.subscriptions.get(invoice.subscription or "")
        chosen = subscription.default_payment_method if subscription else None
        if chosen is not None:
            return self.payment_methods[chosen]
        return next(iter(self.wallet(invoice.customer)), None)

    def _needs_card(self, customer: str) -> None:
        if not self.wallet(customer):
            raise ValueError("the customer has no payment method")

    def _charge(self, invoice: Invoice, method: PaymentMethod, status: str) -> Charge:
        if invoice.payment_intent is None:
            raise ValueError("there is nothing to pay")
        charge = Charge(
            id=self._id("ch_3"),
            created=self.now,
            customer=invoice.customer,
            customer_name=invoice.customer_name,
            invoice=invoice.id,
            payment_intent=invoice.payment_intent,
            payment_method=method,
            amount=invoice.amount_remaining,
            currency=invoice.currency,
            status=status,
        )
        return self._keep(charge)

    def _start_intent(self, invoice: Invoice, intent: str) -> None:
        started = PaymentIntent(
            id=intent,
            created=self.now,
            customer=invoice.customer,
            invoice=invoice.id,
            amount=invoice.amount_due,
            currency=invoice.currency,
            status="requires_confirmation",
        )
        self._keep(started)
        if self.payments:
            self.say("payment_intent.created", started)

    def _intend(self, invoice: Invoice, event_type: str, **changes: Any) -> None:
        if invoice.payment_intent is None:
            return
        intent = self._keep(replace(self.payment_intents[invoice.payment_intent], **changes))
        if self.payments:
            self.say(event_type, intent)

    def _after_payment(self, invoice: Invoice) -> None:
        """What being paid does to the subscription and the customer: see `subscriptions`."""

    def _after_failure(self, invoice: Invoice) -> None:
        """What a declined payment does to the subscription and the customer: see `subscriptions`."""
