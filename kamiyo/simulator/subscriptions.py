"""The life of a subscription: tried, taken, renewed, unpaid, paused, canceled.

Source: Stripe's documentation, "How subscriptions work" and "Using webhooks with subscriptions".
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from kamiyo.simulator.facts import ENDED, Invoice, Item, Line, Subscription
from kamiyo.simulator.invoices import DRAFT_SECONDS, Invoices
from kamiyo.simulator.ledger import merged
from kamiyo.simulator.terms import DAY, HOUR, cycle_end

#: How long the first payment of a subscription may take before it expires, in seconds.
INCOMPLETE_SECONDS = 23 * HOUR

#: How long before a billing cycle ends Stripe announces the next invoice, and before a trial ends its end.
UPCOMING_DAYS = 7
TRIAL_NOTICE_DAYS = 3


class Subscriptions(Invoices):
    """Operations on subscriptions. What reaches into them, or changes their price, is added in `world`."""

    def subscriptions_of(self, customer: str) -> Sequence[Subscription]:
        """All that a customer ever subscribed to, oldest first."""
        return [self.subscriptions[subscription] for subscription in self._subscribed.get(customer, ())]

    def subscribe(
        self,
        customer: str,
        plan: str = "starter",
        *,
        quantity: int = 1,
        add_on: str | None = None,
        trial_days: int = 0,
        pays: bool = True,
        days_until_due: int | None = None,
        pauses_without_card: bool = False,
        payment_method: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> str:
        """Subscribe a customer to one of `PLANS` (and to a second, the `add_on`); give the subscription's id.

        Without a trial it is `incomplete` until the first invoice is paid, which succeeds in the same second
        unless `pays` is false. With one the first invoice is over nothing and the subscription is
        `trialing`. With `days_until_due` invoices are sent instead of charged, and it is `active` at once.
        """
        if pays and not trial_days and days_until_due is None:
            self._needs_card(customer)
        self._asked()
        currency = self._with_currency(customer).currency or "usd"
        plans = {plan: quantity} | ({add_on: 1} if add_on else {})
        items = tuple(
            Item(
                id=self._short_id("si_"),
                created=self.now,
                price=self.price(name, currency),
                quantity=count,
            )
            for name, count in plans.items()
        )
        if len({item.price.interval for item in items}) > 1:
            raise ValueError("one subscription cannot be billed both monthly and yearly")
        trial_end = self.now + trial_days * DAY if trial_days else None
        period = self.now, trial_end or cycle_end(self.now, self.now, items[0].price.interval)
        subscription = Subscription(
            id=self._id("sub_1"),
            created=self.now,
            customer=customer,
            status="trialing" if trial_days else "incomplete" if days_until_due is None else "active",
            currency=currency,
            items=items,
            billing_cycle_anchor=trial_end or self.now,
            current_period_start=period[0],
            current_period_end=period[1],
            collection_method="charge_automatically" if days_until_due is None else "send_invoice",
            days_until_due=days_until_due,
            trial_start=self.now if trial_days else None,
            trial_end=trial_end,
            pauses_without_card=pauses_without_card,
            default_payment_method=payment_method,
            latest_invoice=self._id("in_1"),
            metadata=dict(metadata or {}),
        )
        self._subscribed.setdefault(customer, []).append(subscription.id)
        self._create("customer.subscription.created", subscription)
        invoice = self._bill(subscription, self._lines(subscription, period), "subscription_create", period)
        if days_until_due is not None:
            return subscription.id  # sent an hour later: finalize(latest_invoice)
        self._collect(invoice, pays)
        return subscription.id

    def announce_renewal(self, subscription: str) -> None:
        """A week before the billing cycle ends Stripe previews the next invoice, which has no id yet."""
        fact = self._live(subscription)
        self._by_itself(fact.current_period_end - UPCOMING_DAYS * DAY)
        period = fact.current_period_end, self._next_end(fact)
        preview = Invoice(
            id="",
            created=fact.current_period_end,
            account=self.account,
            customer=fact.customer,
            customer_email=self.customers[fact.customer].email,
            customer_name=self.customers[fact.customer].name,
            subscription=fact.id,
            currency=fact.currency,
            lines=tuple(self._lines(replace(fact, status="active"), period)),
            billing_reason="upcoming",
            collection_method=fact.collection_method,
            period_start=fact.current_period_start,
            period_end=fact.current_period_end,
            next_payment_attempt=fact.current_period_end + DRAFT_SECONDS,
        )
        self.say("invoice.upcoming", preview)

    def announce_trial_end(self, subscription: str) -> None:
        """Three days before a trial ends Stripe says so."""
        fact = self._live(subscription, "trialing")
        self._by_itself(fact.current_period_end - TRIAL_NOTICE_DAYS * DAY)
        self.say("customer.subscription.trial_will_end", fact)

    def renew(self, subscription: str, *, pays: bool = True) -> None:
        """Let time pass to the end of the billing cycle or trial, and an hour more for the invoice.

        The subscription moves on to its next period and its invoice is drafted in one second; an hour later
        the invoice is finalized and charged (or sent). One that was to cancel at the period's end is
        canceled instead; a trial without a card is paused, if the subscription says so.
        """
        fact = self._live(subscription, "active", "trialing", "past_due")
        pauses = fact.status == "trialing" and fact.pauses_without_card and not self.wallet(fact.customer)
        if pays and fact.days_until_due is None and not (pauses or fact.cancel_at_period_end):
            self._needs_card(fact.customer)
        self._by_itself(fact.current_period_end)
        if fact.cancel_at_period_end:
            self._end(fact, canceled_at=fact.canceled_at)
            return
        if pauses:
            fact = self._change("customer.subscription.updated", fact, status="paused")
            self.say("customer.subscription.paused", fact)
            return
        used = fact.current_period_start, fact.current_period_end
        period = fact.current_period_end, self._next_end(fact)
        fact = self._change(
            "customer.subscription.updated",
            fact,
            status="active" if fact.status == "trialing" else fact.status,
            current_period_start=period[0],
            current_period_end=period[1],
            latest_invoice=self._id("in_1"),
        )
        invoice = self._bill(fact, self._lines(fact, period), "subscription_cycle", used)
        self.wait(DRAFT_SECONDS)
        self._collect(invoice, pays)

    def update_subscription(self, subscription: str, **metadata: str | None) -> None:
        """Change a subscription's metadata, key by key; None removes a key."""
        self._asked()
        fact = self._live(subscription)
        self._change("customer.subscription.updated", fact, metadata=merged(fact.metadata, metadata))

    def cancel_at_period_end(self, subscription: str) -> None:
        """Cancel a subscription at the end of what is paid for: it goes on until `renew`."""
        self._asked()
        fact = self._live(subscription, "active", "trialing", "past_due")
        self._change(
            "customer.subscription.updated",
            fact,
            cancel_at_period_end=True,
            cancel_at=fact.current_period_end,
            canceled_at=self.now,
            cancellation_reason="cancellation_requested",
        )

    def keep(self, subscription: str) -> None:
        """Undo `cancel_at_period_end`: the subscription is as it was before."""
        self._asked()
        fact = self._live(subscription)
        if not fact.cancel_at_period_end:
            raise ValueError("the subscription is not about to be canceled")
        self._change(
            "customer.subscription.updated",
            fact,
            cancel_at_period_end=False,
            cancel_at=None,
            canceled_at=None,
            cancellation_reason=None,
        )

    def cancel(self, subscription: str) -> None:
        """Cancel a subscription now. It never leaves that state."""
        self._asked()
        self._end(self._live(subscription), reason="cancellation_requested")

    def expire(self, subscription: str) -> None:
        """Let time pass until a subscription expires, its first invoice not paid; the invoice is void."""
        fact = self._live(subscription, "incomplete")
        self._by_itself(fact.created + INCOMPLETE_SECONDS)
        self._change(
            "customer.subscription.updated",
            fact,
            status="incomplete_expired",
            canceled_at=self.now,
            ended_at=self.now,
        )
        invoice = self.invoices[fact.latest_invoice or ""]
        if invoice.status != "void":
            self._void(invoice)

    def resume(self, subscription: str) -> None:
        """Resume a paused subscription, now that there is a card: a new billing cycle starts and is paid."""
        fact = self._live(subscription, "paused")
        self._needs_card(fact.customer)
        self._asked()
        period = self.now, cycle_end(self.now, self.now, fact.items[0].price.interval)
        fact = self._change(
            "customer.subscription.updated",
            fact,
            status="active",
            billing_cycle_anchor=self.now,
            current_period_start=period[0],
            current_period_end=period[1],
            latest_invoice=self._id("in_1"),
        )
        self.say("customer.subscription.resumed", fact)
        self._collect(self._bill(fact, self._lines(fact, period), "subscription_cycle", period), pays=True)

    # ── Steps that several operations share ────────────────────────────────────────────────────────────

    def _after_payment(self, invoice: Invoice) -> None:
        subscription = self.subscriptions.get(invoice.subscription or "")
        unpaid = self._unpaid(invoice.customer)
        if (
            subscription is not None
            and subscription.status in ("incomplete", "past_due")
            and all(bill.subscription != subscription.id for bill in unpaid)
        ):
            self._change("customer.subscription.updated", subscription, status="active")
        if subscription is not None and subscription.status not in ENDED:
            self._apply_change(subscription, invoice)
        owner = self.customers[invoice.customer]
        if owner.delinquent and not any(bill.attempted for bill in unpaid):
            self._change("customer.updated", owner, delinquent=False)

    def _apply_change(self, subscription: Subscription, paid: Invoice) -> None:
        subscription = self.subscriptions[subscription.id]
        pending = subscription.pending_update
        if pending is not None and pending.invoice == paid.id:
            subscription = self._change(
                "customer.subscription.updated", subscription, items=pending.items, pending_update=None
            )
            self.say("customer.subscription.pending_update_applied", subscription)

    def _after_failure(self, invoice: Invoice) -> None:
        subscription = self.subscriptions.get(invoice.subscription or "")
        if subscription is None or invoice.collection_method == "send_invoice":
            return
        if subscription.status in ENDED | {"incomplete"} or subscription.pending_update:
            return  # the first invoice is still to be paid, or the old items stay until the new are paid
        if invoice.next_payment_attempt is None:
            self._end(subscription, reason="payment_failed")
        else:
            self._change("customer.subscription.updated", subscription, status="past_due")
        self._change("customer.updated", self.customers[invoice.customer], delinquent=True)

    def _live(self, subscription: str, *statuses: str) -> Subscription:
        fact = self.subscriptions[subscription]
        if fact.status in ENDED or (statuses and fact.status not in statuses):
            raise ValueError(f"the subscription is {fact.status}")
        return fact

    def _live_ones(self, customer: str) -> Iterable[Subscription]:
        return [fact for fact in self.subscriptions_of(customer) if fact.status not in ENDED]

    def _next_end(self, fact: Subscription) -> int:
        return cycle_end(fact.billing_cycle_anchor, fact.current_period_end, fact.items[0].price.interval)

    def _bill(self, fact: Subscription, lines: Sequence[Line], reason: str, period: tuple[int, int]) -> Invoice:
        return self._draft(
            fact.customer,
            lines,
            reason=reason,
            days_until_due=fact.days_until_due,
            invoice_id=fact.latest_invoice,
            subscription=fact.id,
            period=period,
        )

    def _collect(self, invoice: Invoice, pays: bool) -> None:
        invoice = self._finalize(invoice)
        if invoice.status == "paid" or invoice.collection_method == "send_invoice":
            return  # there was nothing to pay, or the customer pays by hand
        if pays:
            self._pay(invoice)
        else:
            self._decline(invoice)

    def _end(self, fact: Subscription, *, reason: str | None = None, canceled_at: int | None = None) -> None:
        self._become(
            "customer.subscription.deleted",
            fact,
            status="canceled",
            canceled_at=canceled_at or self.now,
            ended_at=self.now,
            cancellation_reason=reason or fact.cancellation_reason,
        )
        # Stripe stops collecting what is still open. The invoices stay as they are otherwise.
        for invoice in self._unpaid(fact.customer):
            if invoice.subscription == fact.id:
                self._change("invoice.updated", invoice, next_payment_attempt=None)

    def _lines(self, fact: Subscription, period: tuple[int, int]) -> list[Line]:
        """The lines of an invoice for one billing period; over nothing while the subscription is on trial."""
        return [
            Line(
                id=self._id("il_1"),
                description=wording(item, trial=fact.status == "trialing"),
                amount=0 if fact.status == "trialing" else item.price.unit_amount * item.quantity,
                period_start=period[0],
                period_end=period[1],
                quantity=item.quantity,
                price=item.price,
                item=item.id,
            )
            for item in fact.items
        ]


def wording(item: Item, *, trial: bool = False) -> str:
    """How an invoice describes one item."""
    price = item.price
    if trial:
        return f"Trial period for {price.nickname}"
    rate = f"{price.unit_amount / 100:.2f} {price.currency} / {price.interval}"
    return f"{item.quantity} × {price.nickname} (at {rate})"
