"""Expert parallelism: rows travel to the ranks that hold their experts, and back."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lmtrain.model.context import Restore, sort_by_expert
from lmtrain.ops.grouped import inverse_of, permute


class _Exchange(torch.autograd.Function):
    """``send[p]`` rows go to rank p, ``receive[p]`` come from it; the gradient travels the other way. Any may be 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _exchange(x, send, receive, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange(grads[0], ctx.receive, ctx.send, ctx.group), None, None, None


def _exchange(x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
    return out


def dispatch(x: Tensor, experts: Tensor, num_experts: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Restore]:
    """``Context.dispatch`` where rank p of the group holds experts ``[p E / P, (p + 1) E / P)``."""
    size = group.size()
    rows, counts, restore = sort_by_expert(x, experts, num_experts)
    counts = counts.view(size, -1)  # [P, experts of a rank]
    arriving = torch.empty_like(counts)
    dist.all_to_all_single(arriving, counts, group=group)
    send, receive = counts.sum(dim=1).tolist(), arriving.sum(dim=1).tolist()
    came = _Exchange.apply(rows, send, receive, group)
    local = torch.arange(counts.shape[1], device=x.device).repeat(size)
    order = torch.argsort(local.repeat_interleave(arriving.flatten()), stable=True)  # by expert, then by rank
    inverse = inverse_of(order)
    offsets = arriving.sum(dim=0).cumsum(dim=0).to(torch.int32)

    def back(y: Tensor) -> Tensor:
        return restore(_Exchange.apply(permute(y, inverse, order), receive, send, group))

    return permute(came, order, inverse), offsets, back
