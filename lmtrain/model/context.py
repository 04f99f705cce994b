"""What a branch may ask about time: scans, halos and attention over a row, whatever ranks the row lies on."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lmtrain.ops.attention import attention
from lmtrain.ops.documents import Documents
from lmtrain.ops.op import AffineOp

Phase = Literal["train", "prefill", "decode"]
Cache = dict[str, Tensor]
"""Keys and values of earlier columns; opaque to branches."""


class Context(Protocol):
    """One per micro-batch, handed to every branch; a plain class, since FSDP2 rebuilds dataclasses, tuples and dicts.

    ``positions`` int32 ``[B, T]`` restart per document. ``carries``: whether a state must come back.
    """

    docs: Documents
    positions: Tensor
    phase: Phase
    carries: bool

    def scan(self, op: AffineOp, *inputs: Tensor, initial_state: Tensor | None, **static: Any) -> tuple[Tensor, Tensor]:
        """y of this shard, and the state after the row's last column (equal on all ranks of the row)."""

    def halo(self, x: Tensor, width: int, tail: Tensor | None) -> tuple[Tensor, Tensor]:
        """The ``width`` columns left of x ``[B, width, C]`` (the row's tail of the segment before, or zeros, at the row's
        start), and the row's last ``width`` columns. Visibility is the reader's to mask (``Documents``)."""

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float, cache: Cache | None
    ) -> tuple[Tensor, Cache | None]:
        """Causal softmax attention within documents: q ``[B, T, Hq, K]``, k ``[B, T, Hkv, K]``, v ``[B, T, Hkv, V]`` to
        o ``[B, T, Hq, V]`` and the cache to carry (None if nothing is carried)."""


class LocalContext:
    """The whole row is here: one process, or the decoding of one."""

    def __init__(self, docs: Documents, phase: Phase = "train", carries: bool = False) -> None:
        self.docs = docs
        self.positions = docs.positions()
        self.phase = phase
        self.carries = carries

    def scan(self, op: AffineOp, *inputs: Tensor, initial_state: Tensor | None, **static: Any) -> tuple[Tensor, Tensor]:
        if self.phase == "decode" and initial_state is not None and inputs[0].shape[1] == 1:
            y, state = op.step(*(t[:, 0] for t in inputs), state=op.drop(initial_state, self.docs.before))
            return y[:, None], state
        return op(*inputs, docs=self.docs, initial_state=initial_state, **static)

    def halo(self, x: Tensor, width: int, tail: Tensor | None) -> tuple[Tensor, Tensor]:
        left = x.new_zeros(x.shape[0], width, *x.shape[2:]) if tail is None else tail
        return left, torch.cat([left, x], dim=1)[:, left.shape[1] + x.shape[1] - width :].contiguous()

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float, cache: Cache | None
    ) -> tuple[Tensor, Cache | None]:
        if cache:
            k, v = join(cache, k, v)
        o, _ = attention(q, k, v, positions=self.positions, window=window, scale=scale)
        return o, keep(k, v, window) if self.carries else None


def join(cache: Cache, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with the cached columns to their left."""
    return torch.cat([cache["k"], k], dim=1), torch.cat([cache["v"], v], dim=1)


def keep(k: Tensor, v: Tensor, window: int | None) -> Cache:
    """What later columns can still see: the last ``window - 1`` columns, or all."""
    lo = 0 if window is None else max(0, k.shape[1] - (window - 1))
    return {"k": k[:, lo:].contiguous(), "v": v[:, lo:].contiguous()}
