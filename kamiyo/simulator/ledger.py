"""The ground of the simulated world: its clock, its ids, what exists in it, and what it has said.

Nothing here knows Stripe's rules; those are in `customers`, `invoices`, `subscriptions` and `world`.
"""

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from kamiyo.simulator.events import SimulatedEvent
from kamiyo.simulator.facts import (
    Charge,
    Customer,
    Fact,
    Invoice,
    PaymentIntent,
    PaymentMethod,
    Price,
    Product,
    Refund,
    Subscription,
)
from kamiyo.simulator.terms import DAY

_LETTERS = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
# Any byte as one of them.
_AS_LETTERS = bytes(_LETTERS[byte % len(_LETTERS)] for byte in range(256))

#: What can be subscribed to: name, unit amount in the smallest unit of any currency, interval.
PLANS = {
    "starter": (900, "month"),
    "pro": (2_900, "month"),
    "scale": (9_900, "month"),
    "pro_yearly": (29_000, "year"),
}

_F = TypeVar("_F", bound=Fact)


class Ledger:
    """What exists, and every event about it in the order in which it happened.

    `start` and `now` are unix seconds; `account` is empty for one's own account, `acct_…` for a connected
    one. With `payments` off, the events of payment intents and charges are left out: no table follows them.

    The facts are in `customers`, `subscriptions`, `invoices`, `payment_methods`, `charges`,
    `payment_intents`, `products` and `prices`, each by id. They are for reading; change them with the
    operations.
    """

    def __init__(
        self, seed: int, *, start: int, account: str = "", livemode: bool = False, payments: bool = True
    ) -> None:
        self.seed = seed
        self.start = start
        self.now = start
        self.account = account
        self.livemode = livemode
        self.payments = payments
        self.events: list[SimulatedEvent] = []
        self.customers: dict[str, Customer] = {}
        self.subscriptions: dict[str, Subscription] = {}
        self.invoices: dict[str, Invoice] = {}
        self.payment_methods: dict[str, PaymentMethod] = {}
        self.charges: dict[str, Charge] = {}
        self.payment_intents: dict[str, PaymentIntent] = {}
        self.refunds: dict[str, Refund] = {}
        self.products: dict[str, Product] = {}
        self.prices: dict[str, Price] = {}
        # By customer: the ids of what is attached now, and of all they ever subscribed to or were billed.
        self._attached: dict[str, list[str]] = {}
        self._subscribed: dict[str, list[str]] = {}
        self._billed: dict[str, list[str]] = {}
        self._shelves: dict[type[Fact], dict[str, Any]] = {
            Customer: self.customers,
            Subscription: self.subscriptions,
            Invoice: self.invoices,
            PaymentMethod: self.payment_methods,
            Charge: self.charges,
            PaymentIntent: self.payment_intents,
            Refund: self.refunds,
            Product: self.products,
            Price: self.prices,
        }
        # Seeding with text goes through SHA-512: bare integers would make 1 and -1 the same world.
        self._rng = random.Random(f"{seed}/{account}/{livemode}")  # noqa: S311 (repeatable on purpose)
        self._tag = self._letters(10)
        self._request: str | None = None
        self._numbers = 0
        self._stock_the_shop()

    def wait(self, seconds: int) -> None:
        """Let time pass. Operations with no wait between them happen in the same second."""
        self.now += seconds

    def price(self, plan: str, currency: str = "usd") -> Price:
        """The price of one of `PLANS` in a currency. Raises KeyError when there is none."""
        return self.prices[self._menu[plan, currency]]

    def _stock_the_shop(self) -> None:
        self._menu: dict[tuple[str, str], str] = {}
        opened = self.start - 90 * DAY
        for plan, (amount, interval) in PLANS.items():
            name = f"Kamiyo {plan.replace('_', ' ').title()}"
            product = self._keep(Product(id=self._short_id("prod_"), created=opened, name=name))
            for currency in ("usd", "eur", "gbp"):
                price = Price(
                    id=self._id("price_1"),
                    created=opened,
                    product=product.id,
                    nickname=plan,
                    currency=currency,
                    unit_amount=amount,
                    interval=interval,
                )
                self._menu[plan, currency] = self._keep(price).id

    # ── Ids ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _letters(self, count: int) -> str:
        return self._rng.randbytes(count).translate(_AS_LETTERS).decode()

    def _id(self, prefix: str) -> str:
        """`sub_1` becomes `sub_1Pgc6rB7WZ01zgkWNy0Cn5nw`; the middle is the account's, as at Stripe.

        Stripe's ids begin with the time. These do not, so that no test can pass by putting events in order
        of id.
        """
        drawn = self._letters(13)
        return f"{prefix}{drawn[:5]}{self._tag}{drawn[5:]}"

    def _short_id(self, prefix: str) -> str:
        """`cus_` becomes `cus_QXg1o8vcGmoR32`: the older kind of id, without the account."""
        return prefix + self._letters(14)

    def _invoice_number(self) -> str:
        # Numbered through the whole account. By customer is Stripe's other way.
        self._numbers += 1
        return f"{self._tag[:7].upper()}-{self._numbers:04d}"

    # ── What happened ───────────────────────────────────────────────────────────────────────────────────────

    def _asked(self) -> None:
        """What follows was asked for through the API: its events share a request id."""
        self._request = self._short_id("req_")

    def _by_itself(self, moment: int | None = None) -> None:
        """What follows Stripe does by itself (no event names a request), at `moment` if that is to come."""
        self._request = None
        if moment is not None:
            self.now = max(self.now, moment)

    def _keep(self, fact: _F) -> _F:
        self._shelves[type(fact)][fact.id] = fact
        return fact

    def say(self, event_type: str, after: Fact, before: Fact | None = None, *, stub: bool = False) -> None:
        """Record an event about `after`. With `before` it carries `previous_attributes`."""
        self.events.append(
            SimulatedEvent(
                id=self._id("evt_1"),
                type=event_type,
                created=self.now,
                object=after.kind,
                object_id=after.id or None,
                customer=after.owner or (before.owner if before else None),
                account=self.account,
                livemode=self.livemode,
                request=self._request,
                after=after,
                before=before,
                stub=stub,
            )
        )

    def _create(self, event_type: str, fact: _F) -> _F:
        self.say(event_type, self._keep(fact))
        return fact

    def _change(self, event_type: str, fact: _F, **changes: Any) -> _F:
        """Change a fact and say so, with what it was before; silent when nothing is different."""
        after = replace(fact, **changes)
        if after != fact:
            self.say(event_type, self._keep(after), before=fact)
        return after

    def _become(self, event_type: str, fact: _F, **changes: Any) -> _F:
        """Change a fact and say so with an event that does not tell what it was before."""
        after = self._keep(replace(fact, **changes))
        self.say(event_type, after)
        return after


def merged(old: Mapping[str, str], new: Mapping[str, str | None]) -> dict[str, str]:
    """Metadata after an update: Stripe adds and replaces key by key, and removes one given no value."""
    return {key: value for key, value in {**old, **new}.items() if value}
