"""Peak memory of one rank before anything is built: an estimate that names its parts, not a promise.

What is kept per rank: master weights, gradients and the two AdamW moments over the shards; what is gathered at once;
the activations of one micro-batch; the logits of the tokens that the loss takes at once. Left out: the CUDA context and
NCCL (1-3 GB on a GPU), the allocator's fragmentation (5-10 %), Python and torch themselves, and the loader.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from lmtrain.model.answers import Answers
from lmtrain.model.branch import branch_class
from lmtrain.model.config import ModelConfig
from lmtrain.ops.linear_cross_entropy import CHUNK
from lmtrain.parallel.config import ClusterConfig, MeshConfig

KEPT = {"token": 1.2, "scan": 2.1, "heads": 1.2, "serial": 2.1}
"""Values a branch keeps for the backward pass, per token and per column of its projections (parameters / d_model), by
``Branch.sp``. Measured with saved-tensor hooks on the backends that ``kernels=auto`` takes for fp32 on a CPU, to which
tests/plan hold the estimate for attention and Mamba-2. Mamba, Longhorn, RG-LRU, LRNN and LSTM were measured at 0.4 to 2
times it, the other mixers not. The reference ops keep several times as much: attention its scores, ssd its decays."""
LOGIT_COPIES = 3
"""fp32 copies of a chunk's logits alive at once: themselves (or their cast), the softmax, the gradient."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by what holds them."""

    parameters: int
    """Master weights, sharded."""
    gradients: int
    """Reduced gradients, sharded."""
    optimizer: int
    """Both AdamW moments, sharded."""
    gathered: int
    """Whole parameters and unreduced gradients of the unit at work."""
    activations: int
    """Kept for the backward pass of one micro-batch."""
    logits: int
    """Logits, softmax and gradient of the tokens that the loss takes at once."""
    carried: int
    """State that the rows of a step hand to those of the next (data.run_blocks)."""

    @property
    def peak(self) -> int:
        """Their sum: the start of the backward pass, with gradients of earlier micro-batches held."""
        return sum(dataclasses.astuple(self))


def estimate(
    model: ModelConfig,
    vocab_size: int,
    seq_len: int,
    *,
    mesh: MeshConfig,
    cluster: ClusterConfig,
    microbatch: int,
    dtype: torch.dtype,
    carried_rows: int = 0,
    run_blocks: int = 1,
) -> Memory:
    """Memory of one rank of a resolved ``mesh`` that runs ``microbatch`` rows at a time in ``dtype``.

    carried_rows: rows whose state, of up to ``run_blocks`` rows one after the other, is held from step to step.
    """
    master = 8 if dtype == torch.float64 else 4
    total = model.num_params(vocab_size)
    shard = -(-total // (mesh.dp_shard * mesh.sp)) * master
    columns = microbatch * seq_len // mesh.sp
    wide = max(master, dtype.itemsize)
    run = seq_len * run_blocks  # a window of attention may be longer than a row
    return Memory(
        parameters=shard,
        gradients=shard,
        optimizer=2 * shard,
        gathered=2 * _gathered_params(model, total, cluster) * dtype.itemsize,
        activations=columns * _kept_per_token(model, cluster.activation_checkpointing) * wide,
        logits=LOGIT_COPIES * min(CHUNK, columns) * vocab_size * wide,
        carried=sum(model.branches[name].state_bytes(model.d_model, carried_rows, run) for name in model.order())
        * (master // 4),  # told for fp32
    )


def _gathered_params(model: ModelConfig, total: int, cluster: ClusterConfig) -> int:
    """Parameters that are whole on a rank at once: all; or embedding and head, and two branches (one is prefetched)."""
    if cluster.fsdp_units == "root":
        return total
    sizes = sorted((model.branches[name].num_params(model.d_model) for name in model.order()), reverse=True)
    return total - sum(sizes) + sum(sizes[:2])


def _kept_per_token(model: ModelConfig, checkpointing: bool) -> int:
    """Values per token: every branch's input and inner ones; recomputed branches keep theirs one at a time."""
    inner = [branch_values(model.branches[name], model.d_model) for name in model.order()]
    residual = 2 * model.d_model  # the block's input and its normalised copy
    if checkpointing:
        return len(inner) * model.d_model + residual + max(inner)
    return sum(inner) + len(inner) * residual


def branch_values(settings: Any, d_model: int) -> int:
    """Values one branch keeps per token, besides its input."""
    told = settings.kept_values(d_model) if isinstance(settings, Answers) else None
    if told is not None:
        return told
    return round(KEPT[branch_class(settings.kind).sp] * settings.num_params(d_model, active=True) / d_model)
