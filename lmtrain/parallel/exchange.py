"""What ranks of one row tell each other, each exchange one autograd function with its reverse written by hand.

Every rank calls every exchange, forward and backward, in the same order; nothing depends on the rank or on whether a
gradient is zero (autograd materialises zeros), so no rank waits for a peer that did not come.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lmtrain.ops.op import AffineOp

# torch 2.13 renamed these two, and warns at every call by the old names
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``[P, ...]``: x of every rank of the group; no gradient."""
    x = x.contiguous()
    out = x.new_empty(group.size(), *x.shape)
    _all_gather(out.flatten(), x.flatten(), group=group)
    return out


class PrefixState(torch.autograd.Function):
    """State entering this shard and state after the whole row, from every shard's ``(gamma, state)``.

    forward ``S_in[r] = fold_{j<r}(S <- combine(gamma_j, S, S_j))`` from ``initial``; the reverse fold gives gradients
    of this shard's gamma and state, and of ``initial`` on the first rank (zeros elsewhere, so that a sum over the row
    is right). One all-gather each way, independent of the sequence length.
    """

    @staticmethod
    def forward(
        ctx: Any, op: AffineOp, group: dist.ProcessGroup, gamma: Tensor, state: Tensor, initial: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        packed = all_gather(torch.cat([gamma.flatten(), state.flatten()]), group)
        gammas = packed[:, : gamma.numel()].unflatten(1, gamma.shape)
        states = packed[:, gamma.numel() :].unflatten(1, state.shape)
        rank, fold = group.rank(), torch.zeros_like(state) if initial is None else initial
        incoming = []
        for j in range(group.size()):
            incoming.append(fold)
            fold = op.combine(gammas[j], fold, states[j])
        ctx.op, ctx.group, ctx.has_initial = op, group, initial is not None
        ctx.save_for_backward(gammas, states, torch.stack(incoming))
        return incoming[rank].clone(), fold

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        op, group = ctx.op, ctx.group
        gammas, states, incoming = ctx.saved_tensors
        gathered = all_gather(torch.stack([g.contiguous() for g in grads]), group)
        into, mu = gathered[:, 0], gathered[:, 1].sum(dim=0)
        rank = group.rank()
        grad_gamma = grad_state = mu
        for j in reversed(range(group.size())):
            by_gamma, by_state, by_added = op.combine_backward(mu, gammas[j], incoming[j], states[j])
            if j == rank:
                grad_gamma, grad_state = by_gamma, by_added
            mu = by_state + into[j]
        initial = (mu if rank == 0 else torch.zeros_like(mu)) if ctx.has_initial else None
        return None, None, grad_gamma, grad_state, initial


class Halo(torch.autograd.Function):
    """The ``width`` columns left of this shard, and the row's last ``width`` columns (equal on every rank)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, width: int, tail: Tensor | None, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        ctx.width, ctx.group, ctx.has_tail, ctx.length = width, group, tail is not None, x.shape[1]
        tails = all_gather(x[:, x.shape[1] - width :], group)
        rank = group.rank()
        first = torch.zeros_like(tails[0]) if tail is None else tail.clone()
        return first if rank == 0 else tails[rank - 1].clone(), tails[-1].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        left, last = all_gather(torch.stack([g.contiguous() for g in grads]), ctx.group).unbind(dim=1)
        rank, size = ctx.group.rank(), ctx.group.size()
        edge = left[rank + 1] if rank + 1 < size else last.sum(dim=0)
        grad = edge.new_zeros(edge.shape[0], ctx.length, *edge.shape[2:])
        grad[:, ctx.length - ctx.width :] = edge
        tail = (left[0] if rank == 0 else torch.zeros_like(left[0])) if ctx.has_tail else None
        return grad, None, tail, None


class GatherSequence(torch.autograd.Function):
    """``[B, L, ...]`` of every rank joined to the whole row ``[B, T, ...]``; the reverse sums and scatters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather(x, group).transpose(0, 1).flatten(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        size = ctx.group.size()
        shards = grads[0].unflatten(1, (size, -1)).transpose(0, 1).contiguous()
        out = torch.empty_like(shards[0])
        _reduce_scatter(out.flatten(), shards.flatten(), group=ctx.group)
        return out, None


class AllToAll(torch.autograd.Function):
    """``[P, ...]``: piece p goes to rank p; piece p of the result came from rank p. Its own reverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x = grads[0].contiguous()
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=ctx.group)
        return out, None


def to_heads(tensors: list[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """Each ``[B, L, H, K]`` (all columns of a shard) to ``[B, T, H / P, K]`` (the whole row of some heads)."""
    size = group.size()
    pieces = [t.unflatten(2, (size, -1)).movedim(2, 0).flatten(3) for t in tensors]  # [P, B, L, H / P * K]
    moved = AllToAll.apply(torch.cat(pieces, dim=-1), group)
    row = moved.transpose(0, 1).flatten(1, 2)  # [B, T, ...]
    parts = row.split([p.shape[-1] for p in pieces], dim=-1)
    return [part.unflatten(-1, (-1, t.shape[-1])) for part, t in zip(parts, tensors, strict=True)]


def from_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``[B, T, H / P, K]`` back to ``[B, L, H, K]``."""
    size = group.size()
    moved = AllToAll.apply(x.unflatten(1, (size, -1)).movedim(1, 0), group)  # [P, B, L, H / P, K]
    return moved.movedim(0, 2).flatten(2, 3)
