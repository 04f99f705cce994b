"""What holds for the proposals of any policy that adapts: how often, how far, and between which bounds."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from lmtrain.data.policies.config import PolicyConfig
from lmtrain.data.policies.policy import MixPolicy, Progress, Run, shares, total_variation

log = logging.getLogger(__name__)


class Limited(MixPolicy):
    """``policy`` behind ``floor``, ``cap``, ``max_epochs``, ``min_change`` and ``every``; its state is the policy's.

    A source gets no share that, held to the end of the run, would read it more often than ``data.max_epochs``; where
    that is less than ``floor``, it wins.
    """

    def __init__(self, policy: MixPolicy, cfg: PolicyConfig, run: Run) -> None:
        super().__init__(cfg, policy.first, run)
        self.policy = policy
        self._cfg = cfg
        self._max_epochs = run.max_epochs

    def observe(self, step: int, tokens: Mapping[str, float], bits: Mapping[str, float]) -> None:
        self.policy.observe(step, tokens, bits)

    def propose(self, step: int, progress: Progress) -> dict[str, float] | None:
        if step % self.every or progress.done < self._cfg.start_tokens or progress.done >= progress.total:
            return None
        proposal = self.policy.propose(step, progress)
        if proposal is None:
            return None
        highest = {name: self._highest(name, progress) for name in proposal}
        floor = min(self._cfg.floor, 1 / len(proposal))
        lowest = {name: min(floor, high) for name, high in highest.items()}
        if sum(highest.values()) < 1:
            log.warning(
                "step %d: no mixture of %s keeps data.policy.cap %g and data.max_epochs %g to the end; it stays",
                step,
                ", ".join(proposal),
                self._cfg.cap,
                self._max_epochs,
            )
            return None
        bounded = between(proposal, lowest, highest)
        if total_variation(bounded, shares(progress.proposed)) < self._cfg.min_change:
            return None
        return bounded

    def _highest(self, name: str, progress: Progress) -> float:
        left = self._max_epochs * progress.available[name] - progress.tokens.get(name, 0)
        return min(max(left / (progress.total - progress.done), 0.0), self._cfg.cap)

    def plan(self) -> dict[str, float] | None:
        return self.policy.plan()

    def state_dict(self) -> dict[str, Any]:
        return self.policy.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.policy.load_state_dict(state)


def between(
    weights: Mapping[str, float], lowest: Mapping[str, float], highest: Mapping[str, float]
) -> dict[str, float]:
    """The shares that are proportional to ``weights`` wherever a bound does not hold them; they sum to 1.

    ``lowest`` must sum to at most 1 and ``highest`` to at least 1. What a bound cuts off or adds, the others share: a c
    is found for which the sum of clip(c w_i, lowest_i, highest_i) is 1.
    """
    smallest = 1e-12 * sum(weights.values())  # so that a weight of 0 can rise where all others are at their bound
    clean = {name: max(weight, smallest) for name, weight in weights.items()}

    def clipped(factor: float) -> dict[str, float]:
        return {name: min(max(factor * clean[name], lowest[name]), highest[name]) for name in clean}

    low, high = 0.0, 1 / min(clean.values())
    for _ in range(200):  # halving an interval of doubles ends long before
        middle = (low + high) / 2
        if sum(clipped(middle).values()) < 1:
            low = middle
        else:
            high = middle
    return clipped(high)
