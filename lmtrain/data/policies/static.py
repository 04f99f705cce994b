"""Mixtures that do not change: by weights, in proportion to size, tempered, or UniMax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmtrain.data.policies.config import PolicyConfig
from lmtrain.data.policies.policy import MixPolicy, Progress, Run, shares
from lmtrain.errors import UsageError

UNIMAX_EPOCHS = 4.0
"""Up to here, repeated text is worth nearly as much as new text (Muennighoff et al., arXiv 2305.16264)."""


class Static(MixPolicy):
    """The first mixture stays."""

    adapts = False

    def __init__(self, cfg: PolicyConfig, first: Mapping[str, float], run: Run) -> None:
        super().__init__(cfg, first, run)
        self._total = run.total

    def observe(self, step: int, tokens: Mapping[str, float], bits: Mapping[str, float]) -> None:
        pass

    def propose(self, step: int, progress: Progress) -> dict[str, float] | None:
        return None

    def plan(self) -> dict[str, float]:
        return {name: share * self._total for name, share in self.first.items()}

    def ahead(self, done: int) -> list[tuple[int, dict[str, float]]]:
        return []

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def first_mixture(cfg: PolicyConfig, weights: Mapping[str, float], run: Run) -> dict[str, float]:
    """Shares at block 0: ``weights`` themselves, or by the size of the sources whose weight is not 0."""
    if not any(weight > 0 for weight in weights.values()):
        raise UsageError("data.sources: every weight is 0; give at least one source a positive weight")
    if cfg.first == "weights":
        return shares(weights)
    sizes = {name: run.available[name] for name, weight in weights.items() if weight > 0}
    if cfg.first == "unimax":
        return shares(unimax(sizes, run.total, UNIMAX_EPOCHS if cfg.epochs is None else cfg.epochs))
    tau = 1.0 if cfg.tau is None else cfg.tau
    return shares({name: size ** (1 / tau) for name, size in sizes.items()})


def unimax(sizes: Mapping[str, float], total: float, epochs: float) -> dict[str, float]:
    """Tokens by source: as equal as ``epochs`` passes over each allow (UniMax, arXiv 2304.09151, algorithm 1).

    sizes: tokens of each source. Raises UsageError if ``epochs`` passes over everything are fewer than ``total``.
    """
    if epochs * sum(sizes.values()) < total:
        raise UsageError(
            f"data.policy.epochs: {epochs:g} epochs of all sources are {epochs * sum(sizes.values()):,.0f} tokens, the "
            f"run has {total:,}; add text, train on less, or allow more epochs"
        )
    budgets: dict[str, float] = {}
    left = float(total)
    for place, name in enumerate(sorted(sizes, key=lambda name: sizes[name])):
        budgets[name] = min(epochs * sizes[name], left / (len(sizes) - place))
        left -= budgets[name]
    return budgets
