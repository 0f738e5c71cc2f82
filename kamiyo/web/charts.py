"""Small pictures of numbers over time, as SVG made on the server.

A picture fills whatever box it is given: its coordinates are stretched, so it holds no text and no round shape. Words
(title, axis, the value under a pointer) stand beside it in HTML. Colours come from the stylesheet, by class, so that
one picture serves both themes. Each step has an invisible column with a `<title>`: a tooltip for whoever has a pointer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

#: Width of one step, and height of the drawing, in the units of the drawing.
_STEP = 10
_HEIGHT = 100
_GAP = 2


@dataclass(frozen=True, slots=True)
class Series:
    """The values of one thing, a value for each step; None where there is nothing to say. `tone` is its CSS class."""

    tone: str
    values: Sequence[float | None]


def ceiling(highest: float) -> float:
    """The end of an axis that holds `highest`: the next 1, 2, 2.5 or 5 times a power of ten; 1 for nothing."""
    if highest <= 0:
        return 1.0
    power = float(10 ** math.floor(math.log10(highest)))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= highest * (1 - 1e-9))


def columns(stack: Sequence[Series], top: float, titles: Sequence[str], label: str) -> Markup:
    """Columns, the series of `stack` on top of one another from the ground up; `top` is the value of the upper edge."""
    parts = []
    for step in range(len(titles)):
        ground = 0.0
        for series in stack:
            value = series.values[step] or 0
            if value > 0:
                height = max(value / top * _HEIGHT, 1.0)
                parts.append(
                    f'<rect class="{escape(series.tone)}" x="{step * _STEP + _GAP / 2:g}" '
                    f'y="{_HEIGHT - ground - height:.2f}" width="{_STEP - _GAP}" height="{height:.2f}"/>'
                )
                ground += height
    return _drawing(parts, titles, label)


def line(series: Series, top: float, titles: Sequence[str], label: str) -> Markup:
    """A line over a filled ground. It breaks where there is no value; a value between two gaps is a short dash."""
    parts = []
    for run in _runs(series.values):
        points = [(step * _STEP + _STEP / 2, _HEIGHT - min(value / top, 1) * _HEIGHT) for step, value in run]
        if len(points) == 1:
            [(x, y)] = points
            points = [(x - _STEP / 2 + 1, y), (x + _STEP / 2 - 1, y)]
        path = "L".join(f"{x:g} {y:.2f}" for x, y in points)
        tone = escape(series.tone)
        parts.append(f'<path class="area {tone}" d="M{points[0][0]:g} {_HEIGHT}L{path}L{points[-1][0]:g} {_HEIGHT}Z"/>')
        parts.append(f'<path class="line {tone}" vector-effect="non-scaling-stroke" d="M{path}"/>')
    return _drawing(parts, titles, label)


def _runs(values: Sequence[float | None]) -> list[list[tuple[int, float]]]:
    runs: list[list[tuple[int, float]]] = [[]]
    for step, value in enumerate(values):
        if value is None:
            runs.append([])
        else:
            runs[-1].append((step, value))
    return [run for run in runs if run]


def _drawing(parts: Sequence[str], titles: Sequence[str], label: str) -> Markup:
    hits = (
        f'<rect class="hit" x="{step * _STEP}" width="{_STEP}" height="{_HEIGHT}"><title>{escape(title)}</title></rect>'
        for step, title in enumerate(titles)
    )
    # What goes in is numbers made here, and texts that were escaped.
    return Markup(  # noqa: S704 - numbers, and texts that were escaped
        f'<svg class="chart" role="img" aria-label="{escape(label)}" preserveAspectRatio="none" '
        f'viewBox="0 0 {max(len(titles), 1) * _STEP} {_HEIGHT}">{"".join(parts)}{"".join(hits)}</svg>'
    )
