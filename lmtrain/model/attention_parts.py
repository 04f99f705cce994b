"""Parameters that some models add to softmax attention: sinks, persistent keys and values, embeddings of heads."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lmtrain.model.branch import ParamInfo
from lmtrain.model.init import normal
from lmtrain.ops.op import compute_dtype


class Sinks(nn.Module):
    """A logit per head, always fp32."""

    keeps_fp32 = True

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.empty(num_heads))

    def forward(self, like: Tensor) -> Tensor:
        return self.logit.to(compute_dtype(like))


class Persistent(nn.Module):
    """Keys and values that belong to the heads; stored small and multiplied, which scales their learning rate."""

    def __init__(self, num_heads: int, count: int, head_dim: int) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.empty(num_heads, count, head_dim))
        self.v = nn.Parameter(torch.empty(num_heads, count, head_dim))

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.k * math.sqrt(self.k.shape[2]), self.v * math.sqrt(self.v.shape[1])

    def param_info(self) -> dict[str, ParamInfo]:
        units, count, head_dim = self.k.shape
        keys, values = normal(head_dim**-0.5), normal(count**-0.5)
        return {
            "k": ParamInfo("embedding", keys, tp_dim=0, tp_units=units),
            "v": ParamInfo("embedding", values, tp_dim=0, tp_units=units),
        }


class HeadEmbedding(nn.Module):
    """What tells heads apart that share one projection: ``[H, K]``, added or multiplied."""

    def __init__(self, num_heads: int, head_dim: int, how: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, K]`` to ``[B, T, H, K]``; bf16 would round the small weight away beside 1."""
        wide, weight = (t.to(compute_dtype(x)) for t in (x[:, :, None], self.weight))
        return (wide + weight if self.how == "add" else wide * (1 + weight)).to(x.dtype)
