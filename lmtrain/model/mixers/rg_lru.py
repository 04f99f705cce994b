"""Griffin's recurrent block (arXiv 2402.19427): the real-gated linear recurrent unit beside a gate of GELU.

u = conv(W_x x + b_x)      r = sigmoid(u W_a + b_a)      i = sigmoid(u W_i + b_i)            W_a, W_i block-diagonal
log a = -8 r softplus(Lambda)      h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t u_t)      out = W_o (gelu(W_g x + b_g) * h)

A document's first token writes i u whole: a = 0 there, also under the root. linear_out has a bias in published weights,
here it has none: the last projection may be cut over ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from lmtrain.errors import UsageError
from lmtrain.model.answers import Answers
from lmtrain.model.branch import Branch, ParamInfo, Place, State, Streams, matrix, named, register
from lmtrain.model.context import Context
from lmtrain.model.init import constant, normal
from lmtrain.model.short_conv import ShortConv
from lmtrain.ops import diag_scan
from lmtrain.ops.op import Cost, compute_dtype

RATE = 8.0
"""The log decay at r = 1 over softplus(Lambda)."""
STEEPEST = 1000.0
"""Bound of the root's gradient, which has none where a is 1."""


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
        for key, least in (("width", 1), ("num_heads", 1), ("conv_width", 2)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise UsageError(f"rg_lru: {key}: expected at least {least}, got {value}")

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


class BlockLinear(nn.Module):
    """``u W`` per head, without its bias: weight ``[H, b, b]``, in by out."""

    def __init__(self, num_heads: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, size, size))

    def forward(self, u: Tensor) -> Tensor:
        """``[B, T, H b]`` to the same."""
        heads = u.unflatten(-1, (-1, self.weight.shape[1]))
        return torch.einsum("bthi,hij->bthj", heads, self.weight).flatten(2)


class Gates(nn.Module):
    """Log decay and the factor of what is written, always fp32."""

    keeps_fp32 = True

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.recurrent_bias = nn.Parameter(torch.empty(channels))
        self.input_bias = nn.Parameter(torch.empty(channels))
        self.Lambda = nn.Parameter(torch.empty(channels))

    def forward(self, recurrent: Tensor, written: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Raw gates ``[B, T, C]`` and document starts ``[B, T]`` to log a and ``sqrt(1 - a^2) i``."""
        dtype = compute_dtype(recurrent)
        r = torch.sigmoid(recurrent.to(dtype) + self.recurrent_bias)
        i = torch.sigmoid(written.to(dtype) + self.input_bias)
        log_a = -RATE * r * F.softplus(self.Lambda)
        kept = torch.where(starts[..., None], 1.0, BoundedRoot.apply(-torch.expm1(2 * log_a)))
        return log_a, kept * i


class BoundedRoot(torch.autograd.Function):
    """``sqrt(x)`` whose gradient is at most ``STEEPEST``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        root = x.sqrt()
        ctx.save_for_backward(root)
        return root

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (root,) = ctx.saved_tensors
        return grads[0] / (2 * root).clamp(min=1 / STEEPEST)


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
        self.recurrent_gate = BlockLinear(cfg.num_heads, self.width // cfg.num_heads)
        self.input_gate = BlockLinear(cfg.num_heads, self.width // cfg.num_heads)
        self.gates = Gates(self.width)
        self.o = nn.Linear(self.width, d_model, bias=False)

    def forward(self, x: Tensor, ctx: Context, state: State, streams: Streams) -> tuple[Tensor, State, Streams]:
        u, tail = self.conv(self.x(x), ctx, state.get("conv"))
        log_a, factor = self.gates(self.recurrent_gate(u), self.input_gate(u), ctx.positions == 0)
        h, lru = ctx.scan(diag_scan, factor * u, log_a, initial_state=state.get("lru"))
        y = h.to(x.dtype) * F.gelu(self.gate(x), approximate="tanh")
        return self.o(y), {"conv": tail, "lru": lru} if ctx.carries else {}, {}

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"conv": (self.cfg.conv_width - 1, self.width), "lru": (self.width,)}

    def param_info(self) -> dict[str, ParamInfo]:
        d_model, width, heads = self.d_model, self.width, self.cfg.num_heads
        size, into = width // heads, normal(1 / math.sqrt(d_model))
        block = ParamInfo(
            "matrix", normal(1 / math.sqrt(size)), True, fan_in=size, fan_out=size, tp_dim=0, tp_units=heads
        )
        bias = ParamInfo("bias", constant(0.0), tp_dim=0, tp_units=heads)
        exact = ParamInfo("bias", constant(0.0), fp32=True, tp_dim=0, tp_units=heads)
        conv = normal(math.sqrt(0.01 / self.cfg.conv_width))
        # upstream 2 / L of L blocks, each of which is two branches here
        out = normal(math.sqrt(4 / self.place.count / width))
        return {
            "x.weight": matrix(into, d_model, width, rows=heads),
            "x.bias": bias,
            "gate.weight": matrix(into, d_model, width, rows=heads),
            "gate.bias": bias,
            **named("conv", self.conv.param_info(conv, units=heads)),
            "recurrent_gate.weight": block,
            "input_gate.weight": block,
            "gates.recurrent_bias": exact,
            "gates.input_bias": exact,
            "gates.Lambda": ParamInfo("decay", initial_lambda, fp32=True, tp_dim=0, tp_units=heads),
            "o.weight": matrix(out, width, d_model, columns=heads),
        }


def initial_lambda(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """``softplus(Lambda) = -log(s) / 2`` with s uniform in [0.9^2, 0.999^2]: a is sqrt(s)^(8 r)."""
    low, high = 0.9**2, 0.999**2
    s = torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low + 1e-8
    return torch.expm1(-0.5 * s.log()).log().float()
