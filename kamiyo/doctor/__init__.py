"""Is this installation ready, and if not, which sentence mends it?

Each check looks at one thing, says what it saw, and comes to `pass`, `warn` or `fail`. It covers the guide's
production checklist and its common issues; a file for each family of them. Nothing is changed: no migration is run, no
event is stored, no row is written but the budget that all readers of Stripe's API share. What is said holds no secret.
"""

from kamiyo.doctor.examination import examine
from kamiyo.doctor.finding import STRIPE_PATH, Finding, Subject, Verdict

__all__ = ["STRIPE_PATH", "Finding", "Subject", "Verdict", "examine"]
