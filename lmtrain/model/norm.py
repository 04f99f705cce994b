"""The normalisations in front of branches, and of queries and keys."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain.model.branch import ParamInfo
from lmtrain.model.init import constant
from lmtrain.ops.op import compute_dtype
from lmtrain.ops.rmsnorm import rmsnorm

NormKind = Literal["rms", "layer"]


class Norm(nn.Module):
    """Base of the norms; weight ``[dim]`` starts at 1."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def param_info(self) -> dict[str, ParamInfo]:
        return {"weight": ParamInfo("norm", constant(1.0))}


class RMSNorm(Norm):
    """``x / rms(x) * weight`` over the last dim, in x's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return rmsnorm(x, self.weight, eps=self.eps)


class LayerNorm(Norm):
    """``(x - mean(x)) / std(x) * weight + bias`` over the last dim, in x's dtype (RWKV)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim, eps)
        self.bias = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        y = F.layer_norm(x.to(dtype), x.shape[-1:], self.weight.to(dtype), self.bias.to(dtype), self.eps)
        return y.to(x.dtype)

    def param_info(self) -> dict[str, ParamInfo]:
        return {**super().param_info(), "bias": ParamInfo("bias", constant(0.0))}


class HeadNorm(LayerNorm):
    """LayerNorm of every head by itself (RWKV's GroupNorm): ``[B, T, H, V]`` with weight and bias ``[H V]``."""

    def forward(self, x: Tensor) -> Tensor:
        dtype, width = compute_dtype(x), x.shape[-1]
        y = F.layer_norm(x.to(dtype), (width,), eps=self.eps)
        weight, bias = (t.to(dtype).unflatten(0, (-1, width)) for t in (self.weight, self.bias))
        return (y * weight + bias).to(x.dtype)


NORMS: dict[NormKind, type[Norm]] = {"rms": RMSNorm, "layer": LayerNorm}
