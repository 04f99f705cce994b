"""One memory of a mixture: its projections; and what all of them share along their channels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lmtrain.model.branch import Init, ParamInfo, matrix
from lmtrain.model.init import uniform
from lmtrain.model.mixers.mom_settings import MoMConfig


class Memory(nn.Module):
    """What one memory takes of a token, before convolutions and activations: k, v, beta and its step of decay."""

    def __init__(self, cfg: MoMConfig, d_model: int) -> None:
        super().__init__()
        self.num_heads = cfg.num_heads
        self.k = nn.Linear(d_model, cfg.num_heads * cfg.head_dim, bias=False)
        self.v = nn.Linear(d_model, cfg.num_heads * cfg.value_dim, bias=False)
        self.beta = nn.Linear(d_model, cfg.num_heads, bias=False)
        self.a = nn.Linear(d_model, cfg.num_heads, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.k(x), self.v(x), self.beta(x), self.a(x)

    def param_info(self) -> dict[str, ParamInfo]:
        linears = {"k": self.k, "v": self.v, "beta": self.beta, "a": self.a}
        return {f"{name}.weight": projection(linear, self.num_heads) for name, linear in linears.items()}


class Taps(nn.Module):
    """The taps ``[channels, width]`` of a convolution that the tokens of every memory pass; the last is their own."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))

    def forward(self) -> Tensor:
        return self.weight

    def param_info(self, init: Init, heads: int) -> dict[str, ParamInfo]:
        return {"weight": ParamInfo("conv", init, tp_dim=0, tp_units=heads)}


def projection(linear: nn.Linear, heads: int) -> ParamInfo:
    """Of a matrix into heads."""
    d_model, width = linear.in_features, linear.out_features
    return matrix(xavier(d_model, width), d_model, width, rows=heads)


def xavier(fan_in: int, fan_out: int) -> Init:
    """Glorot's uniform values with gain 2^-2.5."""
    bound = 2**-2.5 * math.sqrt(6 / (fan_in + fan_out))
    return uniform(-bound, bound)
