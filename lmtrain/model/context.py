"""What a branch may ask about time: scans, halos and attention over a row, whatever ranks the row lies on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lmtrain.ops.attention import attention
from lmtrain.ops.documents import Documents
from lmtrain.ops.grouped import inverse_of, permute
from lmtrain.ops.op import AffineOp

Phase = Literal["train", "prefill", "decode"]
Cache = dict[str, Tensor]
"""Keys and values of earlier columns; opaque to branches."""
Key = tuple[int, str]
"""``(place.index, name)``: what a branch notes is assigned under it, so that a forward that runs twice notes once."""
Restore = Callable[[Tensor], Tensor]


class Context(Protocol):
    """One per micro-batch, handed to every branch; a plain class, since FSDP2 rebuilds dataclasses, tuples and dicts.

    ``positions`` int32 ``[B, T]`` restart per document. ``carries``: whether a state must come back.
    ``tokens``: the step's global target count (0-dim); ``loss_scale``: the factor by which the engine multiplies the
    loss. ``notes`` and ``losses``: what branches told, by key.
    """

    docs: Documents
    positions: Tensor
    phase: Phase
    carries: bool
    tokens: Tensor
    loss_scale: float
    notes: dict[Key, Tensor]
    losses: dict[Key, Tensor]

    def scan(
        self, op: AffineOp, *inputs: Tensor | None, initial_state: Tensor | None, **static: Any
    ) -> tuple[Tensor, Tensor]:
        """y of this shard, and the state after the row's last column (equal on all ranks of the row)."""

    def halo(self, x: Tensor, width: int, tail: Tensor | None) -> tuple[Tensor, Tensor]:
        """The ``width`` columns left of x ``[B, width, C]`` (at the row's start the tail of the segment before, or
        zeros), and the row's last ``width`` columns. Visibility is the reader's to mask (``Documents``)."""

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float, cache: Cache | None, **options: Any
    ) -> tuple[Tensor, Cache | None]:
        """Causal softmax attention within documents: q ``[B, T, Hq, K]``, k ``[B, T, Hkv, K]``, v ``[B, T, Hkv, V]`` to
        o ``[B, T, Hq, V]`` and the cache to carry (None if nothing is carried).

        options: ``softcap``, ``sinks``, ``extra_kv`` of ``ops.attention``."""

    def dispatch(self, x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Restore]:
        """Rows ``[N, D]`` to their experts int64 ``[N, k]``: the rows for this rank's experts, sorted by expert
        ``[M, D]``, int32 cumulative counts ``[E of this rank]``, and what brings ``[M, D]`` back as ``[N, k, D]``."""

    def all_sum(self, counts: Tensor, over: Literal["row"]) -> Tensor:
        """int64 counts ``[B, ...]`` summed over the ranks that share each row; no gradient."""

    def add_loss(self, key: Key, x: Tensor, value: Tensor) -> Tensor:
        """x unchanged; adds ``value`` (0-dim, a SUM over this rank's tokens) over the step's targets to the loss."""

    def note(self, key: Key, value: Tensor) -> None:
        """Record an int64 count, to be summed over the step's micro-batches and ranks."""


class LocalContext:
    """The whole row is here: one process, or the decoding of one."""

    def __init__(self, docs: Documents, phase: Phase = "train", carries: bool = False) -> None:
        self.docs = docs
        self.positions = docs.positions()
        self.phase = phase
        self.carries = carries
        self.tokens = torch.ones(())
        self.loss_scale = 1.0
        self.notes: dict[Key, Tensor] = {}
        self.losses: dict[Key, Tensor] = {}

    def scan(
        self, op: AffineOp, *inputs: Tensor | None, initial_state: Tensor | None, **static: Any
    ) -> tuple[Tensor, Tensor]:
        if self.phase == "decode" and initial_state is not None and self.positions.shape[1] == 1:
            y, state = op.step(*op.at(0, *inputs), state=op.drop(initial_state, self.docs.before))
            return y[:, None], state
        return op(*inputs, docs=self.docs, initial_state=initial_state, **static)

    def halo(self, x: Tensor, width: int, tail: Tensor | None) -> tuple[Tensor, Tensor]:
        left = x.new_zeros(x.shape[0], width, *x.shape[2:]) if tail is None else tail
        return left, torch.cat([left, x[:, -width:]], dim=1)[:, -width:].contiguous()

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float, cache: Cache | None, **options: Any
    ) -> tuple[Tensor, Cache | None]:
        if cache:
            k, v = join(cache, k, v)
        causal = not cache and self.docs.single
        docs = None if cache else self.docs
        o = attention.output(
            q, k, v, positions=self.positions, window=window, scale=scale, causal=causal, docs=docs, **options
        )
        return o, keep(k, v, window) if self.carries else None

    def dispatch(self, x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Restore]:
        rows, counts, restore = sort_by_expert(x, experts, num_experts)
        return rows, counts.cumsum(dim=0).to(torch.int32), restore

    def all_sum(self, counts: Tensor, over: Literal["row"]) -> Tensor:
        return counts

    def add_loss(self, key: Key, x: Tensor, value: Tensor) -> Tensor:
        self.losses[key] = value.detach()
        return _AddLoss.apply(x, value, self.loss_scale / self.tokens)

    def note(self, key: Key, value: Tensor) -> None:
        self.notes[key] = value


class _AddLoss(torch.autograd.Function):
    """Identity on x whose backward gives ``value`` the gradient it would have as a term of the loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor.to(value.device, value.dtype))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (factor,) = ctx.saved_tensors
        return grads[0], factor, None


def sort_by_expert(x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Restore]:
    """Every row once per chosen expert, sorted by expert; int64 counts ``[num_experts]``; the way back."""
    top_k = experts.shape[1]
    flat = experts.flatten()
    order = torch.argsort(flat, stable=True)
    inverse = inverse_of(order)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=x.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat))
    rows = permute(x[:, None].expand(-1, top_k, -1).flatten(0, 1), order, inverse)
    return rows, counts, lambda y: permute(y, inverse, order).unflatten(0, (-1, top_k))


def join(cache: Cache, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with the cached columns to their left."""
    return torch.cat([cache["k"], k], dim=1), torch.cat([cache["v"], v], dim=1)


def keep(k: Tensor, v: Tensor, window: int | None) -> Cache:
    """What later columns can still see: the last ``window - 1`` columns, or all."""
    lo = 0 if window is None else max(0, k.shape[1] - (window - 1))
    return {"k": k[:, lo:].clone(), "v": v[:, lo:].clone()}  # not views, which would hold the whole row
