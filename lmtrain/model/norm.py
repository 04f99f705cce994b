"""Root-mean-square normalisation, statistics in fp32 (arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmtrain.model.branch import ParamInfo
from lmtrain.model.init import constant
from lmtrain.ops.op import compute_dtype


def rms_normalise(x: Tensor, eps: float) -> Tensor:
    """``x / rms(x)`` over the last dim, in the computing dtype."""
    x = x.to(compute_dtype(x))
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last dim, in x's dtype; weight ``[dim]`` starts at 1."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return (rms_normalise(x, self.eps) * self.weight).to(x.dtype)

    def param_info(self) -> dict[str, ParamInfo]:
        return {"weight": ParamInfo("norm", constant(1.0))}
