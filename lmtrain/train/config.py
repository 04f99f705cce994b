"""Settings of the training loop: how much, how fast, with which optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lmtrain.data.config import DataConfig
from lmtrain.data.order.steps import Steps, check_ramp
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
    batch_ramp: list[tuple[int, int]] = field(default_factory=list)
    """Ramp of the batch: pairs [tokens read, tokens per step] from 0 tokens on; the last size is batch_tokens."""
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
        check_ramp("batch_ramp", self.batch_ramp, self.batch_tokens, "batch_tokens")

    def schedule_of(self, data: DataConfig) -> Steps:
        """Which blocks each step of the run reads. UsageError for a batch ramp that would cut runs."""
        return Steps(
            block_tokens=data.block_length,
            batch_tokens=self.batch_tokens,
            seq_len=data.seq_len,
            batch_ramp=self.batch_ramp,
            seq_lens=data.seq_lens,
            run_blocks=data.run_blocks,
        )

    def num_steps(self, data: DataConfig) -> int:
        """Steps of the whole run."""
        return self.steps if self.steps is not None else self.schedule_of(data).num_steps(self.tokens or 0)


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
