"""A mixture by stages, decided in advance: steps, or ramps from one stage to the next."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from typing import Any

from lmtrain.data.order.weights import integer_weights
from lmtrain.data.policies.config import PolicyConfig
from lmtrain.data.policies.policy import MixPolicy, Progress, Run, shares
from lmtrain.errors import UsageError, nearest

RAMP_PARTS = 64
"""Parts of a ramp, each foreseen at its mean."""


class Staged(MixPolicy):
    """The mixture is a function of the tokens read; nothing is learnt.

    step: each stage from its start on; ramps: on the way from one start to the next, and constant after the last. A
    mixture set by a person stays until the next change of this function.
    """

    adapts = False

    def __init__(self, cfg: PolicyConfig, first: Mapping[str, float], run: Run) -> None:
        """UsageError for a stage whose phase or source is unknown, or that lies outside the run."""
        super().__init__(cfg, first, run)
        self._interpolation = cfg.interpolation or "step"
        if self._interpolation == "step":
            self.every = 1  # so that a stage begins with the step at which its tokens begin
        stages = {0: self.first}
        for name, stage in cfg.stages.items():
            key = f"data.policy.stages.{name}"
            for source in stage.weights:
                if source not in run.available:
                    raise UsageError(f"{key}.weights.{source}: no source{nearest(source, run.available)}")
            at = _start(f"{key}.at", stage.at, run)
            if at in stages:
                raise UsageError(f"{key}.at: another stage begins at {at:,} tokens too; give each its own place")
            stages[at] = shares(stage.weights)
        self._starts = sorted(stages)
        self._mixtures = [stages[at] for at in self._starts]
        self._total = run.total

    def observe(self, step: int, tokens: Mapping[str, float], bits: Mapping[str, float]) -> None:
        pass

    def propose(self, step: int, progress: Progress) -> dict[str, float] | None:
        if step % self.every and progress.done < self._starts[-1]:  # the last stage comes when it begins
            return None
        mixture = self.mixture(progress.done)
        same = integer_weights(mixture, sum(progress.proposed.values())) == progress.proposed
        return None if same else mixture

    def mixture(self, tokens: float) -> dict[str, float]:
        """Shares once ``tokens`` were read."""
        stage = bisect.bisect_right(self._starts, tokens) - 1
        before = self._mixtures[stage]
        if self._interpolation == "step" or stage + 1 == len(self._starts):
            return before
        start, end = self._starts[stage], self._starts[stage + 1]
        way = (tokens - start) / (end - start)
        if self._interpolation == "cosine":
            way = (1 - math.cos(math.pi * way)) / 2
        after = self._mixtures[stage + 1]
        names = {**before, **after}
        return shares({name: (1 - way) * before.get(name, 0.0) + way * after.get(name, 0.0) for name in names})

    def plan(self) -> dict[str, float]:
        read = dict.fromkeys((name for mixture in self._mixtures for name in mixture), 0.0)
        for stage, start in enumerate(self._starts):
            end = self._starts[stage + 1] if stage + 1 < len(self._starts) else self._total
            at_start, at_end = self._mixtures[stage], self.mixture(end)
            if self._interpolation == "step":
                at_end = at_start
            for name in read:  # both ramps are as often above the straight line as below: the mean is exact
                read[name] += (end - start) * (at_start.get(name, 0.0) + at_end.get(name, 0.0)) / 2
        return read

    def ahead(self, done: int) -> list[tuple[int, dict[str, float]]]:
        changes = []
        before = self.mixture(done)
        for stage, start in enumerate(self._starts):
            ramp = self._interpolation != "step" and stage + 1 < len(self._starts)
            end = self._starts[stage + 1] if ramp else start
            for part in range(RAMP_PARTS if ramp else 1):
                begins = start + (end - start) * part // RAMP_PARTS
                ends = start + (end - start) * (part + 1) // RAMP_PARTS
                if ramp and begins <= done < ends:
                    begins = done + 1
                mixture = self.mixture((begins + ends) / 2)
                if begins > done and mixture != before:
                    changes.append((begins, mixture))
                    before = mixture
        return changes

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def _start(key: str, at: int | float | str, run: Run) -> int:
    if isinstance(at, str):
        if at not in run.phases:
            has = "" if run.phases else "; this learning-rate schedule has no phases (train.schedule.kind=wsd has)"
            raise UsageError(f"{key}: no phase of the learning rate is named {at}{nearest(at, run.phases)}{has}")
        tokens = run.phases[at]
    else:
        tokens = round(at * run.total) if at < 1 else int(at)
    if not 0 < tokens < run.total:
        raise UsageError(f"{key}: begins at {tokens:,} of the run's {run.total:,} tokens; it must lie inside the run")
    return tokens
