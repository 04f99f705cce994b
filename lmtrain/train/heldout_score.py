"""Bits per byte of held-out text: the only loss that compares across tokenizers."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from lmtrain.data.heldout import Heldout
from lmtrain.engine.protocol import Engine
from lmtrain.parallel.mesh import Mesh


def bits_per_byte(engine: Engine, heldout: Heldout, mesh: Mesh, rows: int, device: torch.device) -> dict[str, float]:
    """``heldout_bpb.NAME`` of each source and ``heldout_bpb`` of all its bytes together; collective.

    A real code length: the first token of a document, which nothing predicts, is charged ``log2(vocab_size)`` bits.
    """
    values: dict[str, float] = {}
    bits = bytes_of_text = 0.0
    for name in heldout.source_names:
        nats = torch.zeros((), dtype=torch.float64, device=device)
        for batch in heldout.batches(name, rows, mesh.data_rank, mesh.data_size):
            nats += engine.losses(batch.cut(mesh.sequence_rank, mesh.sp)).double().sum()
        dist.all_reduce(nats)
        source_bits = float(nats) / math.log(2) + heldout.num_unpredicted[name] * math.log2(heldout.vocab_size)
        values[f"heldout_bpb.{name}"] = source_bits / heldout.bytes_of_text[name]
        bits, bytes_of_text = bits + source_bits, bytes_of_text + heldout.bytes_of_text[name]
    return {"heldout_bpb": bits / bytes_of_text, **values}
