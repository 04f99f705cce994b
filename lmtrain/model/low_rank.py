"""Projections through a narrow width, which RWKV-7 makes its rates per channel from: ``sigmoid(f(x W_1) W_2 + w)``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from lmtrain.model.branch import ParamInfo, matrix
from lmtrain.model.init import constant, fixed, orthogonal
from lmtrain.ops.op import compute_dtype


class LowRank(nn.Module):
    """``f(x W_1) W_2``, raw matrices ``[in, rank]`` and ``[rank, out]``; without f the inner layer is linear."""

    def __init__(self, d_model: int, rank: int, inner_activation: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.empty(d_model, rank))
        self.outer = nn.Parameter(torch.empty(rank, d_model))
        self.inner_activation = inner_activation

    def forward(self, x: Tensor) -> Tensor:
        low = x @ self.inner
        return (low if self.inner_activation is None else self.inner_activation(low)) @ self.outer

    def param_info(self) -> dict[str, ParamInfo]:
        """Starts at 0, W_2 orthogonal with gain 0.1, larger if it is taller than wide; neither decays."""
        d_model, rank = self.inner.shape
        outer = orthogonal(0.1 * max(1.0, rank / d_model) ** 0.5)
        return {
            "inner": replace(matrix(constant(0.0), d_model, rank), decay=False),
            "outer": replace(matrix(outer, rank, d_model), decay=False),
        }


class Offset(nn.Module):
    """``sigmoid(raw + weight)`` of every channel, always fp32."""

    keeps_fp32 = True

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_model))

    def forward(self, raw: Tensor) -> Tensor:
        return torch.sigmoid(raw.to(compute_dtype(raw)) + self.weight)

    def param_info(self, values: Tensor, units: int, lr_scale: float = 1.0) -> dict[str, ParamInfo]:
        """values: initial ones ``[D]``; units: heads along them."""
        return {"weight": ParamInfo("decay", fixed(values), fp32=True, lr_scale=lr_scale, tp_dim=0, tp_units=units)}
