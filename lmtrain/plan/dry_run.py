"""What a run would be, from its settings alone: sizes, FLOPs, memory and mesh, with nothing built or started."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import torch

from lmtrain.data.config import DataConfig
from lmtrain.data.sources import check_sources
from lmtrain.errors import UsageError
from lmtrain.model.config import ModelConfig
from lmtrain.parallel.config import ClusterConfig, MeshConfig
from lmtrain.parallel.mesh import AXES, resolve
from lmtrain.parallel.supported import check
from lmtrain.plan.memory import estimate
from lmtrain.train.config import TrainConfig
from lmtrain.train.hardware import resolve_dtype

FORMAT_VERSION = 1
MOST_ROWS = 8


def summary(
    model: ModelConfig,
    data: DataConfig,
    train: TrainConfig,
    cluster: ClusterConfig,
    *,
    world_size: int,
    tokenizer_size: int | None,
) -> dict[str, Any]:
    """The dry run as plain data (docs/formats.md). What depends on the vocabulary is None while that is unknown;
    ``warnings`` are for whoever opens the data.

    tokenizer_size: largest token id + 1, None if there is no tokenizer yet; ``model.vocab_size`` needs none.
    Raises UsageError for a mesh, a combination or a batch that cannot work in this world.
    """
    mesh = resolve(cluster.mesh, world_size)
    check(model, seq_len=data.seq_len, cluster=cluster, mesh=mesh, run_blocks=data.run_blocks)
    rows = rows_per_pass(data, train, cluster, mesh)
    vocab_size = embedding_rows(model, tokenizer_size)
    memory = None
    if vocab_size is not None:
        dtype = resolve_dtype(cluster.dtype, _device(cluster))
        largest = max(train.batch_tokens, *(size for _, size in train.batch_ramp), 0) // data.seq_len
        memory = estimate(
            model,
            vocab_size,
            data.seq_len,
            mesh=mesh,
            cluster=cluster,
            microbatch=rows,
            dtype=dtype,
            carried_rows=largest // (mesh.dp_replicate * mesh.dp_shard) if data.run_blocks > 1 else 0,
            run_blocks=data.run_blocks,
        )
    return {
        "format_version": FORMAT_VERSION,
        "num_params": None if vocab_size is None else model.num_params(vocab_size),
        "num_active_params": None if vocab_size is None else model.num_params(vocab_size, active=True),
        "flops_per_token": None if vocab_size is None else model.flops_per_token(vocab_size, data.seq_len),
        "peak_bytes": None if memory is None else memory.peak,
        "mesh": {axis: getattr(mesh, axis) for axis in (*AXES, "ep")},
        "tokens_per_step": train.batch_tokens,
        "steps": train.num_steps(data),
        "vocab_size": vocab_size,
        "microbatch": rows,
        "memory": None if memory is None else dataclasses.asdict(memory),
        "branches": _branches(model, data.seq_len),
        "missing": check_sources(data),
        "warnings": [],
    }


def embedding_rows(model: ModelConfig, tokenizer_size: int | None) -> int | None:
    """Rows of the embedding: as the model says, else the tokenizer's size rounded up; None if neither is known.

    Raises UsageError if the tokenizer makes ids the embedding has no row for.
    """
    if model.vocab_size is None:
        return None if tokenizer_size is None else -(-tokenizer_size // model.vocab_multiple) * model.vocab_multiple
    if tokenizer_size is not None and tokenizer_size > model.vocab_size:
        raise UsageError(f"model.vocab_size: {model.vocab_size} is less than the tokenizer's {tokenizer_size} tokens")
    return model.vocab_size


def rows_per_pass(data: DataConfig, train: TrainConfig, cluster: ClusterConfig, mesh: MeshConfig) -> int:
    """Rows of one micro-batch: as the cluster says, else the most, at most 8, that divide a rank's share of a step.

    Raises UsageError if the rows of a step do not divide over the data-parallel ranks, or a rank's over micro-batches.
    """
    ranks = mesh.dp_replicate * mesh.dp_shard
    per_block = data.block_length // data.seq_len
    unit = ranks * data.block_length
    for key, size in [("batch_tokens", train.batch_tokens), *(("batch_ramp", size) for _, size in train.batch_ramp)]:
        if size % unit:
            raise UsageError(
                f"train.{key}: {size} do not divide over {ranks} data-parallel ranks in blocks of "
                f"{data.block_length} tokens; nearest: {max(1, round(size / unit)) * unit}"
            )
    share = math.gcd(train.batch_tokens, *(size for _, size in train.batch_ramp)) // data.seq_len // ranks
    fitting = [n for n in range(per_block, share + 1, per_block) if share % n == 0]
    if cluster.microbatch is None:
        return max((n for n in fitting if n <= MOST_ROWS), default=fitting[0])
    if cluster.microbatch not in fitting:
        raise UsageError(
            f"microbatch: {cluster.microbatch} rows do not divide the {share} rows a rank has in a step; "
            f"possible: {', '.join(map(str, fitting))}"
        )
    return cluster.microbatch


def _device(cluster: ClusterConfig) -> torch.device:
    # Not resolve_device: a plan for GPUs may be made where there are none.
    if cluster.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(cluster.device)


def _branches(model: ModelConfig, seq_len: int) -> list[dict[str, Any]]:
    """One row per named branch; sizes are of one copy, FLOPs of one forward pass, state of one sequence."""
    rows = []
    for name, count in Counter(model.order()).items():
        settings = model.branches[name]
        rows.append(
            {
                "name": name,
                "kind": settings.kind,
                "count": count,
                "num_params": settings.num_params(model.d_model),
                "num_active_params": settings.num_params(model.d_model, active=True),
                "flops_per_token": settings.flops_per_token(model.d_model, seq_len),
                "state_bytes": settings.state_bytes(model.d_model, 1, seq_len),
            }
        )
    return rows
