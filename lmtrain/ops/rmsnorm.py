"""Root-mean-square normalisation, optionally of groups and gated first (arXiv 1910.07467, 2405.21060).

u = x * silu(gate), or x without a gate          y = u * (mean_group(u^2) + eps)^-1/2 * weight
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmtrain.ops import library
from lmtrain.ops.compiled import Like, compiled
from lmtrain.ops.op import Cost, check_row, check_shape, compute_dtype


class RMSNorm:
    """``rmsnorm(x [..., D], weight [D], gate [..., D] | None) -> y [..., D]`` in x's dtype, computed in fp32 or fp64.

    The last dim is cut into ``num_groups`` equal groups, each with a mean of its own. Tokens do not see each other.
    """

    name = "rmsnorm"

    def __call__(
        self, x: Tensor, weight: Tensor, *, eps: float, gate: Tensor | None = None, num_groups: int = 1
    ) -> Tensor:
        """Raises ValueError naming the argument, what was expected and what was got."""
        _check(x, weight, gate, num_groups)
        if library.backend(self.name, x.device.type, x.dtype) == "reference":
            return self.reference(x, weight, gate, eps, num_groups)
        dtype, values = compute_dtype(x), x
        if gate is not None and gate.dtype != x.dtype:
            values, gate = x.to(dtype), gate.to(dtype)
        y, _ = torch.ops.lmtrain.rmsnorm(values, weight.to(dtype), gate, eps, num_groups)
        return y.to(x.dtype)

    @staticmethod
    def reference(x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, num_groups: int) -> Tensor:
        """The definition."""
        dtype = compute_dtype(x)
        u = x.to(dtype) if gate is None else x.to(dtype) * F.silu(gate.to(dtype))
        grouped = u.unflatten(-1, (num_groups, -1))
        normed = grouped * torch.rsqrt(grouped.square().mean(dim=-1, keepdim=True) + eps)
        return (normed.flatten(-2) * weight.to(dtype)).to(x.dtype)

    def cost(self, x: tuple[int, ...], weight: tuple[int, ...], gated: bool = False) -> Cost:
        """Of shapes x ``[..., D]`` and weight ``[D]``; bytes for fp32, every value read once."""
        values = 1
        for size in x:
            values *= size
        flops = values * (4 + 5 * gated)
        return Cost(model_flops=flops, executed_flops=flops, bytes=4 * (values * (2 + gated) + weight[0]))


rmsnorm = RMSNorm()


def _check(x: Tensor, weight: Tensor, gate: Tensor | None, num_groups: int) -> None:
    name = RMSNorm.name
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name}: x: expected shape [..., D] with D at least 1, got {list(x.shape)}")
    check_shape(name, "weight", weight, (x.shape[-1],))
    if gate is not None:
        check_shape(name, "gate", gate, tuple(x.shape))
    if num_groups < 1 or x.shape[-1] % num_groups:
        raise ValueError(f"{name}: num_groups: expected a divisor of the last dim {x.shape[-1]}, got {num_groups}")
    check_row(name, "x", x, None, weight=weight, gate=gate)


def _outputs(x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, num_groups: int) -> tuple[Like, ...]:
    return x, (weight, (x.numel() // x.shape[-1], num_groups))


def _saved(inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    x, weight, gate, _, num_groups = inputs
    return x, weight, gate, outputs[1], num_groups


def _gradients(
    x: Tensor, weight: Tensor, gate: Tensor | None, rstd: Tensor, num_groups: int
) -> tuple[Like | None, ...]:
    return x, weight, (x, (0,)) if gate is None else gate, None, None


library.register(
    RMSNorm.name,
    compiled(RMSNorm.name, _outputs, _gradients, returned=1, saved=_saved),
    library.Backend("reference"),
)
