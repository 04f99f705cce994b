"""The time mixing of RWKV-4 (arXiv 2305.13048): per channel a softmax over the past with a linear decay.

x_k, x_v, x_r = lerp(x_t, x_{t-1}, mix)      k = W_k x_k      v = W_v x_v      r = sigmoid(W_r x_r)
out = W_o (r * wkv4(v, k, w, u))             w = -exp(time_decay)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lmtrain.model.answers import Answers
from lmtrain.model.branch import Branch, ParamInfo, Place, State, Streams, matrix, named, register
from lmtrain.model.context import Context
from lmtrain.model.init import constant, fixed, orthogonal
from lmtrain.model.token_shift import TokenMix, channels, token_shift
from lmtrain.ops import wkv4
from lmtrain.ops.op import Cost


@dataclass(frozen=True)
class RWKV4Config(Answers):
    """RWKV-4 time mixing."""

    kind: str = "rwkv4"
    """rwkv4"""

    def scan_cost(self, d_model: int, seq_len: int) -> Cost:
        return wkv4.cost((1, seq_len, d_model))


class Decay(nn.Module):
    """Log decay and bonus of every channel, always fp32."""

    keeps_fp32 = True

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.time_decay = nn.Parameter(torch.empty(d_model))
        self.time_first = nn.Parameter(torch.empty(d_model))

    def forward(self) -> tuple[Tensor, Tensor]:
        """w < 0 and u, both ``[D]``."""
        return -self.time_decay.exp(), self.time_first * 1

    def param_info(self, place: Place) -> dict[str, ParamInfo]:
        (d_model,) = self.time_decay.shape
        ramp = torch.arange(d_model) / max(d_model - 1, 1)
        zigzag = ((torch.arange(d_model) + 1) % 3 - 1) * 0.5
        decay = -5 + 8 * ramp ** (0.7 + 1.3 * place.depth)
        return {
            "time_decay": ParamInfo("decay", fixed(decay), fp32=True, lr_scale=2.0, tp_dim=0, tp_units=d_model),
            "time_first": ParamInfo(
                "decay", fixed(math.log(0.3) + zigzag), fp32=True, lr_scale=3.0, tp_dim=0, tp_units=d_model
            ),
        }


@register("rwkv4")
class RWKV4(Branch):
    """See the module. State: ``shift`` ``[B, 1, D]`` and ``wkv`` fp32 ``[B, 3, D]``."""

    Config: ClassVar[type[RWKV4Config]] = RWKV4Config
    sp = "scan"

    def __init__(self, cfg: RWKV4Config, d_model: int, place: Place) -> None:
        super().__init__()
        self.cfg, self.place, self.d_model = cfg, place, d_model
        self.mix = TokenMix(d_model, 3)
        self.decay = Decay(d_model)
        self.k = nn.Linear(d_model, d_model, bias=False)
        self.v = nn.Linear(d_model, d_model, bias=False)
        self.r = nn.Linear(d_model, d_model, bias=False)
        self.o = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, ctx: Context, state: State, streams: Streams) -> tuple[Tensor, State, Streams]:
        previous, tail = token_shift(x, ctx, state.get("shift"))
        x_k, x_v, x_r = self.mix(x, previous)
        w, u = self.decay()
        y, after = ctx.scan(wkv4, self.v(x_v), self.k(x_k), w, u, initial_state=state.get("wkv"))
        y = self.o(torch.sigmoid(self.r(x_r)) * y)
        return y, {"shift": tail, "wkv": after} if ctx.carries else {}, {}

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"shift": (1, self.d_model), "wkv": (3, self.d_model)}

    def param_info(self) -> dict[str, ParamInfo]:
        d_model, depth, left = self.d_model, self.place.depth, self.place.left
        current = channels(d_model) ** left  # weight of the own token for keys
        mixes = [1 - current, 1 - (current + 0.3 * depth), 1 - channels(d_model) ** (0.5 * left)]
        zero = matrix(constant(0.0), d_model, d_model, rows=d_model)
        return {
            **named("mix", self.mix.param_info(mixes)),
            **named("decay", self.decay.param_info(self.place)),
            "k.weight": zero,
            "v.weight": matrix(orthogonal(1.0), d_model, d_model, rows=d_model),
            "r.weight": zero,
            "o.weight": matrix(constant(0.0), d_model, d_model, columns=d_model),
        }
