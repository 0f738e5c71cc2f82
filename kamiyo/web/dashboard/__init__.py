"""The operators' dashboard: what is stuck, why, and may I run it again?

Pages made on the server, one stylesheet, hardly any script; all of it works without the script.

    site         who may see it, what every answer carries, which page answers
    session      the signed cookie, and the token of every action
    pages        looking: overview, events, event, failures, replay, customer
    actions      doing: sign in and out, retry, replay
    background   replays under way, and a look at the backlog every minute
    queries      what the pages ask; the SQL in dashboard.sql
    attention    from numbers to "this needs a person"; whether an event may be run again
    changes      a billing row before and after an event
    payload      an event's body as a tree
    wording      how moments, lengths of time, amounts and states read
"""

from collections.abc import Callable

from kamiyo.settings import Settings
from kamiyo.web.dashboard import actions, pages
from kamiyo.web.dashboard.site import Dashboard
from kamiyo.web.system import System


def create_dashboard(current: Callable[[], System | None], settings: Callable[[], Settings]) -> Dashboard:
    """The dashboard of the system that `current()` names at the time of a request, None before the start."""
    return Dashboard(
        current,
        settings,
        pages={
            "/": pages.overview,
            "/undecided": pages.undecided,
            "/events": pages.events,
            "/events/{event_id:path}/body": pages.body,
            "/events/{event_id:path}": pages.event,
            "/search": pages.search,
            "/failures": pages.failures,
            "/failures/{fingerprint}/retry": pages.confirm_replay,
            "/failures/{fingerprint}": pages.group,
            "/replays/{number}": pages.replay,
            "/customers/{customer_id:path}": pages.customer,
        },
        actions={
            "/sign-out": actions.sign_out,
            "/events/{event_id:path}/retry": actions.retry,
            "/failures/{fingerprint}/retry": actions.replay,
        },
        open_pages={"/sign-in": pages.sign_in},
        open_actions={"/sign-in": actions.sign_in},
    )


__all__ = ["Dashboard", "create_dashboard"]
