"""Weights & Biases as a view of metrics.jsonl: whatever goes wrong in it, training goes on."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lmtrain.train.config import WandbConfig

INIT_SECONDS = 60
FINISH_SECONDS = 60


class WandbView:
    """Sends rows of metrics.jsonl to wandb, one wandb run per attempt, grouped by the run's name. Rank 0 makes it.

    wandb is imported here and nowhere else. Mode: WANDB_MODE if set, else online with WANDB_API_KEY, else offline.
    ``config`` is the recipe without secrets. The first exception is told to ``warn`` in one line and ends the view.
    """

    def __init__(
        self, cfg: WandbConfig, folder: Path, attempt: int, config: Mapping[str, Any], warn: Callable[[str], None]
    ) -> None:
        self._warn = warn
        self._run: Any = None
        if cfg.enabled:
            self._guarded(lambda: self._start(cfg, folder, attempt, config))

    def log(self, row: Mapping[str, Any]) -> None:
        """Sends a row that MetricsLog has returned."""
        values = {key: value for key, value in row.items() if key != "kind" and value is not None}
        if self._run is not None:
            self._guarded(lambda: self._run.log(values))

    def close(self) -> None:
        """Ends the wandb run; waits for an upload a minute at most."""
        if self._run is not None:
            self._guarded(lambda: self._run.finish())
            self._run = None

    def _start(self, cfg: WandbConfig, folder: Path, attempt: int, config: Mapping[str, Any]) -> None:
        import wandb

        name = folder.resolve().name
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        # Its console capture would come between a terminal and the progress bar.
        settings = wandb.Settings(
            console="off",
            silent=True,
            init_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=False,
        )
        self._run = wandb.init(
            project=cfg.project,
            dir=folder,
            group=name,
            name=f"{name}.{attempt}",
            mode=mode,
            config=dict(config),
            settings=settings,
        )
        # wandb drops rows whose own step does not grow; an evaluation shares its step with a training step.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._run = None
            self._warn(f"wandb is off for this attempt: {type(error).__name__}: {error} (metrics.jsonl goes on)")
