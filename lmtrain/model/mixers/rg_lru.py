"""Griffin's recurrent block (arXiv 2402.19427): the real-gated linear recurrent unit beside a gate of GELU.

u = conv(W_x x + b_x)      r = sigmoid(u W_a + b_a)      i = sigmoid(u W_i + b_i)            W_a, W_i block-diagonal
log a = -8 r softplus(Lambda)      h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t u_t)
out = W_o (gelu(W_g x + b_g) * h) + b_o

A document's first token writes i u whole: a = 0 there, also under the root.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain.errors import UsageError
from lmtrain.model.answers import Answers
from lmtrain.model.branch import Branch, ParamInfo, Place, State, Streams, matrix, named, register
from lmtrain.model.context import Context
from lmtrain.model.init import constant, normal
from lmtrain.model.mixers.rg_lru_gates import Gates
from lmtrain.model.settings import at_least, taps
from lmtrain.model.short_conv import ShortConv
from lmtrain.ops import diag_scan
from lmtrain.ops.op import Cost


@dataclass(frozen=True)
class RGLRUConfig(Answers):
    """Griffin's recurrent mixer."""

    kind: str = "rg_lru"
    """rg_lru"""
    width: int | None = None
    """Channels of the recurrence; default: d_model."""
    num_heads: int = 8
    """Blocks of the two gates' matrices."""
    conv_width: int = 4
    """Taps of the short convolution."""

    def __post_init__(self) -> None:
        at_least(self, 1, "width", "num_heads")
        taps(self)

    def channels(self, d_model: int) -> int:
        """Channels of the recurrence. UsageError unless they divide into heads."""
        width = self.width or d_model
        if width % self.num_heads:
            fits = max(heads for heads in range(1, self.num_heads) if width % heads == 0)
            raise UsageError(f"rg_lru: num_heads {self.num_heads} does not divide the {width} channels; use {fits}")
        return width

    def scan_cost(self, d_model: int, seq_len: int) -> Cost:
        values = (1, seq_len, self.channels(d_model))
        return diag_scan.cost(values, values)


@register("rg_lru")
class RGLRU(Branch):
    """See the module. State: ``conv`` ``[B, W - 1, C]`` and ``lru`` fp32 ``[B, C]``."""

    Config: ClassVar[type[RGLRUConfig]] = RGLRUConfig
    sp = "scan"

    def __init__(self, cfg: RGLRUConfig, d_model: int, place: Place) -> None:
        super().__init__()
        self.cfg, self.place, self.d_model = cfg, place, d_model
        self.width = cfg.channels(d_model)
        self.x = nn.Linear(d_model, self.width)
        self.gate = nn.Linear(d_model, self.width)
        self.conv = ShortConv(self.width, cfg.conv_width, bias=True, activation="none")
        self.gates = Gates(self.width, cfg.num_heads)
        self.o = nn.Linear(self.width, d_model)

    def forward(self, x: Tensor, ctx: Context, state: State, streams: Streams) -> tuple[Tensor, State, Streams]:
        u, tail = self.conv(self.x(x), ctx, state.get("conv"))
        log_a, written = self.gates(u, ctx.positions == 0)
        h, lru = ctx.scan(diag_scan, written, log_a, initial_state=state.get("lru"))
        y = h.to(x.dtype) * F.gelu(self.gate(x), approximate="tanh")
        return self.o(y), {"conv": tail, "lru": lru} if ctx.carries else {}, {}

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"conv": (self.cfg.conv_width - 1, self.width), "lru": (self.width,)}

    def param_info(self) -> dict[str, ParamInfo]:
        d_model, width, heads = self.d_model, self.width, self.cfg.num_heads
        into, bias = normal(1 / math.sqrt(d_model)), ParamInfo("bias", constant(0.0), tp_dim=0, tp_units=heads)
        conv = normal(math.sqrt(0.01 / self.cfg.conv_width))
        # upstream 2 / L of L blocks, each of which is two branches here
        out = normal(math.sqrt(4 / self.place.count / width))
        return {
            "x.weight": matrix(into, d_model, width, rows=heads),
            "x.bias": bias,
            "gate.weight": matrix(into, d_model, width, rows=heads),
            "gate.bias": bias,
            **named("conv", self.conv.param_info(conv, units=heads)),
            **named("gates", self.gates.param_info()),
            "o.weight": matrix(out, width, d_model, columns=heads),
            "o.bias": ParamInfo("bias", constant(0.0)),
        }
