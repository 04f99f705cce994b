"""Rank 0's records of a run: metrics.jsonl, and its views on the console and in wandb."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lmtrain.checkpoint.checkpointer import SaveResult
from lmtrain.train.console import Console, scaled, sources_line
from lmtrain.train.metrics import MetricsLog
from lmtrain.train.run_folder import RunFolder
from lmtrain.train.wandb_view import WandbView


@dataclass
class Recorder:
    """Every row goes to metrics.jsonl first; console and wandb show the same row.

    How far each source is, the console says with every evaluation, and with a checkpoint that has none.
    """

    folder: RunFolder
    metrics: MetricsLog
    console: Console
    wandb: WandbView
    _last: Mapping[str, Any] = field(init=False, default_factory=dict)
    _told: int = field(init=False, default=0)

    def step(self, step: int, tokens: int, values: Mapping[str, Any], seconds: float) -> None:
        row = self.metrics.step(step, tokens, values)
        self.console.step(row, seconds)
        self.wandb.log(row)
        self._last = row

    def evaluation(self, step: int, tokens: int, values: Mapping[str, float], sample: Mapping[str, str]) -> None:
        row = self.metrics.evaluation(step, tokens, {**values, **sample})
        parts = "  ".join(f"{key.removeprefix('heldout_bpb.')} {value:.4f}" for key, value in values.items())
        self.console.note(f"held-out bits per byte after step {step}: {parts.replace('heldout_bpb', 'all')}")
        self._tell_sources(step)
        self.wandb.log(row)

    def saved(self, result: SaveResult) -> None:
        if result.error is None:
            size = scaled(result.bytes, 1024)
            self.console.note(f"checkpoint {result.path.name}: {size} in {result.seconds:.1f} s")
            self._tell_sources(result.step)
        else:
            self.console.note(f"WARNING: no checkpoint of step {result.step}: {result.error}; training goes on")

    def _tell_sources(self, step: int) -> None:
        if self._last and step > self._told:
            self._told = self._last["step"]
            self.console.note(sources_line(self._last))

    def close(self) -> None:
        self.metrics.close()
        self.wandb.close()
        self.console.close()
