"""Drawing shares over time: bands stacked to the whole, with marked moments above them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from lmtrain.report.chart import BOTTOM, COLOURS, LEFT, RIGHT, TOP, Axis, figure_svg, grid

BADGE = 15
"""Pixels that a number needs, across and upwards."""
MOST_RAISED = 3


@dataclass(frozen=True)
class Mark:
    """A moment. number: shown above its line; without one only a tick is drawn. style: a CSS class. title: on hover."""

    x: float
    number: str
    style: str
    title: str


def stack_chart(
    edges: NDArray[np.int64],
    shares: NDArray[np.float64],
    names: Sequence[str],
    marks: Sequence[Mark] = (),
    *,
    x_label: str,
    y_label: str,
    size: tuple[int, int],
) -> Markup:
    """shares ``[bins, parts]``, rows sum to 1: bin i lies between ``edges`` i and i + 1. The first part is lowest; part
    n has the colours of ``band(n)``."""
    width, height = size
    x_axis = Axis(float(edges[0]), float(edges[-1]), LEFT, width - RIGHT)
    heights = _raised([x_axis(mark.x) for mark in marks if mark.number])
    top = TOP + BADGE * (max(heights, default=-1) + 1)
    y_axis = Axis(0.0, 100.0, height - BOTTOM, top)
    xs = np.repeat([x_axis(float(edge)) for edge in edges], 2)[1:-1]
    ends = np.hstack([np.zeros((len(shares), 1)), np.cumsum(shares, axis=1)])
    ys = np.repeat(height - BOTTOM - np.minimum(ends, 1.0) * (height - BOTTOM - top), 2, axis=0)
    parts = [grid(x_axis, y_axis, x_label, y_label, size)]
    for number, name in enumerate(names):
        outline = np.vstack([np.stack([xs, ys[:, number]], 1), np.stack([xs, ys[:, number + 1]], 1)[::-1]])
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in outline)
        area = Markup('<polygon class="area {}" points="{}"><title>{}</title></polygon>')
        parts.append(area.format(band(number), points, name))
    raised = iter(heights)
    parts += [_mark(mark, x_axis(mark.x), next(raised) if mark.number else None, top, height) for mark in marks]
    return figure_svg(parts, size, y_label)


def band(number: int) -> str:
    """CSS classes of the ``number``-th part; more parts than colours repeat them, paler."""
    return f"c{number % COLOURS}{' pale' if number >= COLOURS else ''}"


def _mark(mark: Mark, x: float, raised: int | None, top: float, height: int) -> Markup:
    """A line through the bands below its number, or a tick above them."""
    low, high = (height - BOTTOM, top - BADGE * raised) if raised is not None else (top, top - 6)
    line = '<line class="{}" x1="{x:.1f}" x2="{x:.1f}" y1="{:.1f}" y2="{:.1f}"/>'
    parts = [Markup(line).format(style, low, high, x=x) for style in (f"halo {mark.style}", f"event {mark.style}")]
    if raised is not None:
        text = Markup('<text class="note middle" x="{:.1f}" y="{:.1f}">{}</text>')
        parts.append(text.format(x, high - 4, mark.number))
    return Markup("<g><title>{}</title>{}</g>").format(mark.title, Markup("").join(parts))


def _raised(xs: Sequence[float]) -> list[int]:
    """How many rows each number goes up so as not to cover one before it; ``xs`` ascend."""
    last = [-float("inf")] * (MOST_RAISED + 1)
    rows = []
    for x in xs:
        free = [row for row, taken in enumerate(last) if x - taken >= BADGE]
        rows.append(free[0] if free else MOST_RAISED)
        last[rows[-1]] = x
    return rows
