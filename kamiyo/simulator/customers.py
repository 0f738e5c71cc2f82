"""Customers and how they pay: what Stripe does when they are created, changed, given a card or a coupon."""

from collections.abc import Mapping, Sequence
from typing import Any

from kamiyo.simulator.facts import Customer, Discount, PaymentMethod
from kamiyo.simulator.ledger import Ledger, merged
from kamiyo.simulator.terms import currency_of

_FIRST_NAMES = ("Ada", "Björn", "Chidi", "Émile", "Fatima", "Grace", "Hiro", "Ines", "José", "Łucja", "美咲")
_LAST_NAMES = ("Berg", "Díaz", "Ferrari", "Haddad", "Kowalski", "Müller", "Nguyen", "O'Brien", "Smith")
_COUNTRIES = ("US", "US", "US", "GB", "DE", "FR")
_CARDS = {"visa": "4242", "mastercard": "4444", "amex": "0005", "discover": "1117"}


class Customers(Ledger):
    """Operations on customers and payment methods. Each takes and gives ids, and records Stripe's events."""

    def create_customer(
        self,
        *,
        email: str | None = None,
        name: str | None = None,
        country: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> str:
        """Create a customer, inventing what is not given; give their id."""
        self._asked()
        draw = self._rng
        first, last = draw.choice(_FIRST_NAMES), draw.choice(_LAST_NAMES)
        customer = Customer(
            id=self._short_id("cus_"),
            created=self.now,
            email=email or self.new_email(),
            name=name or f"{first} {last}",
            phone=f"+1555{draw.randrange(10**7):07d}" if draw.random() < 0.5 else None,
            description=None,
            country=country or draw.choice(_COUNTRIES),
            invoice_prefix=self._letters(8).upper(),
            metadata=dict(metadata) if metadata is not None else {"user_id": str(draw.randrange(10**6))},
        )
        return self._create("customer.created", customer).id

    def new_email(self) -> str:
        """An address that no one in this world has had before."""
        return f"{self._letters(10).lower()}@example.com"

    def update_customer(
        self, customer: str, *, metadata: Mapping[str, str | None] | None = None, **changes: Any
    ) -> None:
        """Change email, name, phone, description or country; metadata key by key, where None removes one.

        Raises TypeError for anything that a customer does not have.
        """
        self._asked()
        fact = self._living(customer)
        if metadata is not None:
            changes["metadata"] = merged(fact.metadata, metadata)
        self._change("customer.updated", fact, **changes)

    def credit(self, customer: str, amount: int) -> None:
        """Give a customer credit: their next invoices cost `amount` less, in the smallest unit."""
        self._asked()
        fact = self._with_currency(customer)
        self._change("customer.updated", fact, balance=fact.balance - amount)

    def add_discount(self, customer: str, percent_off: int) -> None:
        """Put a coupon on a customer, in the place of one that is there."""
        self._asked()
        fact = self._living(customer)
        discount = Discount(
            id=self._id("di_1"),
            created=self.now,
            customer=customer,
            coupon=self._letters(8),
            percent_off=percent_off,
        )
        if fact.discount is None:
            self.say("customer.discount.created", discount)
        else:
            self.say("customer.discount.updated", discount, before=fact.discount)
        self._change("customer.updated", fact, discount=discount)

    def remove_discount(self, customer: str) -> None:
        """Take a customer's coupon away. Raises ValueError when there is none."""
        self._asked()
        fact = self._living(customer)
        if fact.discount is None:
            raise ValueError("the customer has no discount")
        self.say("customer.discount.deleted", fact.discount)
        self._change("customer.updated", fact, discount=None)

    def attach(self, customer: str, kind: str = "card") -> str:
        """Attach a new payment method (`card`, `us_bank_account` or `link`) to a customer; give its id."""
        self._asked()
        draw = self._rng
        owner = self._living(customer)
        details: dict[str, Any] = {}
        if kind == "card":
            brand = draw.choice(tuple(_CARDS))
            details = {
                "brand": brand,
                "last4": _CARDS[brand],
                "exp_month": draw.randint(1, 12),
                "exp_year": draw.randint(2028, 2034),
                "funding": draw.choice(("credit", "debit", "prepaid")),
                "country": owner.country,
                "fingerprint": self._letters(16),
            }
        elif kind == "us_bank_account":
            details = {"last4": "6789", "fingerprint": self._letters(16)}
        method = PaymentMethod(
            id=self._id("pm_1"),
            created=self.now,
            customer=customer,
            type=kind,
            email=owner.email,
            **details,
        )
        self._attached.setdefault(customer, []).append(method.id)
        return self._create("payment_method.attached", method).id

    def set_default(self, customer: str, payment_method: str) -> None:
        """Make a payment method the one that invoices are paid with."""
        self._asked()
        self._change("customer.updated", self._living(customer), default_payment_method=payment_method)

    def update_card(self, payment_method: str, *, exp_month: int, exp_year: int, by_network: bool = False) -> None:
        """Give a card a new expiry: by hand, or by the card network, which Stripe calls automatic."""
        if by_network:
            self._by_itself()
        else:
            self._asked()
        event_type = "payment_method.automatically_updated" if by_network else "payment_method.updated"
        self._change(event_type, self.payment_methods[payment_method], exp_month=exp_month, exp_year=exp_year)

    def wallet(self, customer: str) -> Sequence[PaymentMethod]:
        """The payment methods attached to a customer, the default one first."""
        default = self.customers[customer].default_payment_method
        attached = [self.payment_methods[method] for method in self._attached.get(customer, ())]
        return sorted(attached, key=lambda method: method.id != default)

    def _living(self, customer: str) -> Customer:
        fact = self.customers[customer]
        if fact.deleted_at is not None:
            raise ValueError("the customer is deleted")
        return fact

    def _with_currency(self, customer: str) -> Customer:
        # A customer has no currency until they are first billed; from then on it never changes.
        fact = self._living(customer)
        return self._change("customer.updated", fact, currency=fact.currency or currency_of(fact.country))
