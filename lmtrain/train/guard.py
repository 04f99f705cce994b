"""Watches for steps that had to be skipped and ends a run that does not recover."""

from __future__ import annotations

import math
from typing import Any

from lmtrain.errors import UnhealthyError


class SkipGuard:
    """Counts skipped steps in a row; the ``max_skipped``-th raises UnhealthyError. Its state belongs in the checkpoint.

    A skipped or non-finite step never touches ``last_loss``: one NaN in a statistic would outlive its cause.
    """

    def __init__(self, max_skipped: int) -> None:
        self.max_skipped = max_skipped
        self.in_a_row: list[int] = []
        self.total = 0
        self.last_step: int | None = None
        self.last_loss: float | None = None

    def observe(self, step: int, loss: float, skipped: str | None) -> None:
        """Takes in a finished step: its mean loss, and why it was skipped (StepInfo.skipped) or None."""
        if skipped is None and not math.isfinite(loss):
            skipped = "non-finite loss"
        if skipped is None:
            self.in_a_row, self.last_step, self.last_loss = [], step, loss
            return
        self.in_a_row.append(step)
        self.total += 1
        if len(self.in_a_row) >= self.max_skipped:
            last = "none" if self.last_step is None else f"{self.last_loss:.4f} at step {self.last_step}"
            raise UnhealthyError(
                f"steps {', '.join(map(str, self.in_a_row))} were skipped ({skipped}); last accepted loss: {last}. "
                "Look at grad_norm in metrics.jsonl before these steps; a lower train.lr or a longer warm-up may help"
            )

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "in_a_row": list(self.in_a_row),
            "total": self.total,
            "last_step": self.last_step,
            "last_loss": self.last_loss,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what ``state_dict`` returned."""
        self.in_a_row = list(state["in_a_row"])
        self.total, self.last_step, self.last_loss = state["total"], state["last_step"], state["last_loss"]
