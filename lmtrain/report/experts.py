"""How evenly routers use their experts: a curve for all layers, and per layer a map of experts by time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from lmtrain.report.chart import LEFT, RIGHT, TOP, Axis, Line, figure_svg, heat_map, line_chart, smooth
from lmtrain.report.figures import SMALL, Figure, legend
from lmtrain.report.record import Record
from lmtrain.report.words import short, significant

HEAT_COLUMNS = 120
MOST_MAPS = 8


def experts(record: Record) -> list[Figure]:
    """How evenly the routers use their experts."""
    places = sorted({int(key.split(".")[1]) for row in record.steps for key in row if key.startswith("router_load.")})
    shown = {places[at] for at in np.linspace(0, len(places) - 1, MOST_MAPS).round().astype(int)} if places else set()
    order = record.recipe.model.order() if record.recipe else []
    made: list[Figure] = []
    spread: list[Line] = []
    for place in places:
        name = f"branch {place}" + (f" ({order[place]})" if place < len(order) else "")
        rows = [row for row in record.steps if row.get(f"router_load.{place}")]
        load = np.array([row[f"router_load.{place}"] for row in rows], dtype=np.float64)
        tokens = [row["tokens"] for row in rows]
        if place in shown:
            made.append(_load_map(place, name, load, tokens))
        worst = load.max(axis=1) / np.maximum(load.mean(axis=1), 1e-9)
        spread.append(Line(name, tokens, smooth(worst.tolist()), colour=len(spread)))
    if spread:
        ends = list(dict.fromkeys(significant(end) for end in sorted(line.ys[-1] for line in spread)))
        caption = (
            f"The busiest expert of a step had {' to '.join(ends[:1] + ends[1:][-1:])} times an even share at the end; "
            "1 would be perfect balance"
            + (f" (maps follow for {len(made)} of the {len(places)} layers)." if len(made) < len(places) else ".")
        )
        svg = line_chart(spread, x_label="tokens", y_label="busiest expert / mean", rules=[(1.0, "even")], size=SMALL)
        made.insert(0, Figure("Balance of the experts", svg, caption, legend(spread)))
    return made


def _load_map(place: int, name: str, load: np.ndarray[Any, Any], tokens: Sequence[int]) -> Figure:
    """Experts by time: orange above an even share, blue below, full ink at double and at half."""
    parts = np.array_split(np.arange(len(load)), min(HEAT_COLUMNS, len(load)))
    binned = np.stack([load[part].sum(axis=0) for part in parts], axis=1)
    share = np.log2(np.maximum(binned / np.maximum(binned.mean(axis=0), 1e-9), 1e-9))
    width, height = SMALL
    plot = (width - LEFT - RIGHT, height - TOP - 52)
    drawn = [heat_map([(share, "over"), (-share, "under")], key=f"load-{place}", size=plot)]
    count = load.shape[1]
    for expert in range(count) if count <= 8 else sorted({0, count // 4, count // 2, 3 * count // 4, count - 1}):
        at = TOP + plot[1] * (expert + 0.5) / count + 4
        drawn.append(Markup('<text class="tick end" x="{}" y="{:.1f}">{}</text>').format(LEFT - 7, at, expert))
    axis = Axis(0, tokens[-1], LEFT, width - RIGHT)
    for tick in axis.ticks():
        text = Markup('<text class="tick middle" x="{:.1f}" y="{}">{}</text>')
        drawn.append(text.format(axis(tick), height - 35, short(tick)))
    drawn.append(
        Markup('<text class="label middle" transform="translate(13 {}) rotate(-90)">expert</text>').format(
            TOP + plot[1] / 2
        )
    )
    drawn.append(Markup('<text class="label" x="{}" y="{}">tokens</text>').format(LEFT, height - 12))
    drawn.append(_load_scale(place, width - RIGHT - 190, height - 22))
    even = 1 / count
    last = load[-max(1, len(load) // 10) :].sum(axis=0) / load[-max(1, len(load) // 10) :].sum()
    caption = (
        f"In the last tenth of the run the {count} experts took between {last.min() / even:.2f} and "
        f"{last.max() / even:.2f} times an even share of the tokens."
    )
    return Figure(f"Load of the experts in {name}", figure_svg(drawn, SMALL, f"expert load, {name}"), caption)


def _load_scale(place: int, x: float, y: float) -> Markup:
    steps = np.linspace(-1, 1, 33)[None, :]
    bar = heat_map([(steps, "over"), (-steps, "under")], key=f"scale-{place}", size=(90, 9), origin=(x + 50, y))
    text = Markup('<text class="tick {}" x="{}" y="{}">{}</text>')
    return bar + text.format("end", x + 44, y + 9, "half") + text.format("", x + 146, y + 9, "double")
