"""The normalisation in front of every branch, and of queries and keys: a module around ``ops.rmsnorm``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmtrain.model.branch import ParamInfo
from lmtrain.model.init import constant
from lmtrain.ops.rmsnorm import rmsnorm


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last dim, in x's dtype; weight ``[dim]`` starts at 1."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rmsnorm(x, self.weight, eps=self.eps)

    def param_info(self) -> dict[str, ParamInfo]:
        return {"weight": ParamInfo("norm", constant(1.0))}
