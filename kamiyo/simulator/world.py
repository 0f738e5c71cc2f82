"""The simulated Stripe, whole: subscriptions on top of customers and invoices.

    world = World(7, start=1_790_000_000)
    customer = world.create_customer()
    world.attach(customer)
    subscription = world.subscribe(customer, "pro")
    world.renew(subscription, pays=False)      # a month later; the payment fails
    for event in world.events:
        print(event.created, event.type, event.object_id)

Every operation follows what Stripe documents in "Using webhooks with subscriptions" and "How subscriptions
work": which events, in which order, how many of them in one second.
"""

from dataclasses import replace

from kamiyo.simulator.facts import Item, Line, PendingUpdate, Subscription
from kamiyo.simulator.subscriptions import INCOMPLETE_SECONDS, Subscriptions, wording
from kamiyo.simulator.terms import cycle_end
from kamiyo.simulator.truth import Truth, truth_of


class World(Subscriptions):
    """A small deterministic Stripe: one account, one mode, everything from a seed.

    The same seed, start and calls give the same ids, facts and events. `events` holds every event so far.
    Worlds whose seed, account or mode differ share no id. An operation that Stripe would refuse raises
    ValueError.
    """

    def truth(self) -> Truth:
        """How the billing tables must end once every event is applied: table, id, column, value.

        The columns are those of `billing.*` that come from Stripe; times are unix seconds. It is worked out
        from the facts, never from rendered events.
        """
        return truth_of(self)

    def change(
        self, subscription: str, *, plan: str | None = None, quantity: int | None = None, pays: bool = True
    ) -> None:
        """Move a subscription to another plan or quantity, billing what it costs more right away.

        One second then holds two `customer.subscription.updated`: the new item, and the new `latest_invoice`.
        """
        fact = self._live(subscription, "active")
        if pays and fact.days_until_due is None:
            self._needs_card(fact.customer)
        self._asked()
        items = self._changed_items(fact, plan, quantity)
        interval = items[0].price.interval
        moved: dict[str, int] = {}
        if interval != fact.items[0].price.interval:
            # Another rhythm starts a new cycle now.
            moved = {
                "billing_cycle_anchor": self.now,
                "current_period_start": self.now,
                "current_period_end": cycle_end(self.now, self.now, interval),
            }
        old = fact
        fact = self._change("customer.subscription.updated", fact, items=items, **moved)
        lines = self._prorations(old, fact)
        if sum(line.amount for line in lines) <= 0:
            return  # cheaper: the difference waits for the next invoice
        fact = self._change("customer.subscription.updated", fact, latest_invoice=self._id("in_1"))
        self._collect(self._bill(fact, lines, "subscription_update", (self.now, self.now)), pays)

    def request_change(self, subscription: str, plan: str) -> None:
        """Ask for another plan that takes effect only once its invoice is paid; the payment fails for now."""
        self._asked()
        fact = self._live(subscription, "active")
        items = self._changed_items(fact, plan, None)
        lines = self._prorations(fact, replace(fact, items=items))
        if sum(line.amount for line in lines) <= 0:
            raise ValueError("the change costs nothing, so there is nothing to wait for")
        pending = PendingUpdate(items=items, invoice=self._id("in_1"), expires_at=self.now + INCOMPLETE_SECONDS)
        fact = self._change(
            "customer.subscription.updated", fact, pending_update=pending, latest_invoice=pending.invoice
        )
        self._collect(self._bill(fact, lines, "subscription_update", (self.now, self.now)), pays=False)

    def expire_change(self, subscription: str) -> None:
        """Let time pass until a requested change that was not paid for expires; its invoice is void."""
        fact = self._live(subscription)
        if fact.pending_update is None:
            raise ValueError("no change is pending")
        self._by_itself(fact.pending_update.expires_at)
        invoice = self.invoices[fact.pending_update.invoice]
        fact = self._change("customer.subscription.updated", fact, pending_update=None)
        self.say("customer.subscription.pending_update_expired", fact)
        if invoice.status == "open":
            self._void(invoice)

    def detach(self, payment_method: str) -> None:
        """Detach a payment method for good. Where it was the default there is none afterwards."""
        self._asked()
        fact = self.payment_methods[payment_method]
        if fact.customer is None:
            raise ValueError("the payment method is not attached")
        owner = self._living(fact.customer)
        self._attached[owner.id].remove(fact.id)
        self._change("payment_method.detached", fact, customer=None, detached_at=self.now)
        for subscription in self._live_ones(owner.id):
            if subscription.default_payment_method == fact.id:
                self._change("customer.subscription.updated", subscription, default_payment_method=None)
        if owner.default_payment_method == fact.id:
            self._change("customer.updated", owner, default_payment_method=None)

    def delete_customer(self, customer: str, *, stub: bool = False) -> None:
        """Delete a customer: their subscriptions are canceled in the same second.

        The event shows the customer as they were or, with `stub`, only says that they are gone. Their payment
        methods are not detached: Stripe goes on sending `payment_method.automatically_updated` for them.
        """
        self._asked()
        owner = self._living(customer)
        for subscription in self._live_ones(customer):
            self._end(subscription, reason="cancellation_requested")
        self.say("customer.deleted", self._keep(replace(owner, deleted_at=self.now)), stub=stub)

    def _changed_items(self, fact: Subscription, plan: str | None, quantity: int | None) -> tuple[Item, ...]:
        if fact.pending_update is not None:
            raise ValueError("another change is pending")
        first, *others = fact.items
        price = self.price(plan, fact.currency) if plan else first.price
        return (replace(first, price=price, quantity=quantity or first.quantity), *others)

    def _prorations(self, old: Subscription, new: Subscription) -> list[Line]:
        """The lines for a change within a period: the rest of the old item back, that of the new billed."""
        whole = old.current_period_end - old.current_period_start
        rest = max(0, old.current_period_end - self.now)
        same_cycle = old.current_period_end == new.current_period_end
        lines = []
        for sign, item, words, share in (
            (-1, old.items[0], "Unused time on", rest / whole),
            (1, new.items[0], "Remaining time on", rest / whole if same_cycle else 1.0),
        ):
            lines.append(
                Line(
                    id=self._id("il_1"),
                    description=f"{words} {wording(item)}",
                    amount=sign * round(item.price.unit_amount * item.quantity * share),
                    period_start=self.now,
                    period_end=old.current_period_end if sign < 0 else new.current_period_end,
                    quantity=item.quantity,
                    price=item.price,
                    item=item.id,
                    proration=True,
                )
            )
        return lines
