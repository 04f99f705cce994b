"""Bits per byte of held-out text: the only loss that compares across tokenizers."""

from __future__ import annotations

import torch
import torch.distributed as dist

from lmtrain.data.heldout import Heldout
from lmtrain.engine.protocol import Engine
from lmtrain.parallel.mesh import Mesh


def bits_per_byte(engine: Engine, heldout: Heldout, mesh: Mesh, rows: int, device: torch.device) -> dict[str, float]:
    """``Heldout.bits_per_byte`` of the engine's model; collective."""
    nats = torch.zeros(len(heldout.source_names), dtype=torch.float64, device=device)
    for index, name in enumerate(heldout.source_names):
        for batch in heldout.batches(name, rows, mesh.data_rank, mesh.data_size):
            nats[index] += engine.losses(batch.cut(mesh.sequence_rank, mesh.sp)).double().sum()
    dist.all_reduce(nats)
    return heldout.bits_per_byte(dict(zip(heldout.source_names, nats.tolist(), strict=True)))
