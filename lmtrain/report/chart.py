"""Drawing: line charts, heat maps and their scales as SVG that takes its colours from the page's style sheet.

All text passes ``Markup.format``, which escapes it.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from lmtrain.report.words import short

COLOURS = 6
"""Colours in the style sheet: ``c0`` to ``c5``; more lines repeat them, dashed."""
MOST_POINTS = 400
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 42


@dataclass(frozen=True)
class Line:
    """A curve. ``faint``: raw values behind a smoothed curve. ``strong``: the one that counts. ``dots``: few values."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: int = 0
    faint: bool = False
    strong: bool = False
    dots: bool = False

    @property
    def style(self) -> str:
        """CSS classes."""
        dashed = " dashed" if self.colour >= COLOURS else ""
        return f"c{self.colour % COLOURS}{dashed}{' faint' if self.faint else ''}{' strong' if self.strong else ''}"


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels, linearly or by the logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self._inner(self.low), self._inner(self.high)
        return self.start + (self._inner(value) - low) / (high - low) * (self.end - self.start)

    def _inner(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.log else value

    def ticks(self) -> list[float]:
        """Round values, four to seven of them; by the logarithm over a wide range, powers of ten."""
        if self.log and self.high / self.low >= 30:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            ticks = [10.0**power for power in powers]
        else:
            rough = (self.high - self.low) / 7
            size = 10.0 ** math.floor(math.log10(rough))
            unit = next(size * factor for factor in (1, 2, 2.5, 5, 10) if rough <= size * factor * 1.0001)
            first = math.ceil(self.low / unit - 1e-9)
            ticks = [unit * k for k in range(first, math.floor(self.high / unit + 1e-9) + 1)]
        return [tick for tick in ticks if self.low * 0.9999 <= tick <= self.high * 1.0001 or tick == 0 == self.low]


def line_chart(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    log: bool = False,
    zero: bool = False,
    rules: Sequence[tuple[float, str]] = (),
    events: Sequence[tuple[float, str]] = (),
    size: tuple[int, int] = (640, 320),
    name: str = "",
) -> Markup:
    """Curves over a common x. ``rules``: labelled horizontal lines. ``events``: labelled vertical ones. ``zero``: the y
    axis begins at 0, as the x axis does. Colours follow ``Line.colour``; the legend is the page's."""
    width, height = size
    ys = [y for line in lines for y in line.ys] + [y for y, _ in rules]
    xs = [x for line in lines for x in line.xs]
    x_axis = Axis(*_range(xs, False, True, 0.0), LEFT, width - RIGHT)
    y_axis = Axis(*_range(ys, log, zero, 0.04), height - BOTTOM, TOP, log)
    parts = [grid(x_axis, y_axis, x_label, y_label, size)]
    for x, label in events:
        at = x_axis(x)
        parts.append(
            Markup('<line class="event" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>').format(at, TOP, height - BOTTOM)
        )
        parts.append(Markup('<text class="note" x="{:.1f}" y="{}">{}</text>').format(at + 4, TOP + 10, label))
    parts += [_curve(line, x_axis, y_axis) for line in sorted(lines, key=lambda line: not line.faint)]
    parts += _rules(rules, y_axis, width)
    return _svg(parts, size, name or y_label)


def heat_map(
    layers: Sequence[tuple[NDArray[np.floating], str]],
    *,
    key: str,
    size: tuple[float, float],
    origin: tuple[float, float] = (LEFT, TOP),
) -> Markup:
    """Matrices with values 0 to 1 as opacity of an ink (a CSS class each) over the page's own background.

    So one picture suits light and dark pages. ``key``: unique within the page.
    """
    parts = []
    for number, (values, ink) in enumerate(layers):
        mask, place = f"{key}-{number}", (*origin, *size)
        box = Markup('x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"').format(*place)
        image = Markup('<image {} preserveAspectRatio="none" class="pixels" href="{}"/>').format(box, png(values))
        parts.append(Markup('<mask id="{}">{}</mask>').format(mask, image))
        parts.append(Markup('<rect {} class="{}" mask="url(#{})"/>').format(box, ink, mask))
    box = Markup('x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"').format(*origin, *size)
    return Markup("").join([*parts, Markup('<rect {} class="frame"/>').format(box)])


def png(values: NDArray[np.floating]) -> str:
    """A grey image of values 0 to 1, in 51 shades, as a data URI."""
    grey = (np.rint(np.clip(np.nan_to_num(values), 0, 1) * 51) * 5).astype(np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in grey)
    header = struct.pack(">IIBBBBB", grey.shape[1], grey.shape[0], 8, 0, 0, 0, 0)
    body = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")):
        body += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return "data:image/png;base64," + base64.b64encode(body).decode()


def smooth(ys: Sequence[float]) -> list[float]:
    """Centred moving average over ``window(len(ys))`` values, fewer at the ends."""
    ones = np.ones(window(len(ys)))
    total = np.convolve(ys, ones, "same") / np.convolve(np.ones(len(ys)), ones, "same")
    return [float(value) for value in total]


def window(count: int) -> int:
    """An odd number of values near 1/40 of ``count``."""
    return max(1, count // 40) | 1


def figure_svg(parts: Sequence[Markup], size: tuple[int, int], name: str) -> Markup:
    """An SVG drawing of its own; ``name`` is what a screen reader says."""
    return _svg(parts, size, name)


def _svg(parts: Sequence[Markup], size: tuple[int, int], name: str) -> Markup:
    head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(*size, name)
    return head + Markup("").join(parts) + Markup("</svg>")


def _range(values: Sequence[float], log: bool, zero: bool, margin: float) -> tuple[float, float]:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if log:
        low, high = max(low, high * 1e-9, 1e-300), max(high, 1e-300)
        return low / 1.15, high * 1.15
    low = min(low, 0.0) if zero else low
    if high - low <= 1e-12 * max(abs(high), 1e-12):
        return (low - abs(low) / 2, high + abs(high) / 2) if high else (0.0, 1.0)
    spread = (high - low) * margin
    return (low if zero else low - spread), high + spread


def grid(x_axis: Axis, y_axis: Axis, x_label: str, y_label: str, size: tuple[int, int]) -> Markup:
    """Lines, ticks and labels of both axes."""
    width, height = size
    parts = []
    for tick in y_axis.ticks():
        at = y_axis(tick)
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/>').format(LEFT, width - RIGHT, y=at)
        )
        parts.append(Markup('<text class="tick end" x="{}" y="{:.1f}">{}</text>').format(LEFT - 7, at + 4, short(tick)))
    for tick in x_axis.ticks():
        parts.append(
            Markup('<text class="tick middle" x="{:.1f}" y="{}">{}</text>').format(
                x_axis(tick), height - BOTTOM + 17, short(tick)
            )
        )
    middle = (TOP + height - BOTTOM) / 2
    parts.append(
        Markup('<line class="base" x1="{}" x2="{}" y1="{y}" y2="{y}"/>').format(LEFT, width - RIGHT, y=height - BOTTOM)
    )
    parts.append(
        Markup('<text class="label middle" x="{}" y="{}">{}</text>').format(
            (LEFT + width - RIGHT) / 2, height - 6, x_label
        )
    )
    parts.append(
        Markup('<text class="label middle" transform="translate(13 {}) rotate(-90)">{}</text>').format(middle, y_label)
    )
    return Markup("").join(parts)


def _curve(line: Line, x_axis: Axis, y_axis: Axis) -> Markup:
    xs, ys = _thinned(line.xs, line.ys)
    points = [(x_axis(x), y_axis(y)) for x, y in zip(xs, ys, strict=True)]
    drawn = Markup('<polyline class="line {}" points="{}"/>').format(
        line.style, " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    )
    if line.dots:
        dot = Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="3.2"><title>{}: {:.4g}</title></circle>')
        drawn += Markup("").join(dot.format(line.style, *at, line.name, y) for at, y in zip(points, ys, strict=True))
    return drawn


def _rules(rules: Sequence[tuple[float, str]], y_axis: Axis, width: int) -> list[Markup]:
    """Horizontal lines; the lowest is labelled below itself if the next is close, the others above and apart."""
    parts = []
    free = math.inf
    ordered = sorted(rules, key=lambda rule: y_axis(rule[0]), reverse=True)
    for value, label in ordered:
        at = y_axis(value)
        close = label == ordered[0][1] and len(ordered) > 1 and at - y_axis(ordered[1][0]) < 16
        free = at + 11 if close else min(at - 4, free - 13)
        parts.append(
            Markup('<line class="rule" x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/>').format(LEFT, width - RIGHT, y=at)
        )
        parts.append(
            Markup('<text class="note end" x="{}" y="{:.1f}">{}</text>').format(width - RIGHT - 4, free, label)
        )
    return parts


def _thinned(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most MOST_POINTS points: of every run of neighbours the lowest and the highest, in their order."""
    if len(xs) <= MOST_POINTS:
        return list(xs), list(ys)
    kept: list[int] = []
    for part in np.array_split(np.arange(len(xs)), MOST_POINTS // 2):
        inside = np.asarray(ys)[part]
        kept += sorted({int(part[inside.argmin()]), int(part[inside.argmax()])})
    return [xs[i] for i in kept], [ys[i] for i in kept]
