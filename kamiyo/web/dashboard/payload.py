"""An event's payload as a tree that can be read: folded, linked, its moments in words."""

import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup, escape

from kamiyo.web.dashboard import wording

#: Values a tree shows at most, and levels: beyond either the text of the payload says it better.
MOST_VALUES = 4000
MOST_LEVELS = 40

# Levels that are open at first: the event, its data, its object.
_OPEN_LEVELS = 2

# Stripe's ids: a short prefix, an underscore, at least eight letters and digits, not all of them small letters: that
# would be a word, like charge_automatically.
_ID = re.compile(r"[a-z]{2,12}(?:_(?:test|live))?_(?=[a-z_]*[A-Z0-9])[A-Za-z0-9_]{8,250}")
# Keys of Stripe's that hold unix seconds.
_MOMENT = re.compile(r"(^|_)(created|at|start|end|date|time|timestamp|anchor|until|by|attempt|expires|on|period_end)$")
_EARLIEST, _LATEST = 946_684_800, 4_102_444_800  # 2000 and 2100: other numbers are no moments


class _Full(Exception):
    """The tree has as many values as it may."""


class _Tree:
    def __init__(self, link: Callable[[str], str]) -> None:
        self._link = link
        self._left = MOST_VALUES

    def node(self, key: str, value: Any, level: int) -> Iterator[str]:
        self._left -= 1
        if self._left < 0 or level > MOST_LEVELS:
            raise _Full
        if isinstance(value, dict) and value:
            yield from self._branch(key, value.items(), "{}", level)
        elif isinstance(value, list) and value:
            yield from self._branch(key, enumerate(value), "[]", level)
        else:
            yield f'<li><span class="k">{escape(key)}</span> {self._leaf(key, value)}</li>'

    def _branch(self, key: str, items: Any, brackets: str, level: int) -> Iterator[str]:
        items = list(items)
        opened = " open" if level <= _OPEN_LEVELS else ""
        size = wording.plural(len(items), "item" if brackets == "[]" else "field")
        yield f'<li><details{opened}><summary><span class="k">{escape(key)}</span> '
        yield f'<span class="size">{brackets[0]} {size} {brackets[1]}</span></summary><ul>'
        for name, value in items:
            yield from self.node(str(name), value, level + 1)
        yield "</ul></details></li>"

    def _leaf(self, key: str, value: Any) -> str:
        if value is None or isinstance(value, bool):
            word = "null" if value is None else str(value).lower()
            return f'<span class="v word">{word}</span>'
        if isinstance(value, int | float):
            note = ""
            if isinstance(value, int) and _EARLIEST <= value < _LATEST and _MOMENT.search(key):
                note = f' <span class="note">{wording.exact(datetime.fromtimestamp(value, UTC))}</span>'
            return f'<span class="v number">{value}</span>{note}'
        if isinstance(value, str) and value:
            if _ID.fullmatch(value):
                return f'<a class="v id" href="{escape(self._link(value))}">{escape(value)}</a>'
            return f'<span class="v text">{escape(value)}</span>'
        empty = "empty text" if isinstance(value, str) else "[ ]" if isinstance(value, list) else "{ }"
        return f'<span class="v empty">{empty}</span>'


def tree(payload: dict[str, Any], link: Callable[[str], str]) -> Markup | None:
    """`payload` as nested lists, ids leading to `link(id)`; None when it is too large or too deep to be read so."""
    growing = _Tree(link)
    try:
        nodes = [part for key, value in payload.items() for part in growing.node(key, value, 1)]
    except (_Full, ValueError):  # Python writes no number of more than 4300 digits
        return None
    return Markup(f'<ul class="tree">{"".join(nodes)}</ul>')  # noqa: S704 - texts that were escaped
