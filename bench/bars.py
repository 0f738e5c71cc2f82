"""The bars: what the project promises of its speed, each judged by the medians of one run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

#: Backlog at the end of the window that is still none: a part of what was acknowledged in it.
_GROWING = 0.05


@dataclass(frozen=True, slots=True)
class Bar:
    """One promise. `figure` is None where this run did not measure it; `worst` and `best` are of single rounds."""

    promise: str
    limit: float
    at_most: bool
    unit: str
    figure: float | None
    worst: float | None = None
    best: float | None = None

    @property
    def verdict(self) -> str:
        """`pass`, `miss`, or `not measured`."""
        if self.figure is None:
            return "not measured"
        return "pass" if (self.figure <= self.limit if self.at_most else self.figure >= self.limit) else "miss"

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        spread = {"worst": self.worst, "best": self.best}
        return {"promise": self.promise, "limit": self.limit, "at_most": self.at_most, "unit": self.unit} | {
            "figure": self.figure,
            **spread,
            "verdict": self.verdict,
        }


class Figures:
    """The measured runs, looked up by peer, connections and field."""

    def __init__(self, runs: Sequence[Mapping[str, Any]]) -> None:
        self._runs = runs

    def by_round(self, peer: str, connections: int, field: str) -> dict[int, float]:
        """The field in each round it was measured."""
        return {
            run["round"]: run[field]
            for run in self._runs
            if run["peer"] == peer and run["connections"] == connections and run.get(field) is not None
        }

    def median(self, peer: str, connections: int, field: str) -> float | None:
        """Over all rounds."""
        values = self.by_round(peer, connections, field).values()
        return median(values) if values else None

    def highest(self, peers: Sequence[str], connections: int, field: str) -> float | None:
        """The highest value any of `peers` ever had."""
        values = [value for peer in peers for value in self.by_round(peer, connections, field).values()]
        return max(values, default=None)

    def ratio(
        self, ours: tuple[str, int, str], theirs: tuple[str, int, str]
    ) -> tuple[float | None, float | None, float | None]:
        """Of the medians; then the lowest and the highest of rounds."""
        upper, lower = self.median(*ours), self.median(*theirs)
        if upper is None or not lower:
            return None, None, None
        tops, bottoms = self.by_round(*ours), self.by_round(*theirs)
        rounds = [tops[turn] / bottoms[turn] for turn in tops.keys() & bottoms.keys() if bottoms[turn]]
        return upper / lower, min(rounds, default=None), max(rounds, default=None)


def judge(runs: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """Every bar, in the order they were promised. `runs` are the runs of peers and floors together."""
    figures = Figures(runs)

    def at_least(promise: str, limit: float, ours: tuple[str, int, str], theirs: tuple[str, int, str]) -> Bar:
        figure, low, high = figures.ratio(ours, theirs)
        return Bar(promise, limit, False, "×", figure, low, high)

    def at_most(promise: str, limit: float, ours: tuple[str, int, str], theirs: tuple[str, int, str]) -> Bar:
        figure, low, high = figures.ratio(ours, theirs)
        return Bar(promise, limit, True, "×", figure, high, low)

    acknowledged = ("kamiyo-ack", 64, "rate")
    engine = ("syncengine", 64, "end_to_end")
    return [
        at_least(
            "acknowledged, of stripe-sync-engine, 64 connections",
            5.5,
            acknowledged,
            ("syncengine", 64, "rate"),
        ),
        at_least(
            "acknowledged, of the hand-written handler, 64 connections",
            40,
            acknowledged,
            ("handwritten", 64, "rate"),
        ),
        at_least("acknowledged, of dj-stripe, 64 connections", 150, acknowledged, ("djstripe", 64, "rate")),
        at_least("acknowledged, of raw ASGI with HMAC, 64 connections", 0.5, acknowledged, ("asgi", 64, "rate")),
        at_most(
            "p99, of stripe-sync-engine's, 16 connections",
            0.5,
            ("kamiyo", 16, "p99"),
            ("syncengine", 16, "p99"),
        ),
        _sustained(
            at_least(
                "into the four tables, of stripe-sync-engine, 64 connections",
                4,
                ("kamiyo", 64, "end_to_end"),
                engine,
            ),
            figures,
        ),
        at_least(
            "with a handler of one UPDATE, of stripe-sync-engine, 64 connections",
            2,
            ("kamiyo-handler", 64, "end_to_end"),
            engine,
        ),
        at_most(
            "median acknowledgement, of a one-row INSERT, one connection",
            1.6,
            ("kamiyo", 1, "p50"),
            ("insert-1", 1, "p50"),
        ),
        _milliseconds("commit to processed, median, 64 connections", figures, "kamiyo", 64),
        _milliseconds("commit to processed by a handler, median, one connection", figures, "kamiyo-handler", 1),
        Bar(
            "memory of a server process, highest, 64 connections",
            120,
            True,
            "MiB",
            figures.highest(("kamiyo-ack", "kamiyo", "kamiyo-handler", "kamiyo-two"), 64, "rss"),
        ),
    ]


def _milliseconds(promise: str, figures: Figures, peer: str, connections: int) -> Bar:
    rounds = figures.by_round(peer, connections, "delay_p50").values()
    figure = figures.median(peer, connections, "delay_p50")
    return Bar(promise, 10, True, "ms", figure, max(rounds, default=None), min(rounds, default=None))


def _sustained(bar: Bar, figures: Figures) -> Bar:
    """A rate that leaves a growing backlog is not sustained."""
    backlog, rate = figures.median("kamiyo", 64, "backlog"), figures.median("kamiyo", 64, "rate")
    seconds = figures.median("kamiyo", 64, "seconds")
    if not rate or not seconds or backlog is None or backlog <= max(64, _GROWING * rate * seconds):
        return bar
    return Bar(f"{bar.promise} (its backlog grew)", bar.limit, bar.at_most, bar.unit, 0.0, bar.worst, bar.best)
