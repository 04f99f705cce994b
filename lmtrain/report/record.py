"""What a run folder holds, read for its report. Pieces that are missing are None; damaged ones become a remark."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lmtrain.checkpoint import commit
from lmtrain.checkpoint.checkpointer import HASHER
from lmtrain.checkpoint.manifest import read_manifest
from lmtrain.checkpoint.storage import LocalStorage
from lmtrain.config.load import load
from lmtrain.config.recipe import Recipe
from lmtrain.config.render import render
from lmtrain.data.order.schedule import ScheduleLog
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import LmtrainError, UsageError, nearest
from lmtrain.plan.dry_run import embedding_rows
from lmtrain.report.words import cleaned
from lmtrain.train.environment import redact
from lmtrain.train.metrics import read_metrics

Row = dict[str, Any]


@dataclass
class Record:
    """A run folder as plain data, free of secrets.

    steps, evals: rows of metrics.jsonl (the timeline of the present). attempts: its rows of kind ``attempt``. recipe:
    None if this program cannot read it. remarks: a sentence per piece that is damaged.
    """

    path: Path
    steps: list[Row] = field(default_factory=list)
    evals: list[Row] = field(default_factory=list)
    attempts: list[Row] = field(default_factory=list)
    exits: list[Row] = field(default_factory=list)
    environment: Row | None = None
    summary: Row | None = None
    evaluation: Row | None = None
    export: Row | None = None
    schedule: ScheduleLog | None = None
    recipe: Recipe | None = None
    recipe_text: str | None = None
    remarks: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @cached_property
    def checkpoint(self) -> Path | None:
        """The newest checkpoint, not verified."""
        return next(iter(commit.committed(LocalStorage(), self.path / "checkpoints")), None)

    @cached_property
    def vocab_size(self) -> int | None:
        """Rows of the embedding: as the newest checkpoint has them, else as recipe and tokenizer say."""
        given = self.recipe.model.vocab_size if self.recipe else None
        try:
            if self.checkpoint is not None:
                tensors: Any = read_manifest(LocalStorage(), self.checkpoint, HASHER)["tensors"]
                return int(tensors["model.embed.weight"]["shape"][0])
            if self.recipe is not None and given is None:
                return embedding_rows(self.recipe.model, Tokenizer.load(self.recipe.data.tokenizer).vocab_size)
        except (LmtrainError, KeyError, OSError) as error:
            self.remarks.append(f"The size of the vocabulary is unknown: {error}")
        return given

    @cached_property
    def source_names(self) -> list[str]:
        """In the order of their ids, which gives each its colour; last those that only the metrics know."""
        named = list(self.recipe.data.sources) if self.recipe else []
        named += [name for event in (self.schedule.events if self.schedule else ()) for name in event.sources]
        seen = (key for row in self.steps for key in row if key.startswith("source_loss."))
        return list(dict.fromkeys([*named, *(key.removeprefix("source_loss.") for key in seen)]))

    @cached_property
    def step_seconds(self) -> list[float | None]:
        """How long each of ``steps`` took, from its tokens and its rate."""
        before = [0, *(row["tokens"] for row in self.steps)]
        return [
            (row["tokens"] - start) / row["tokens_per_second"] if row["tokens_per_second"] else None
            for row, start in zip(self.steps, before, strict=False)
        ]


def read_record(run_dir: Path) -> Record:
    """Everything a report says of ``run_dir``. UsageError if there is no run; DataError for damaged metrics."""
    if not any((run_dir / name).exists() for name in ("metrics.jsonl", "recipe.yaml", "environment.json")):
        beside = run_dir.parent if run_dir.parent.is_dir() else Path()
        runs = [path.parent.name for path in beside.glob("*/metrics.jsonl")]
        raise UsageError(f"{run_dir}: no run here{nearest(run_dir.name, runs)}")
    record = Record(run_dir)
    if (run_dir / "metrics.jsonl").exists():
        rows = cleaned(read_metrics(run_dir / "metrics.jsonl"))
        record.steps = [row for row in rows if row["kind"] == "step"]
        record.evals = [row for row in rows if row["kind"] == "eval"]
        record.attempts = [row for row in _lines(run_dir / "metrics.jsonl") if row.get("kind") == "attempt"]
    ended = [row for row in _lines(run_dir / "exits.jsonl") if isinstance(row.get("attempt"), int)]
    record.exits = cleaned(ended)
    record.environment = _json(record, "environment.json")
    record.summary = _json(record, "summary.json")
    record.evaluation = _json(record, "evaluation.json")
    record.export = _json(record, "export/lmtrain_export.json")
    _read_recipe(record)
    _read_schedule(record)
    return record


def _lines(source: Path) -> list[Row]:
    """The rows of a JSON Lines file; a line torn by a crash is skipped."""
    rows = []
    for line in source.read_text(encoding="utf-8", errors="replace").splitlines() if source.exists() else []:
        try:
            rows.append(dict(json.loads(line)))
        except ValueError:
            continue
    return rows


def _json(record: Record, name: str) -> Row | None:
    source = record.path / name
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        record.remarks.append(f"{name} could not be read: {error}")
        return None
    return cleaned(content) if isinstance(content, dict) else {"content": cleaned(content)}


def _read_recipe(record: Record) -> None:
    """The recipe with what every line means, or its text as it lies if this program cannot read it."""
    source = record.path / "recipe.yaml"
    if not source.exists():
        return
    try:
        record.recipe = load([f"recipe={source.absolute()}"]).recipe
        record.recipe_text = redact(render(record.recipe))
    except LmtrainError as error:
        record.remarks.append(f"recipe.yaml is shown as it is: {error}")
        record.recipe_text = redact(source.read_text(encoding="utf-8", errors="replace"))


def _read_schedule(record: Record) -> None:
    source = record.path / "schedule.jsonl"
    if not source.exists():
        return
    try:
        record.schedule = ScheduleLog.read(source)
    except LmtrainError as error:
        record.remarks.append(f"The mixture is left out: {error}")
