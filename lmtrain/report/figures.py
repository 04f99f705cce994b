"""Which figures a run has: from rows of metrics.jsonl to charts, each with a sentence that says what one sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup

from lmtrain.report.chart import Line, line_chart, smooth, window
from lmtrain.report.record import Record, Row
from lmtrain.report.words import listing, quantity, short, significant

LARGE, SMALL = (640, 320), (640, 260)
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
    lines: list[Line] = []
    for number, name in enumerate(record.source_names):
        xs, ys = _series(record.steps, _key(f"source_loss.{name}"))
        curves = _raw_and_smooth(name, xs, ys, number) if xs else []
        lines += curves if len(record.source_names) <= MOST_RAW else curves[1:]
    ends = sorted((line.ys[-1], line.name) for line in lines if not line.faint)
    if len(ends) < 2:
        return None
    caption = f"Of the sources, {ends[0][1]} ends with the lowest loss, {significant(ends[0][0])} nats per token, "
    caption += f"and {ends[-1][1]} with the highest, {significant(ends[-1][0])}."
    svg = line_chart(lines, x_label="tokens", y_label="loss, nats per token")
    return Figure("Training loss by source", svg, caption, legend(lines))


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
    at_start = f", {first:.3f} at the start" if len(lines[0].ys) > 1 else ""
    caption = f"Held-out text costs {last:.3f} bits per byte at the end{at_start}"
    beaten = [name for name, value in baselines(record).items() if last < value]
    caption += f"; below the dotted lines of {listing(beaten)}." if beaten else "."
    svg = line_chart(lines, x_label="tokens", y_label="bits per byte", rules=rules)
    return Figure("Held-out text", svg, caption, legend(lines))


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


def _raw_and_smooth(name: str, xs: list[float], ys: list[float], colour: int) -> list[Line]:
    return [Line(name, xs, ys, colour, faint=True), Line(name, xs, smooth(ys), colour)]


def legend(lines: Sequence[Line]) -> list[tuple[str, str, str]]:
    """CSS classes, name and last value of every curve."""
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
