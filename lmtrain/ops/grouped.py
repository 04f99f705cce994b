"""Rows sorted into groups: permuting them without atomics, and one matrix product per group."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmtrain.ops.op import check_shape


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return grads[0][inverse], None, None


def permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """``x[order]`` for a permutation ``order`` ``[N]`` of rows; the gradient is a gather by ``inverse``.

    Raises ValueError naming the argument, what was expected and what was got; that they are each other's inverses is
    the caller's to know.
    """
    for name, rows in {"order": order, "inverse": inverse}.items():
        check_shape("permute", name, rows, tuple(x.shape[:1]))
    return _Permute.apply(x, order, inverse)


def inverse_of(order: Tensor) -> Tensor:
    """The permutation that undoes ``order``."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    return inverse


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """``x[o_{g-1} : o_g] @ weight[g]``: x ``[N, D]``, weight ``[G, D, F]``, offsets int32 ``[G]`` up to N.

    One call of torch's grouped product where it takes the dtype and the strides (rows of whole 16 bytes), else a loop.
    Raises ValueError naming the argument, what was expected and what was got.
    """
    check_shape("grouped_mm", "weight", weight, (None, x.shape[-1], None))
    check_shape("grouped_mm", "offsets", offsets, tuple(weight.shape[:1]))
    if weight.dtype != x.dtype:
        raise ValueError(f"grouped_mm: weight: expected dtype {x.dtype} as x, got {weight.dtype}")
    aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    if x.dtype in (torch.float32, torch.bfloat16) and aligned and x.shape[0]:
        return F.grouped_mm(x.contiguous(), weight, offs=offsets)
    ends = offsets.tolist()
    if ends != sorted(ends) or ends[-1:] != [x.shape[0]]:
        raise ValueError(f"grouped_mm: offsets: expected a rise to the {x.shape[0]} rows of x, got {ends}")
    groups = zip([0, *ends], ends, weight, strict=False)
    return torch.cat([x[low:high] @ matrix for low, high, matrix in groups])
