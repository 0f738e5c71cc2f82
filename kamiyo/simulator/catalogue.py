"""Every event type Stripe has, and what the ones without a billing table are about.

The types are in `event_types.txt`. For types about customers, subscriptions, invoices, payment methods and
the money around them the world knows better; the objects here are plausible, not complete.
"""

import random
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from kamiyo.simulator.facts import Plain
from kamiyo.simulator.shapes import CURRENT_API_VERSION, template
from kamiyo.simulator.terms import DAY

#: Every snapshot event type, in alphabetical order.
EVENT_TYPES: tuple[str, ...] = tuple(
    files("kamiyo.simulator").joinpath("event_types.txt").read_text(encoding="utf-8").split()
)

_LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

# Verbs that say nothing of the object's status.
_NEUTRAL_VERBS = frozenset(
    {
        "created",
        "updated",
        "deleted",
        "action_updated",
        "features_status_updated",
        "pricing_updated",
        "request",
    }
)


@dataclass(frozen=True, slots=True)
class _Kind:
    """What `object` says, how its ids begin (empty: it has none), its fields, its status to begin with."""

    name: str
    prefix: str
    fields: str = ""
    status: str = ""


# By event type, without its last word.
_KINDS: dict[str, _Kind] = {
    "account": _Kind("account", "acct_", "country default_currency email charges_enabled"),
    "account.application": _Kind("application", "ca_", "name"),
    "account.external_account": _Kind("bank_account", "ba_", "account country currency last4", "new"),
    "application_fee": _Kind("application_fee", "fee_", "account amount amount_refunded charge currency refunded"),
    "application_fee.refund": _Kind("fee_refund", "fr_", "amount currency fee"),
    "balance": _Kind("balance", "", "available pending"),
    "balance_settings": _Kind("balance_settings", "", "payments"),
    "billing.alert": _Kind("billing.alert_triggered", "", "alert customer value"),
    "billing.credit_balance_transaction": _Kind("billing.credit_balance_transaction", "cbtxn_", "type effective_at"),
    "billing.credit_grant": _Kind("billing.credit_grant", "credgr_", "category customer name priority"),
    "billing.meter": _Kind("billing.meter", "mtr_", "display_name event_name", "active"),
    "billing_portal.configuration": _Kind("billing_portal.configuration", "bpc_", "active is_default"),
    "billing_portal.session": _Kind("billing_portal.session", "bps_", "customer return_url url"),
    "capability": _Kind("capability", "card_payments", "account requested", "active"),
    "cash_balance": _Kind("cash_balance", "", "available_cash customer"),
    "charge.dispute": _Kind("dispute", "du_", "charge payment_intent", "needs_response"),
    "checkout.session": _Kind("checkout.session", "cs_test_", "amount_subtotal amount_total customer url"),
    "climate.order": _Kind("climate.order", "climorder_", "amount_total currency metric_tons", "open"),
    "climate.product": _Kind("climate.product", "climsku_", "metric_tons_available name"),
    "coupon": _Kind("coupon", "", "duration name percent_off times_redeemed valid"),
    "credit_note": _Kind("credit_note", "cn_", "amount currency customer invoice number total", "issued"),
    "customer.source": _Kind("card", "card_", "brand customer exp_month exp_year last4"),
    "customer.tax_id": _Kind("tax_id", "txi_", "country customer type value"),
    "customer_cash_balance_transaction": _Kind(
        "customer_cash_balance_transaction", "ccsbtxn_", "currency customer ending_balance net_amount type"
    ),
    "entitlements.active_entitlement_summary": _Kind(
        "entitlements.active_entitlement_summary", "", "customer entitlements"
    ),
    "file": _Kind("file", "file_", "filename purpose size type"),
    "financial_connections.account": _Kind(
        "financial_connections.account", "fca_", "category display_name institution_name last4", "active"
    ),
    "identity.verification_session": _Kind("identity.verification_session", "vs_", "type", "requires_input"),
    "invoice_payment": _Kind("invoice_payment", "inpay_", "amount_paid amount_requested invoice", "paid"),
    "invoiceitem": _Kind("invoiceitem", "ii_", "amount currency customer description invoice quantity"),
    "issuing_authorization": _Kind("issuing.authorization", "iauth_", "amount approved currency", "pending"),
    "issuing_card": _Kind("issuing.card", "ic_", "brand currency exp_month exp_year last4 type", "active"),
    "issuing_cardholder": _Kind("issuing.cardholder", "ich_", "email name type", "active"),
    "issuing_dispute": _Kind("issuing.dispute", "idp_", "amount currency transaction", "unsubmitted"),
    "issuing_personalization_design": _Kind("issuing.personalization_design", "ipd_", "name", "review"),
    "issuing_token": _Kind("issuing.token", "intok_", "last4 network", "active"),
    "issuing_transaction": _Kind("issuing.transaction", "ipi_", "amount currency type"),
    "mandate": _Kind("mandate", "mandate_", "payment_method type", "active"),
    "payment_link": _Kind("payment_link", "plink_", "active currency url"),
    "payout": _Kind("payout", "po_", "amount arrival_date automatic currency method type", "pending"),
    "person": _Kind("person", "person_", "account email first_name last_name"),
    "promotion_code": _Kind("promotion_code", "promo_", "active code times_redeemed"),
    "quote": _Kind("quote", "qt_", "amount_total currency customer expires_at", "draft"),
    "radar.early_fraud_warning": _Kind("radar.early_fraud_warning", "issfr_", "actionable charge fraud_type"),
    "reporting.report_run": _Kind("reporting.report_run", "frr_", "report_type", "pending"),
    "reporting.report_type": _Kind("reporting.report_type", "balance.summary.1", "name version"),
    "reserve.hold": _Kind("reserve.hold", "resvhold_", "amount currency is_releasable"),
    "reserve.plan": _Kind("reserve.plan", "resvplan_", "percent type", "active"),
    "reserve.release": _Kind("reserve.release", "resvrel_", "amount currency"),
    "review": _Kind("review", "prv_", "charge open reason"),
    "setup_intent": _Kind("setup_intent", "seti_", "customer payment_method usage", "requires_payment_method"),
    "sigma.scheduled_query_run": _Kind("scheduled_query_run", "sqr_", "name sql", "completed"),
    "source": _Kind("source", "src_", "amount currency flow type", "pending"),
    "source.transaction": _Kind("source_transaction", "srctxn_", "amount currency source type", "succeeded"),
    "subscription_schedule": _Kind("subscription_schedule", "sub_sched_", "customer end_behavior", "active"),
    "tax.settings": _Kind("tax.settings", "", "", "active"),
    "tax_rate": _Kind("tax_rate", "txr_", "active display_name inclusive percentage"),
    "terminal.reader": _Kind("terminal.reader", "tmr_", "device_type label", "online"),
    "test_helpers.test_clock": _Kind("test_helpers.test_clock", "clock_", "frozen_time name", "ready"),
    "topup": _Kind("topup", "tu_", "amount currency description", "pending"),
    "transfer": _Kind("transfer", "tr_", "amount currency destination reversed"),
    "treasury.credit_reversal": _Kind("treasury.credit_reversal", "credrev_", "amount currency", "processing"),
    "treasury.debit_reversal": _Kind("treasury.debit_reversal", "debrev_", "amount currency", "processing"),
    "treasury.financial_account": _Kind("treasury.financial_account", "fa_", "country", "open"),
    "treasury.inbound_transfer": _Kind("treasury.inbound_transfer", "ibt_", "amount currency", "processing"),
    "treasury.outbound_payment": _Kind("treasury.outbound_payment", "obp_", "amount currency customer", "processing"),
    "treasury.outbound_transfer": _Kind("treasury.outbound_transfer", "obt_", "amount currency", "processing"),
    "treasury.received_credit": _Kind("treasury.received_credit", "rc_", "amount currency network", "succeeded"),
    "treasury.received_debit": _Kind("treasury.received_debit", "rd_", "amount currency network", "succeeded"),
}

#: Every name that `object` has in these events.
OBJECTS = frozenset(
    {
        *(kind.name for kind in _KINDS.values()),
        *("charge", "customer", "discount", "invoice", "payment_intent", "payment_method", "plan", "price", "product"),
        *("refund", "source_mandate_notification", "subscription"),
    }
)

# Kinds of which there is a template.
_TEMPLATED = frozenset({"dispute", "checkout.session", "invoice_payment"})

# Kinds of which there is only one in an account, under a fixed id.
_FIXED_IDS = frozenset({"capability", "reporting.report_type"})


def plain(event_type: str, rng: random.Random, now: int) -> Plain:
    """A plausible object for an event type that the world does not act out; KeyError for one that it does."""
    family, verb = event_type.rsplit(".", 1)
    kind = _KINDS[family]
    if event_type == "source.mandate_notification":
        kind = _Kind("source_mandate_notification", "srcmn_", "amount reason", "pending")
    invented = _invented(rng, now)
    value: dict[str, Any] = {"object": kind.name, "created": now, "livemode": False, "metadata": {}}
    if kind.name in _TEMPLATED:
        value = template(kind.name, CURRENT_API_VERSION) | {"created": now}
    value.update((name, invented[name]) for name in kind.fields.split())
    if kind.status:
        value["status"] = kind.status if verb in _NEUTRAL_VERBS or kind.name in _TEMPLATED else verb
    if kind.prefix:
        value["id"] = kind.prefix if kind.name in _FIXED_IDS else f"{kind.prefix}{_some(rng, 24)}"
    else:
        value.pop("id", None)
    if kind.name == "coupon":
        value["id"] = _some(rng, 8)
    ordered = {name: value[name] for name in ("id", "object", *sorted(value)) if name in value}
    return Plain(id=str(value.get("id", "")), created=now, value=ordered)


def _some(rng: random.Random, count: int) -> str:
    return "".join(rng.choices(_LETTERS, k=count))


def _invented(rng: random.Random, now: int) -> dict[str, Any]:
    """Something plausible for every field that `_KINDS` names."""
    amount = rng.randrange(500, 50_000)
    return {
        "account": f"acct_1{_some(rng, 15)}",
        "actionable": True,
        "active": True,
        "alert": {"id": f"alrt_{_some(rng, 14)}", "object": "billing.alert", "title": "API calls"},
        "amount": amount,
        "amount_paid": amount,
        "amount_refunded": 0,
        "amount_requested": amount,
        "amount_subtotal": amount,
        "amount_total": amount,
        "approved": True,
        "arrival_date": now + 2 * DAY,
        "automatic": True,
        "available": [{"amount": amount, "currency": "usd", "source_types": {"card": amount}}],
        "available_cash": {"usd": amount},
        "brand": "Visa",
        "category": "paid",
        "charge": f"ch_3{_some(rng, 23)}",
        "charges_enabled": True,
        "code": _some(rng, 8).upper(),
        "country": "US",
        "currency": "usd",
        "customer": f"cus_{_some(rng, 14)}",
        "default_currency": "usd",
        "description": "Kamiyo simulator",
        "destination": f"acct_1{_some(rng, 15)}",
        "device_type": "bbpos_wisepos_e",
        "display_name": "Kamiyo",
        "duration": "once",
        "effective_at": now,
        "email": "jenny.rosen@example.com",
        "end_behavior": "release",
        "ending_balance": amount,
        "entitlements": {"object": "list", "data": [], "has_more": False, "url": "/v1/entitlements"},
        "event_name": "api_call",
        "exp_month": 8,
        "exp_year": 2030,
        "expires_at": now + 30 * DAY,
        "fee": f"fee_1{_some(rng, 23)}",
        "filename": "report.csv",
        "first_name": "Jenny",
        "flow": "receiver",
        "fraud_type": "made_with_stolen_card",
        "frozen_time": now,
        "inclusive": False,
        "institution_name": "StripeBank",
        "invoice": f"in_1{_some(rng, 23)}",
        "is_default": True,
        "is_releasable": False,
        "label": "Front desk",
        "last4": "4242",
        "last_name": "Rosen",
        "method": "standard",
        "metric_tons": "1.5",
        "metric_tons_available": "5000",
        "name": "Kamiyo",
        "net_amount": amount,
        "network": "visa",
        "number": f"{_some(rng, 8).upper()}-0001",
        "open": True,
        "payment_intent": f"pi_3{_some(rng, 23)}",
        "payment_method": f"pm_1{_some(rng, 23)}",
        "payments": {"payouts": {"schedule": {"interval": "daily"}, "status": "enabled"}},
        "pending": [{"amount": 0, "currency": "usd", "source_types": {"card": 0}}],
        "percent": 10,
        "percent_off": 25.0,
        "percentage": 19.0,
        "priority": 50,
        "purpose": "dispute_evidence",
        "quantity": 1,
        "reason": "rule",
        "refunded": False,
        "report_type": "balance.summary.1",
        "requested": True,
        "return_url": "https://example.com/account",
        "reversed": False,
        "size": 9_863,
        "source": f"src_1{_some(rng, 23)}",
        "sql": "select count(*) from charges",
        "times_redeemed": 0,
        "total": amount,
        "transaction": f"ipi_1{_some(rng, 23)}",
        "type": "standard",
        "url": "https://example.com/kamiyo",
        "usage": "off_session",
        "valid": True,
        "value": amount,
        "version": 1,
    }
