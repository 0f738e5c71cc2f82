"""When a failed event runs again: the curve, and the end of it.

    failed try   waits about   since the first try
    1            10 s          10 s
    2            1 min         1 min
    3            6 min         7 min
    4            36 min        43 min
    5            never: the event is dead, and a person is told

Each wait is drawn from 80 to 120 % of the figure, so that a thousand events felled by one outage do not come
back in one second. The first wait is short because most failures are a blip; the last is long enough for a
deployment to be rolled back. A handler that knows better says so with `Retry(after=…)`.
"""

import random

#: Tries an event gets before it is dead, counting the first.
MAX_ATTEMPTS = 5

_FIRST_WAIT_SECONDS = 10.0
_GROWTH = 6.0
_JITTER = 0.2


def delay_after(attempt: int, rng: random.Random | None = None, *, first: float = _FIRST_WAIT_SECONDS) -> float | None:
    """Seconds to wait after the failed try number `attempt` (1 is the first), or None when there is no next try.

    `first` is the middle of the first wait in seconds; the tests and the chaos harness make it small.
    """
    if attempt >= MAX_ATTEMPTS:
        return None
    middle = first * _GROWTH ** (max(attempt, 1) - 1)
    # The jitter spreads load; nothing secret depends on it.
    draw = rng.uniform if rng else random.uniform
    return middle * draw(1 - _JITTER, 1 + _JITTER)
