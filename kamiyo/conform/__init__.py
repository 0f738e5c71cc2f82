"""Does a receiver of Stripe's webhooks stand what Stripe, the network and strangers do to it?

A black-box check of any receiver: signed and forged events go in over HTTP, and verdicts come from what comes
back, from what the connection does, and from views behind the answers where the receiver offers them.

    wire        HTTP on a bare socket: half a body, two header lines, half a connection
    samples     the events, from the simulator
    observe     the views: Kamiyo's admin calls and tables, or two addresses of any receiver
    target      the receiver: deliver to it, expect of it, look behind its answers
    check       what a check is
    authenticity · repetition · order · content · connection    the checks
    run         all of them

It sends to the address it is given, and asks the views it is given; a few hundred requests, nothing else.
"""

from kamiyo.conform.check import Check, Outcome, Verdict, check
from kamiyo.conform.observe import (
    AdminView,
    BillingTables,
    EventAddress,
    EventSeen,
    EventView,
    ObjectAddress,
    ObjectView,
    ViewFailed,
)
from kamiyo.conform.run import CHECKS, Result, run
from kamiyo.conform.target import Fault, Target, Unseen
from kamiyo.conform.wire import Address, ConformError

__all__ = [
    "CHECKS",
    "Address",
    "AdminView",
    "BillingTables",
    "Check",
    "ConformError",
    "EventAddress",
    "EventSeen",
    "EventView",
    "Fault",
    "ObjectAddress",
    "ObjectView",
    "Outcome",
    "Result",
    "Target",
    "Unseen",
    "Verdict",
    "ViewFailed",
    "check",
    "run",
]
