"""RWKV's channel mixing: a squared-ReLU MLP over the token and the one before it, up to RWKV-6 behind a receptance.

x_k, x_r = lerp(x_t, x_{t-1}, mix)      out = sigmoid(W_r x_r) * W_v relu(W_k x_k)^2        RWKV-7: without the sigmoid
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain.model.answers import Answers
from lmtrain.model.branch import Branch, ParamInfo, Place, State, Streams, matrix, named, register
from lmtrain.model.context import Context
from lmtrain.model.init import constant, orthogonal
from lmtrain.model.settings import at_least
from lmtrain.model.token_shift import TokenMix, channels, token_shift

FALL = {"4": 1, "6": 3, "7": 4}  # how fast the initial share of the previous token falls with depth


@dataclass(frozen=True)
class RWKVChannelConfig(Answers):
    """RWKV channel mixing."""

    d_ff: int
    """Hidden width."""
    kind: str = "rwkv_channel"
    """rwkv_channel"""
    version: Literal["4", "6", "7"] = "7"
    """Of RWKV: 7 has no receptance; initial values differ."""

    def __post_init__(self) -> None:
        at_least(self, 1, "d_ff")


@register("rwkv_channel")
class RWKVChannel(Branch):
    """See the module. State: ``shift`` ``[B, 1, D]``."""

    Config: ClassVar[type[RWKVChannelConfig]] = RWKVChannelConfig
    sp = "scan"

    def __init__(self, cfg: RWKVChannelConfig, d_model: int, place: Place) -> None:
        super().__init__()
        self.cfg, self.place, self.d_model = cfg, place, d_model
        self.mix = TokenMix(d_model, 1 if cfg.version == "7" else 2)
        self.k = nn.Linear(d_model, cfg.d_ff, bias=False)
        self.v = nn.Linear(cfg.d_ff, d_model, bias=False)
        if cfg.version != "7":
            self.r = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, ctx: Context, state: State, streams: Streams) -> tuple[Tensor, State, Streams]:
        previous, tail = token_shift(x, ctx, state.get("shift"))
        x_k, *x_r = self.mix(x, previous)
        y = self.v(F.relu(self.k(x_k)).square())
        if x_r:
            y = torch.sigmoid(self.r(x_r[0])) * y
        return y, {"shift": tail} if ctx.carries else {}, {}

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"shift": (1, self.d_model)}

    def param_info(self) -> dict[str, ParamInfo]:
        d_model, d_ff, version = self.d_model, self.cfg.d_ff, self.cfg.version
        share = 1 - channels(d_model) ** (self.place.left ** FALL[version])
        key = orthogonal(max(1.0, d_ff / d_model) ** 0.5 if version == "4" else 1.0)
        info = {
            **named("mix", self.mix.param_info([share] * (1 if version == "7" else 2))),
            "k.weight": matrix(key, d_model, d_ff, rows=d_ff),
            "v.weight": matrix(constant(0.0), d_ff, d_model, columns=d_ff),
        }
        return info if version == "7" else info | {"r.weight": matrix(constant(0.0), d_model, d_model)}
