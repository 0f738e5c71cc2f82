"""The picture of the results: `python -m bench.picture RESULTS.json PICTURE.svg`, with matplotlib at hand."""
# mypy: disable-error-code="import-not-found,unused-ignore"
# (its libraries are not in this project's environment)

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

# The backend must be chosen before pyplot is imported.
matplotlib.use("svg")

from matplotlib import pyplot

_OURS, _THEIRS, _FLOOR = "#4b3bd1", "#9aa0aa", "#d9dce1"


def draw(results: dict[str, Any], file: Path) -> None:
    """Two panels: events per second at the most connections, on a logarithmic axis, and p99 at sixteen."""
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "kamiyo", "font.size": 10})
    entries = {(entry["peer"], entry["connections"]): entry for entry in results["medians"]}
    widths = sorted({width for _, width in entries}, reverse=True)
    most = widths[0]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4.6), width_ratios=(1, 1))

    shown = [entry for (peer, width), entry in entries.items() if width == most and peer != "ceiling"]
    shown.sort(key=lambda entry: entry["rate"])
    names = [_short(results["labels"][entry["peer"]]) for entry in shown]
    rates = [entry["rate"] for entry in shown]
    spread = [
        [max(rate - min(entry["rates"]), 0) for rate, entry in zip(rates, shown, strict=True)],
        [max(max(entry["rates"]) - rate, 0) for rate, entry in zip(rates, shown, strict=True)],
    ]
    bars = left.barh(names, rates, xerr=spread, color=[_colour(entry["peer"]) for entry in shown], ecolor="#555")
    left.bar_label(bars, labels=[f"{rate:,.0f}".replace(",", " ") for rate in rates], padding=8)
    left.set_xscale("log")
    left.set_xlim(right=max(rates) * 4)
    left.set_title(f"Acknowledged per second, {most} connections (logarithmic)", loc="left")

    narrow = 16 if 16 in widths else most
    slow = [entry for (peer, width), entry in entries.items() if width == narrow and "end_to_end" in entry]
    slow.sort(key=lambda entry: -entry["p99"])
    names = [_short(results["labels"][entry["peer"]]) for entry in slow]
    bars = right.barh(names, [entry["p99"] for entry in slow], color=[_colour(entry["peer"]) for entry in slow])
    right.bar_label(bars, labels=[f"{entry['p99']:.1f} ms" for entry in slow], padding=4)
    right.set_xscale("log")
    if slow:
        right.set_xlim(right=max(entry["p99"] for entry in slow) * 5)
    right.set_title(f"99th percentile, {narrow} connections (logarithmic)", loc="left")

    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    figure.tight_layout()
    figure.savefig(file, format="svg", metadata={"Date": None})


def _short(label: str) -> str:
    return label.partition(" (")[0].replace(", nothing stored", "")


def _colour(peer: str) -> str:
    if peer.startswith("kamiyo"):
        return _OURS
    return _FLOOR if peer in ("asgi", "insert-1", "insert-100", "insert-100x2") else _THEIRS


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
