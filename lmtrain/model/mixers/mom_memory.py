"""One memory of a mixture: its projections; and what all of them share along their channels."""

from __future__ import annotations

import math

from torch import Tensor, nn

from lmtrain.model.branch import Init, ParamInfo, matrix
from lmtrain.model.context import Context
from lmtrain.model.init import uniform
from lmtrain.model.mixers.mom_settings import MoMConfig
from lmtrain.model.short_conv import ShortConv
from lmtrain.ops import causal_conv1d


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


class SharedConv(ShortConv):
    """A short convolution of which every memory's channels, one memory after another, pass the same taps."""

    def forward(self, x: Tensor, ctx: Context, tail: Tensor | None) -> tuple[Tensor, Tensor]:
        left, tail = ctx.halo(x, self.weight.shape[1] - 1, tail)
        taps = self.weight.repeat(x.shape[-1] // self.weight.shape[0], 1)
        return causal_conv1d(x, taps, None, docs=ctx.docs, initial_state=left, activation="silu")[0], tail


def projection(linear: nn.Linear, heads: int) -> ParamInfo:
    """Of a matrix into heads."""
    d_model, width = linear.in_features, linear.out_features
    return matrix(xavier(d_model, width), d_model, width, rows=heads)


def xavier(fan_in: int, fan_out: int) -> Init:
    """Glorot's uniform values with gain 2^-2.5."""
    bound = 2**-2.5 * math.sqrt(6 / (fan_in + fan_out))
    return uniform(-bound, bound)
