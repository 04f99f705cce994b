"""Settings of the training loop: how much, how fast, with which optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lmtrain.engine.optimizer import OptimizerConfig


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over tokens: linear warm-up, then cosine, or stable and a linear decay at the end (WSD)."""

    kind: Literal["cosine", "wsd"] = "cosine"
    """cosine: half a cosine from the peak to the floor; wsd: the peak, then a linear decay to the floor."""
    warmup_tokens: int = 0
    """Tokens of linear warm-up from 0."""
    decay_tokens: int | None = None
    """wsd: tokens of the final decay; default a fifth of the run."""
    min_ratio: float = 0.1
    """Floor as a fraction of the peak."""


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases, a view of metrics.jsonl. Offline without a key; a failure never stops training."""

    enabled: bool = False
    """Send metrics to wandb."""
    project: str = "lmtrain"
    """wandb project."""


@dataclass(frozen=True)
class TrainConfig:
    """How the model is trained. Exactly one of ``steps`` and ``tokens`` is given."""

    batch_tokens: int
    """Tokens per optimizer step over all ranks."""
    lr: float
    """Peak learning rate."""
    steps: int | None = None
    """Optimizer steps of the whole run."""
    tokens: int | None = None
    """Tokens of the whole run, rounded up to whole steps."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer settings."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning-rate schedule."""
    z_loss: float = 0.0
    """Weight of the squared log-partition of the output (PaLM uses 1e-4)."""
    max_skipped: int = 3
    """Non-finite steps in a row after which the run ends as unhealthy (exit 76)."""
    log_every: int = 1
    """Optimizer steps between console lines; metrics.jsonl has every step."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""

    def __post_init__(self) -> None:
        for key in ("batch_tokens", "steps", "tokens", "max_skipped", "log_every"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key}: must be at least 1, got {value}")
        if self.lr <= 0:
            raise ValueError(f"lr: must be positive, got {self.lr}")
        if self.z_loss < 0:
            raise ValueError(f"z_loss: must not be negative, got {self.z_loss}")


@dataclass(frozen=True)
class EvalConfig:
    """Held-out bits per byte during training."""

    every: int = 0
    """Optimizer steps between evaluations; 0: only at the end, if a source has held-out documents."""
    max_tokens: int | None = None
    """Score at most this many held-out tokens of each source; null: all."""
    sample_prompt: str | None = None
    """Text to continue at each evaluation, kept in metrics.jsonl; null: none."""
    sample_tokens: int = 64
    """Tokens of each continuation."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"every: must not be negative, got {self.every}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens: must be at least 1, or null for all, got {self.max_tokens}")
