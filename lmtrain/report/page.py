"""``runs/<name>/report.html``: one file that explains a run to a stranger, offline, in a light or dark browser."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from lmtrain import __version__
from lmtrain.errors import StorageError
from lmtrain.report import figures
from lmtrain.report.experts import experts
from lmtrain.report.mixture import mixture
from lmtrain.report.pictures import pictures
from lmtrain.report.record import Record, Row, read_record
from lmtrain.report.words import Table, duration, listing, moment, quantity, significant, tables, value_text
from lmtrain.train.environment import redact

NAME = "report.html"
VERDICTS = {
    0: ("finished", "good"),
    64: ("refused: usage or settings", "bad"),
    65: ("data or checkpoint does not verify", "bad"),
    70: ("internal error", "bad"),
    74: ("no space, or an input/output error", "bad"),
    75: ("stopped, can be resumed", "fair"),
    76: ("unhealthy", "bad"),
    130: ("interrupted", "bad"),
}
"""Exit codes of a worker (docs/formats.md) in words, and how good that is."""
HOW_EVALUATED = ("settings", "versions", "kernels")
"""Keys of evaluation.json that hold no result."""
HOW = "How it was evaluated"
UNTOLD = ("no exit recorded: still running, or killed", "fair")


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the report of ``run_dir`` to ``out``, by default ``run_dir/report.html``; the path written.

    UsageError if there is no run; DataError if its metrics are damaged; StorageError if the file cannot be written.
    """
    target = run_dir / NAME if out is None else out
    text = render_page(read_record(run_dir))
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, target)
    except OSError as error:
        raise StorageError(f"{target}: cannot be written: {error.strerror}") from error
    return target


def render_page(record: Record) -> str:
    """The page as text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    maps, no_maps = pictures(record)
    return environment.get_template("page.html").render(
        record=record,
        status=_status(record),
        headline=headline(record),
        tiles=_tiles(record),
        learning=figures.learning(record),
        mixture=mixture(record),
        health=figures.health(record),
        experts=experts(record),
        evaluation=_evaluation(record.evaluation),
        summary=tables(record.summary or {}),
        samples=_samples(record),
        maps=maps,
        no_maps=redact(no_maps),
        attempts=_attempts(record),
        skipped=_skipped(record),
        export=tables(record.export or {}),
        recipe=[line.partition("  # ") for line in (record.recipe_text or "").splitlines()],
        settings=tables(record.environment or {}),
        version=__version__,
    )


def headline(record: Record) -> list[str]:
    """Sentences: what was trained, how long, and what came of it."""
    return [sentence for sentence in (_what(record), _how_long(record), _result(record)) if sentence]


def _what(record: Record) -> str:
    recipe = record.recipe
    if recipe is None:
        return ""
    kinds = Counter(recipe.model.branches[name].kind for name in recipe.model.order())
    mixed = listing([f"{count} {kind}" for kind, count in kinds.items()])
    size = "A model"
    if record.vocab_size is not None:
        total = recipe.model.num_params(record.vocab_size)
        active = recipe.model.num_params(record.vocab_size, active=True)
        size += f" of {quantity(total)} parameters" + (
            f" ({quantity(active)} used per token)" if active != total else ""
        )
    return f"{size}: {sum(kinds.values())} residual branches ({mixed}) of width {recipe.model.d_model:,}."


def _how_long(record: Record) -> str:
    if not record.steps:
        return "No optimizer step is recorded."
    last = record.steps[-1]
    seconds = sum(taken for taken in record.step_seconds if taken)
    hardware = (record.environment or {}).get("hardware") or {}
    world = int(((record.environment or {}).get("variables") or {}).get("WORLD_SIZE", 1))
    where = hardware.get("gpu") or hardware.get("cpu")
    processes = f"{world} process{'es' if world > 1 else ''}"
    place = (
        f" on {processes} ({where['name'] if isinstance(where, Mapping) and 'name' in where else where})"
        if where
        else ""
    )
    return (
        f"It read {quantity(last['tokens'])} tokens in {last['step']:,} steps, which took {duration(seconds)}{place}"
        + (f", in {len(record.attempts)} attempts." if len(record.attempts) > 1 else ".")
    )


def _result(record: Record) -> str:
    scores = [row["heldout_bpb"] for row in record.evals if row.get("heldout_bpb") is not None]
    if not scores:
        losses = [row["loss"] for row in record.steps if row.get("loss") is not None]
        return f"The training loss of the last step is {losses[-1]:.3f} nats per token." if losses else ""
    end = scores[-1]
    text = f"Text it has never seen costs it {end:.3f} bits per byte"
    text += f", down from {scores[0]:.3f}" if len(scores) > 1 and scores[0] > end else ""
    bars = figures.baselines(record)
    words = [
        ("below", [f"{name} ({value:.2f})" for name, value in bars.items() if end < value]),
        ("not yet below", [f"{name} ({value:.2f})" for name, value in bars.items() if end >= value]),
    ]
    told = [f"{word} {listing(names)}" for word, names in words if names]
    return text + (": " + ", ".join(told) if told else "") + "."


def _status(record: Record) -> tuple[str, str]:
    """The verdict of the newest attempt, and how good it is."""
    newest = record.attempts[-1]["attempt"] if record.attempts else None
    if not record.exits or (newest is not None and record.exits[-1]["attempt"] < newest):
        return UNTOLD
    return _verdict(record.exits[-1])


def _verdict(row: Row) -> tuple[str, str]:
    code = row.get("code")
    known = VERDICTS.get(code) if isinstance(code, int) else None
    return known or (f"exit code {code}", "bad")


def _tiles(record: Record) -> list[tuple[str, str, str]]:
    """The few numbers one looks for first: label, number, unit."""
    made = []
    scores = [row["heldout_bpb"] for row in record.evals if row.get("heldout_bpb") is not None]
    if scores:
        made.append(("held-out text", f"{scores[-1]:.3f}", "bits per byte"))
    if record.steps:
        last, seconds = record.steps[-1], [taken for taken in record.step_seconds if taken]
        made.append(
            ("training loss, last step", significant(last["loss"]) if last["loss"] else "none", "nats per token")
        )
        made.append(("read", quantity(last["tokens"]), "tokens"))
        made.append(("steps", f"{last['step']:,}", duration(sum(seconds)) + " of steps" if seconds else ""))
        rates = sorted(row["tokens_per_second"] for row in record.steps if row["tokens_per_second"])
        made += [("speed, median", quantity(rates[len(rates) // 2]), "tokens per second")] if rates else []
    if record.recipe is not None and record.vocab_size is not None:
        made.append(("size", quantity(record.recipe.model.num_params(record.vocab_size)), "parameters"))
    return made


def _evaluation(content: Row | None) -> list[Table]:
    """A table per task, whatever the tasks are; the last one says how they were run."""
    results: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    for key, value in (content or {}).items():
        if key in ("tasks", "results") and isinstance(value, Mapping):
            results |= {name: part if isinstance(part, Mapping) else {"value": part} for name, part in value.items()}
        elif isinstance(value, Mapping) and key not in HOW_EVALUATED:
            results[key] = value
        else:
            facts[key] = value
    made = [table for name, metrics in results.items() for table in tables(metrics, str(name))]
    return [*made, Table(HOW, [row for table in tables(facts) for row in table.rows])] if content else []


def _samples(record: Record) -> list[Row]:
    """Early, middle and late text, as far as there are three."""
    rows = [row for row in record.evals if isinstance(row.get("sample"), str)]
    picked = sorted({0, (len(rows) - 1) // 2, len(rows) - 1}) if rows else []
    return [rows[index] for index in picked]


def _skipped(record: Record) -> str:
    """Which steps did not count, in a sentence; empty if all did."""
    rows = [row for row in record.steps if row.get("skipped") or row.get("nonfinite")]
    named = [f"step {row['step']}" + (f" ({row['skipped']})" if row.get("skipped") else "") for row in rows[:8]]
    more = f", and {len(rows) - 8} more" if len(rows) > 8 else ""
    return f"Skipped or not finite: {', '.join(named)}{more}." if rows else ""


def _attempts(record: Record) -> list[list[str]]:
    """Rows of the table of attempts: number, began, from step, to step, took, ended, in its own words."""
    exits = {row["attempt"]: row for row in record.exits}
    begun = {row["attempt"]: row for row in record.attempts}
    rows = []
    for attempt in sorted(exits.keys() | begun.keys()):
        start, end = begun.get(attempt, {}), exits.get(attempt, {})
        times = (start.get("time_unix"), end.get("time_unix"))
        took = duration(times[1] - times[0]) if times[0] is not None and times[1] is not None else "unknown"
        verdict = (_verdict(end) if end else UNTOLD)[0]
        steps = [value_text(row.get("step")) for row in (start, end)]
        rows.append([str(attempt), moment(times[0]), *steps, took, verdict, str(end.get("reason", ""))])
    return rows
