"""Where a run executes: the mesh and what each rank does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; -1 fills what the world leaves over (at most one axis)."""

    pp: int = 1
    """Pipeline stages."""
    dp_replicate: int = 1
    """Replicas of the sharded model (HSDP)."""
    dp_shard: int = -1
    """Ranks over which parameters, gradients and optimizer state are sharded, besides sp."""
    sp: int = 1
    """Ranks over which each sequence is cut."""
    tp: int = 1
    """Tensor parallelism."""
    ep: int = 1
    """Expert parallelism; re-cuts dp_shard x sp."""


@dataclass(frozen=True)
class ClusterConfig:
    """Where and how: never changes what is trained."""

    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Mesh axes."""
    microbatch: int | None = None
    """Rows per forward pass and data-parallel rank; default: as many as the step has for a rank, at most 8."""
    fsdp_units: Literal["root", "branch"] = "branch"
    """What is gathered at once: the whole model (fast when small) or one branch after another (little memory)."""
    activation_checkpointing: bool = False
    """Recompute each branch in the backward pass instead of keeping its activations."""
    kernels: str = "auto"
    """auto, or a backend by name (reference, cpu): refused where it does not exist."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Compute dtype; master weights stay fp32 (fp64 under float64). auto: bfloat16 where the device is fast in it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda if torch sees a GPU, else cpu."""
    sp_attention: Literal["auto", "heads", "gather"] = "auto"
    """Softmax attention under sp: head all-to-all where heads divide, or gathered K/V."""
    engine: Literal["fsdp"] = "fsdp"
    """Engine that steps the model."""
    workers: int = 0
    """Loader processes per rank; 0 reads in the training process."""

    def __post_init__(self) -> None:
        if self.microbatch is not None and self.microbatch < 1:
            raise ValueError(f"microbatch: must be at least 1 row, got {self.microbatch}")
        if self.workers < 0:
            raise ValueError(f"workers: must not be negative, got {self.workers}")
