"""Settings of the mixture: what a run begins with, and who may change it while it trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["static", "staged", "odm_exp3", "odm_smoothed", "ado", "excess"]


@dataclass(frozen=True)
class StageConfig:
    """One stage of a staged mixture."""

    at: int | float | str
    """Where it begins: tokens (20e6), a fraction of the run (0.8), or a phase of the learning rate (decay)."""
    weights: dict[str, float]
    """Weights by source from there on; a source that is not named is not read."""

    def __post_init__(self) -> None:
        if not isinstance(self.at, str) and not (0 < self.at < 1 or (self.at > 1 and self.at % 1 == 0)):
            raise ValueError(
                f"at: must be whole tokens (more than 1), a fraction between 0 and 1, or a phase; got {self.at}"
            )
        if not any(weight > 0 for weight in self.weights.values()):
            raise ValueError("weights: every weight is 0; give at least one source a positive weight")
        for name, weight in self.weights.items():
            if weight < 0:
                raise ValueError(f"weights.{name}: must not be negative, got {weight}")


@dataclass(frozen=True)
class PolicyConfig:
    """The mixture of a run: its first weights, and the policy that proposes others. All weights are in tokens."""

    kind: Kind = "static"
    """static: the first mixture stays; staged: stages; odm_exp3, odm_smoothed, ado, excess: from the losses seen."""
    first: Literal["weights", "proportional", "temperature", "unimax"] = "weights"
    """First mixture: data.sources.*.weight, or by tokens available: T, T^(1/tau), equal up to a cap of epochs."""
    tau: float | None = None
    """temperature: 1 is proportional, larger is flatter."""
    epochs: float | None = None
    """unimax: cap on the epochs of a source; default 4."""
    every: int = 100
    """Optimizer steps between two proposals."""
    stages: dict[str, StageConfig] = field(default_factory=dict)
    """staged: stages by name, after the first mixture."""
    interpolation: Literal["step", "linear", "cosine"] | None = None
    """staged: how one stage becomes the next; default step. linear and cosine reach a stage's weights at its start."""
    start_tokens: int = 0
    """Adaptive: targets before which nothing is learnt and nothing proposed."""
    floor: float = 0.01
    """Adaptive: smallest share of a source."""
    cap: float = 1.0
    """Adaptive: largest share of a source."""
    min_change: float = 1e-3
    """Adaptive: a proposal nearer to the last one (total variation) is dropped."""
    reference: str | None = None
    """excess: JSON file with the reference's bits per byte by source and tokens (docs/data.md)."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every: must be at least 1, got {self.every}")
        if self.start_tokens < 0:
            raise ValueError(f"start_tokens: must not be negative, got {self.start_tokens}")
        if not 0 <= self.floor < self.cap <= 1:
            raise ValueError(f"floor: must be at least 0 and below cap, cap at most 1, got {self.floor} and {self.cap}")
        if not 0 <= self.min_change < 1:
            raise ValueError(f"min_change: must be at least 0 and below 1, got {self.min_change}")
        self._belongs("tau", self.tau is not None, f"first: {self.first}", self.first == "temperature", True)
        self._belongs("epochs", self.epochs is not None, f"first: {self.first}", self.first == "unimax", False)
        self._belongs("stages", bool(self.stages), f"kind: {self.kind}", self.kind == "staged", True)
        self._belongs(
            "interpolation", self.interpolation is not None, f"kind: {self.kind}", self.kind == "staged", False
        )
        self._belongs("reference", self.reference is not None, f"kind: {self.kind}", self.kind == "excess", True)
        for key in ("tau", "epochs"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                raise ValueError(f"{key}: must be positive, got {value}")

    @staticmethod
    def _belongs(key: str, given: bool, choice: str, applies: bool, required: bool) -> None:
        if given and not applies:
            raise ValueError(f"{key}: does not apply to {choice}; remove it")
        if applies and required and not given:
            raise ValueError(f"{key}: missing; {choice} needs it")
