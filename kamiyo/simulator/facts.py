"""What is true in the simulated Stripe: one frozen value for each object, replaced whole when it changes.

A fact has no API version. How Stripe would word it in one is `kamiyo.simulator.shapes`; what the billing
tables must say of it is `kamiyo.simulator.truth`. Times are unix seconds, money is in the currency's
smallest unit.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

#: Statuses a subscription never leaves.
ENDED = frozenset({"canceled", "incomplete_expired"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One object of Stripe's between two changes. `id` is empty for an invoice that does not exist yet."""

    OBJECT: ClassVar[str] = ""

    id: str
    created: int

    @property
    def kind(self) -> str:
        """What Stripe writes under `object`."""
        return self.OBJECT

    @property
    def owner(self) -> str | None:
        """The customer it belongs to, or None where Stripe does not say."""
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Product(Fact):
    """What is sold."""

    OBJECT: ClassVar[str] = "product"

    name: str
    active: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Price(Fact):
    """What it costs, for one unit and one billing cycle."""

    OBJECT: ClassVar[str] = "price"

    product: str
    nickname: str
    currency: str
    unit_amount: int
    interval: str = "month"
    active: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Discount(Fact):
    """A coupon that lies on a customer and lowers their invoices by `percent_off`."""

    OBJECT: ClassVar[str] = "discount"

    customer: str
    coupon: str
    percent_off: int

    @property
    def owner(self) -> str | None:
        """The customer it lies on."""
        return self.customer


@dataclass(frozen=True, slots=True, kw_only=True)
class Customer(Fact):
    """A customer. `currency` is None until they are first billed; a negative `balance` is owed to them."""

    OBJECT: ClassVar[str] = "customer"

    email: str | None
    name: str | None
    phone: str | None
    description: str | None
    country: str
    invoice_prefix: str
    currency: str | None = None
    balance: int = 0
    delinquent: bool = False
    default_payment_method: str | None = None
    discount: Discount | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    deleted_at: int | None = None

    @property
    def owner(self) -> str | None:
        """A customer belongs to themselves."""
        return self.id


@dataclass(frozen=True, slots=True, kw_only=True)
class PaymentMethod(Fact):
    """A card (`type` is `card`), a bank account (`us_bank_account`) or a Link wallet (`link`).

    Details that a type does not have are None. Once detached it has no customer, and never gets one again.
    """

    OBJECT: ClassVar[str] = "payment_method"

    customer: str | None
    type: str
    email: str | None
    brand: str | None = None
    last4: str | None = None
    exp_month: int | None = None
    exp_year: int | None = None
    funding: str | None = None
    country: str | None = None
    fingerprint: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    detached_at: int | None = None

    @property
    def owner(self) -> str | None:
        """The customer it is attached to."""
        return self.customer


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One line of a subscription: so many of one price."""

    id: str
    created: int
    price: Price
    quantity: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingUpdate:
    """A change of a subscription that waits for `invoice` to be paid, until `expires_at`."""

    items: tuple[Item, ...]
    invoice: str
    expires_at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Subscription(Fact):
    """A subscription. All its items share one billing period (`billing_mode` is `classic`)."""

    OBJECT: ClassVar[str] = "subscription"

    customer: str
    status: str
    currency: str
    items: tuple[Item, ...]
    billing_cycle_anchor: int
    current_period_start: int
    current_period_end: int
    collection_method: str = "charge_automatically"
    days_until_due: int | None = None
    cancel_at_period_end: bool = False
    cancel_at: int | None = None
    canceled_at: int | None = None
    ended_at: int | None = None
    cancellation_reason: str | None = None
    trial_start: int | None = None
    trial_end: int | None = None
    pauses_without_card: bool = False
    default_payment_method: str | None = None
    latest_invoice: str | None = None
    pending_update: PendingUpdate | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def owner(self) -> str | None:
        """The customer who subscribed."""
        return self.customer


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of an invoice. `price` and `item` are None for a line written by hand."""

    id: str
    description: str
    amount: int
    period_start: int
    period_end: int
    quantity: int = 1
    price: Price | None = None
    item: str | None = None
    proration: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Invoice(Fact):
    """An invoice. What it adds up to follows from its lines, discount, tax and the customer's balance."""

    OBJECT: ClassVar[str] = "invoice"

    account: str
    customer: str
    customer_email: str | None
    customer_name: str | None
    subscription: str | None
    currency: str
    lines: tuple[Line, ...]
    billing_reason: str
    collection_method: str
    period_start: int
    period_end: int
    status: str = "draft"
    number: str | None = None
    discount: Discount | None = None
    tax_percent: int = 0
    starting_balance: int = 0
    amount_paid: int = 0
    amount_overpaid: int = 0
    paid_out_of_band: bool = False
    attempt_count: int = 0
    attempted: bool = False
    next_payment_attempt: int | None = None
    due_date: int | None = None
    finalized_at: int | None = None
    finalization_failed: bool = False
    paid_at: int | None = None
    voided_at: int | None = None
    marked_uncollectible_at: int | None = None
    payment_intent: str | None = None
    charge: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    deleted_at: int | None = None

    @property
    def owner(self) -> str | None:
        """The customer who is to pay."""
        return self.customer

    @property
    def subtotal(self) -> int:
        """The sum of the lines."""
        return sum(line.amount for line in self.lines)

    @property
    def discount_amount(self) -> int:
        """What the discount takes off the subtotal."""
        return self.subtotal * self.discount.percent_off // 100 if self.discount else 0

    @property
    def tax(self) -> int:
        """What the tax adds, after the discount."""
        return (self.subtotal - self.discount_amount) * self.tax_percent // 100

    @property
    def total(self) -> int:
        """Subtotal, discount and tax together."""
        return self.subtotal - self.discount_amount + self.tax

    @property
    def balance_applied(self) -> int:
        """What the customer's balance, as it was at finalization, pays of the total."""
        return min(max(0, -self.starting_balance), self.total)

    @property
    def amount_due(self) -> int:
        """The total, less what the customer's balance pays of it."""
        return self.total - self.balance_applied

    @property
    def amount_remaining(self) -> int:
        """What is still to be paid."""
        return self.amount_due - self.amount_paid

    @property
    def hosted_invoice_url(self) -> str | None:
        """The page on which the customer can pay, once there is one."""
        return f"https://invoice.stripe.com/i/{self._path}?s=ap" if self.finalized_at else None

    @property
    def invoice_pdf(self) -> str | None:
        """The PDF, once there is one."""
        return f"https://pay.stripe.com/invoice/{self._path}/pdf?s=ap" if self.finalized_at else None

    @property
    def _path(self) -> str:
        return f"{self.account or 'acct_1KamiyoSimulator'}/{self.id.removeprefix('in_')}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PaymentIntent(Fact):
    """The attempt to collect one invoice, however many charges that takes."""

    OBJECT: ClassVar[str] = "payment_intent"

    customer: str
    invoice: str
    amount: int
    currency: str
    status: str
    amount_received: int = 0
    payment_method: str | None = None
    latest_charge: str | None = None
    declined: bool = False
    canceled_at: int | None = None

    @property
    def owner(self) -> str | None:
        """The customer who is to pay."""
        return self.customer


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge(Fact):
    """Money taken, or declined, once."""

    OBJECT: ClassVar[str] = "charge"

    customer: str
    customer_name: str | None
    invoice: str
    payment_intent: str
    payment_method: PaymentMethod
    amount: int
    currency: str
    status: str
    amount_refunded: int = 0
    captured: bool = True

    @property
    def owner(self) -> str | None:
        """The customer who paid."""
        return self.customer


@dataclass(frozen=True, slots=True, kw_only=True)
class Refund(Fact):
    """Money given back. It names its charge, not its customer."""

    OBJECT: ClassVar[str] = "refund"

    charge: str
    payment_intent: str
    amount: int
    currency: str
    status: str = "succeeded"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain(Fact):
    """Any other object, already worded as JSON, the same in every API version."""

    value: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """What the object itself says it is."""
        return str(self.value["object"])

    @property
    def owner(self) -> str | None:
        """The customer that the object names, if it names one."""
        customer = self.value.get("customer")
        return customer if isinstance(customer, str) else None
