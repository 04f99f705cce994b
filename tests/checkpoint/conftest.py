"""What the checkpoint tests share: a small state, and saving it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lmtrain.checkpoint.checkpointer import Checkpointer
from lmtrain.checkpoint.config import CheckpointConfig


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Checkpointer]:
    """``make(storage=, keep_last=, ...)``: a Checkpointer of the run in tmp_path."""

    def build(run_dir: Path = tmp_path, storage: Any = None, start_id: str = "one", **cfg: Any) -> Checkpointer:
        settings = CheckpointConfig(**{"asynchronous": False, "keep_last": 9, **cfg})
        return Checkpointer(run_dir, settings, start_id=start_id, identity={"mesh": {"dp": 1}}, storage=storage)

    return build


@pytest.fixture
def state() -> Callable[[float], dict[str, torch.Tensor]]:
    def of(value: float) -> dict[str, torch.Tensor]:
        return {"model.w": torch.full((2, 3), value), "optimizer.step.w": torch.tensor(int(value))}

    return of


@pytest.fixture
def save(state: Callable[[float], dict[str, torch.Tensor]]) -> Callable[[Checkpointer, int], Path]:
    """``save(checkpointer, step)``: a checkpoint whose weights are all ``step``."""

    def run(checkpointer: Checkpointer, step: int) -> Path:
        checkpointer.save(step, state(step), {"loop": {"tokens": 10 * step}})
        checkpointer.wait()
        result = checkpointer.poll()
        assert result is not None and result.error is None, result
        return result.path

    return run
