"""Which figures a run has: from rows of metrics.jsonl to charts, each with a sentence that says what one sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup

from lmtrain.report.chart import LEFT, RIGHT, TOP, Axis, Line, figure_svg, heat_map, line_chart, smooth, window
from lmtrain.report.record import Record, Row
from lmtrain.report.words import listing, quantity, short, significant

LARGE, SMALL = (640, 320), (640, 260)
HEAT_COLUMNS = 120
MOST_MAPS = 8
MOST_RAW = 4
"""More sources than these, and only their smoothed curves are drawn."""
LOG_SPREAD = 30
"""A curve whose largest value is this many times its smallest is drawn by the logarithm."""


@dataclass(frozen=True)
class Figure:
    """A drawing with its title, its caption (one sentence) and its legend: (CSS class, name, last value)."""

    title: str
    svg: Markup
    caption: str
    legend: list[tuple[str, str, str]] = field(default_factory=list)


def learning(record: Record) -> list[Figure]:
    """Loss, held-out bits per byte, and the learning rate behind them."""
    rate = _simple(
        record,
        "Learning rate",
        record.steps,
        _key("lr"),
        "learning rate",
        _rate_words,
        raw=False,
        zero=True,
        size=LARGE,
    )
    return [figure for figure in (_loss(record), _heldout(record), _source_loss(record), rate) if figure]


def health(record: Record) -> list[Figure]:
    """What tells whether the run is well: gradients, speed, memory, waiting."""
    steps = record.steps
    made = [
        _gradients(record),
        _simple(record, "Throughput", steps, _key("tokens_per_second"), "tokens per second", _speed_words, zero=True),
        _simple(record, "Utilisation", steps, _key("mfu", 100), "model FLOP/s, % of peak", _mfu_words, zero=True),
        _simple(record, "Memory", steps, _key("memory_bytes", 2**-30), "GiB", _memory_words, raw=False, zero=True),
        _simple(record, "Waiting for data", steps, _waits(record), "% of a step's time", _wait_words, zero=True),
    ]
    return [figure for figure in made if figure]


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
        ends = [line.ys[-1] for line in spread]
        caption = (
            f"The busiest expert of a step had {significant(min(ends))} to {significant(max(ends))} times an even share "
            "at the end; 1 would be perfect balance"
            + (f" (below, {len(made)} of the {len(places)} layers)." if len(made) < len(places) else ".")
        )
        svg = line_chart(spread, x_label="tokens", y_label="busiest expert / mean", rules=[(1.0, "even")], size=SMALL)
        made.insert(0, Figure("Balance of the experts", svg, caption, _legend(spread)))
    return made


def _loss(record: Record) -> Figure | None:
    xs, ys = _series(record.steps, _key("loss"))
    if not xs:
        return None
    lines = _raw_and_smooth("all", xs, ys, 0)
    over = f"moving average over {window(len(ys))} steps in front of every step's value"
    caption = (
        f"The training loss went from {significant(ys[0])} to {significant(lines[-1].ys[-1])} nats per token over "
        f"{quantity(xs[-1])} tokens ({over})."
    )
    svg = line_chart(lines, x_label="tokens", y_label="loss, nats per token", events=_resumes(record))
    return Figure("Training loss", svg, caption)


def _source_loss(record: Record) -> Figure | None:
    names = list(dict.fromkeys(key for row in record.steps for key in row if key.startswith("source_loss.")))
    lines: list[Line] = []
    for number, key in enumerate(names):
        xs, ys = _series(record.steps, _key(key))
        curves = _raw_and_smooth(key.removeprefix("source_loss."), xs, ys, number) if xs else []
        lines += curves if len(names) <= MOST_RAW else curves[1:]
    if len(names) < 2 or not lines:
        return None
    ends = sorted((line.ys[-1], line.name) for line in lines if not line.faint)
    caption = f"Of the sources, {ends[0][1]} ends with the lowest loss, {significant(ends[0][0])} nats per token, "
    caption += f"and {ends[-1][1]} with the highest, {significant(ends[-1][0])}."
    svg = line_chart(lines, x_label="tokens", y_label="loss, nats per token")
    return Figure("Training loss by source", svg, caption, _legend(lines))


def baselines(record: Record) -> dict[str, float]:
    """What held-out text costs without this model: name to bits per byte, from summary.json."""
    found = {key: value for key, value in (record.summary or {}).items() if key.endswith("_bpb")}
    return {
        key.removesuffix("_bpb").replace("_", " "): value
        for key, value in found.items()
        if isinstance(value, int | float)
    }


def _heldout(record: Record) -> Figure | None:
    keys = list(dict.fromkeys(key for row in record.evals for key in row if key.startswith("heldout_bpb")))
    lines = []
    for number, key in enumerate(keys):
        xs, ys = _series(record.evals, _key(key))
        name = key.removeprefix("heldout_bpb").removeprefix(".") or "all"
        lines += [Line(name, xs, ys, number, strong=name == "all", dots=True)] if xs else []
    if not lines or lines[0].name != "all":
        return None
    first, last = lines[0].ys[0], lines[0].ys[-1]
    rules = [(value, f"{name} {value:.2f}") for name, value in baselines(record).items()]
    caption = f"Held-out text costs {last:.3f} bits per byte at the end, {first:.3f} at the start"
    beaten = [name for name, value in baselines(record).items() if last < value]
    caption += f"; below the dotted lines of {listing(beaten)}." if beaten else "."
    svg = line_chart(lines, x_label="tokens", y_label="bits per byte", rules=rules)
    return Figure("Held-out text", svg, caption, _legend(lines))


def _gradients(record: Record) -> Figure | None:
    clip = record.recipe.train.optimizer.clip_norm if record.recipe else None
    rules = [] if clip is None else [(clip, f"clipped at {short(clip)}")]
    skipped = sum(1 for row in record.steps if row.get("skipped"))

    def words(ys: list[float]) -> str:
        over = "" if clip is None else f", {sum(y > clip for y in ys) / len(ys):.0%} of the steps above the clip"
        return f"The gradient norm has a median of {significant(float(np.median(ys)))}{over}; {skipped} steps skipped."

    return _simple(record, "Gradient norm", record.steps, _key("grad_norm"), "gradient norm", words, rules=rules)


def _rate_words(ys: list[float]) -> str:
    return f"The learning rate peaks at {short(max(ys))} and ends at {short(ys[-1])}."


def _speed_words(ys: list[float]) -> str:
    return f"A median of {quantity(float(np.median(ys)))} tokens per second over all processes, waiting included."


def _mfu_words(ys: list[float]) -> str:
    return f"A median of {float(np.median(ys)):.1f} % of the hardware's peak FLOP/s does model arithmetic."


def _memory_words(ys: list[float]) -> str:
    return f"Rank 0 used {significant(max(ys))} GiB at most."


def _wait_words(ys: list[float]) -> str:
    return (
        f"The median step waited {significant(float(np.median(ys)))} % of its time for data, the worst {max(ys):.0f} %."
    )


def _simple(
    record: Record,
    title: str,
    rows: Sequence[Row],
    value: Callable[[Row], float | None],
    label: str,
    words: Callable[[list[float]], str],
    *,
    raw: bool = True,
    zero: bool = False,
    rules: Sequence[tuple[float, str]] = (),
    size: tuple[int, int] = SMALL,
) -> Figure | None:
    xs, ys = _series(rows, value)
    if not xs:
        return None
    log = not zero and min(ys) > 0 and max(ys) > LOG_SPREAD * min(ys)
    lines = _raw_and_smooth(label, xs, ys, 0) if raw else [Line(label, xs, ys)]
    events = [(x, "") for x, _ in _resumes(record)]
    svg = line_chart(
        lines, x_label="tokens", y_label=label, log=log, zero=zero, rules=rules, events=events, size=size, name=title
    )
    return Figure(title, svg, words(ys))


def _load_map(place: int, name: str, load: np.ndarray[Any, Any], tokens: Sequence[int]) -> Figure:
    """Experts by time: orange above an even share, blue below, full ink at double and at half."""
    parts = np.array_split(np.arange(len(load)), min(HEAT_COLUMNS, len(load)))
    binned = np.stack([load[part].sum(axis=0) for part in parts], axis=1)
    share = np.log2(np.maximum(binned / np.maximum(binned.mean(axis=0), 1e-9), 1e-9))
    width, height = SMALL
    plot = (width - LEFT - RIGHT, height - TOP - 52)
    drawn = [heat_map([(share, "over"), (-share, "under")], key=f"load-{place}", size=plot)]
    count = load.shape[1]
    for expert in sorted({0, count // 4, count // 2, 3 * count // 4, count - 1}):
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
    drawn.append(_load_scale(width - RIGHT - 190, height - 22))
    even = 1 / count
    last = load[-max(1, len(load) // 10) :].sum(axis=0) / load[-max(1, len(load) // 10) :].sum()
    caption = (
        f"In the last tenth of the run the {count} experts took between {last.min() / even:.2f} and "
        f"{last.max() / even:.2f} times an even share of the tokens."
    )
    return Figure(f"Load of the experts in {name}", figure_svg(drawn, SMALL, f"expert load, {name}"), caption)


def _load_scale(x: float, y: float) -> Markup:
    steps = np.linspace(-1, 1, 33)[None, :]
    bar = heat_map([(steps, "over"), (-steps, "under")], key=f"scale-{x}-{y}", size=(90, 9), origin=(x + 50, y))
    text = Markup('<text class="tick {}" x="{}" y="{}">{}</text>')
    return bar + text.format("end", x + 44, y + 9, "half") + text.format("", x + 146, y + 9, "double")


def _raw_and_smooth(name: str, xs: list[float], ys: list[float], colour: int) -> list[Line]:
    return [Line(name, xs, ys, colour, faint=True), Line(name, xs, smooth(ys), colour)]


def _legend(lines: Sequence[Line]) -> list[tuple[str, str, str]]:
    return [(line.style, line.name, significant(line.ys[-1])) for line in lines if not line.faint]


def _resumes(record: Record) -> list[tuple[float, str]]:
    """Where later attempts went on, on the axis of tokens."""
    return [(row["tokens"], "resumed") for row in record.attempts if row["tokens"]]


def _key(key: str, factor: float = 1.0) -> Callable[[Row], float | None]:
    return lambda row: None if row.get(key) is None else row[key] * factor


def _waits(record: Record) -> Callable[[Row], float | None]:
    seconds = {row["step"]: taken for row, taken in zip(record.steps, record.step_seconds, strict=True)}

    def share(row: Row) -> float | None:
        taken, wait = seconds[row["step"]], row.get("data_wait_seconds")
        return None if not taken or wait is None else 100 * wait / taken

    return share


def _series(rows: Sequence[Row], value: Callable[[Row], float | None]) -> tuple[list[float], list[float]]:
    pairs = [(row["tokens"], y) for row in rows if (y := value(row)) is not None]
    return [x for x, _ in pairs], [y for _, y in pairs]
