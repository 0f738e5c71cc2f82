"""Kamiyo Webhooks: Stripe's events in, true billing tables out.

What user code needs: `on` to register a handler, `Retry` and `Bury` to answer with, `Event` and `Connection` to
type it.
"""

from kamiyo.database import Connection
from kamiyo.event import Event
from kamiyo.handlers import Bury, Retry, on

__all__ = ["Bury", "Connection", "Event", "Retry", "on"]
__version__ = "0.1.0"
