"""S4D (arXiv 2206.11893): complex modes of constant frequency and decay, the same for every token.

h_t = exp(dt A) h_{t-1} + (exp(dt A) - 1) / A x_t      y_t = 2 Re(C h_t) + D x_t      out = W_o g * sigmoid(W_g g)

with g = gelu(y), A = -exp(log_A_real) + i A_imag, N / 2 modes per channel. The state is held in a frame that turns with
the mode, g_t = exp(-i w p_t) h_t for w = dt A_imag and the position p_t in the document. There the decay is real, and
the modes are a selective scan whose keys and queries turn instead, as under rotary embedding:

g_t = exp(dt Re A) g_{t-1} + exp(-i w p_t) x_t         y_t = 2 Re(C (exp(dt A) - 1) / A exp(i w p_t) g_t) + D x_t

Exact, with documents anywhere, which the convolution by FFT cannot do. It costs keys and queries ``[B, T, D, N]``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from lmtrain.errors import UsageError
from lmtrain.model.answers import Answers
from lmtrain.model.branch import Branch, ParamInfo, Place, State, Streams, matrix, named, register
from lmtrain.model.context import Context
from lmtrain.model.init import constant, fan_in_uniform, normal, uniform
from lmtrain.model.state_space import Skip
from lmtrain.ops import selective_scan
from lmtrain.ops.op import Cost, compute_dtype

SLOWER = 0.1
"""Of the learning rate, for steps and modes: upstream trains them at 1e-3 beside 1e-2."""


@dataclass(frozen=True)
class S4DConfig(Answers):
    """S4D mixer."""

    kind: str = "s4d"
    """s4d"""
    d_state: int = 64
    """State of each channel: two for every complex mode."""

    def __post_init__(self) -> None:
        if self.d_state < 2 or self.d_state % 2:
            fits = max(2, self.d_state + 1)
            raise UsageError(f"s4d: d_state: expected an even number of at least 2, got {self.d_state}; use {fits}")

    def scan_cost(self, d_model: int, seq_len: int) -> Cost:
        values, keys = (1, seq_len, d_model), (1, seq_len, d_model, self.d_state)
        return selective_scan.cost(values, values, (d_model, self.d_state), keys, keys)

    def kept_values(self, d_model: int) -> int:
        """Keys and queries of every channel, and what their angles and products keep (measured: 3.6 D N a token)."""
        return round(3.6 * d_model * self.d_state)


class Modes(nn.Module):
    """Steps, decays, and the keys and queries that turn with the position, always fp32."""

    keeps_fp32 = True

    def __init__(self, channels: int, modes: int) -> None:
        super().__init__()
        self.log_dt = nn.Parameter(torch.empty(channels))
        self.log_A_real = nn.Parameter(torch.empty(channels, modes))
        self.A_imag = nn.Parameter(torch.empty(channels, modes))
        self.C = nn.Parameter(torch.empty(channels, modes, 2))

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """int ``[B, T]`` to dt ``[D]``, rates ``[D, N]``, keys and queries ``[B, T, D, N]`` in ``dtype``."""
        dt, decay = self.log_dt.exp(), -self.log_A_real.exp()
        # in fp64: exp(z) - 1 of a small z, and a position times an angle, of which only the last turn counts
        z = dt.double()[:, None] * torch.complex(decay.double(), self.A_imag.double())
        weight = 2 * torch.view_as_complex(self.C.double()) * (z.exp() - 1) / z  # the scan writes dt x
        angle = (positions.double()[..., None, None] * z.imag).remainder(2 * math.pi).to(dtype)
        cos, sin, re, im = angle.cos(), angle.sin(), weight.real.to(dtype), weight.imag.to(dtype)
        keys = torch.cat([cos, -sin], dim=-1)
        queries = torch.cat([re * cos - im * sin, -re * sin - im * cos], dim=-1)
        return dt, torch.cat([decay, decay], dim=-1), keys, queries

    def param_info(self) -> dict[str, ParamInfo]:
        steps = uniform(math.log(1e-3), math.log(1e-1))
        return {
            "log_dt": ParamInfo("decay", steps, fp32=True, lr_scale=SLOWER),
            "log_A_real": ParamInfo("decay", constant(math.log(0.5)), fp32=True, lr_scale=SLOWER),
            "A_imag": ParamInfo("decay", multiples_of_pi, fp32=True, lr_scale=SLOWER),
            "C": ParamInfo("scalar", normal(math.sqrt(0.5)), decay=True, fp32=True),
        }


def multiples_of_pi(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """``pi n`` of mode n, in every row: S4D-Lin."""
    return (math.pi * torch.arange(shape[1])).expand(shape).clone()


@register("s4d")
class S4D(Branch):
    """See the module. State: ``s4d`` fp32 ``[B, D, N]``: the real parts of the modes in their frame, the imaginary.

    Both last projections have biases, as upstream: their product is no partial sum.
    """

    Config: ClassVar[type[S4DConfig]] = S4DConfig
    sp = "scan"

    def __init__(self, cfg: S4DConfig, d_model: int, place: Place) -> None:
        super().__init__()
        self.cfg, self.place, self.d_model = cfg, place, d_model
        self.modes = Modes(d_model, cfg.d_state // 2)
        self.skip = Skip(d_model)
        self.o = nn.Linear(d_model, d_model)
        self.gate = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, ctx: Context, state: State, streams: Streams) -> tuple[Tensor, State, Streams]:
        values = x.to(compute_dtype(x))
        dt, rates, keys, queries = self.modes(ctx.positions, values.dtype)
        y, after = ctx.scan(
            selective_scan, values, dt.expand_as(values), rates, keys, queries, initial_state=state.get("s4d")
        )
        y = F.gelu(self.skip(y, values)).to(x.dtype)
        return self.o(y) * torch.sigmoid(self.gate(y)), {"s4d": after} if ctx.carries else {}, {}

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"s4d": (self.d_model, self.cfg.d_state)}

    def param_info(self) -> dict[str, ParamInfo]:
        d_model, init = self.d_model, fan_in_uniform(self.d_model)
        return {
            **named("modes", self.modes.param_info()),
            **named("skip", self.skip.param_info(d_model, normal(1.0))),
            "o.weight": matrix(init, d_model, d_model),
            "o.bias": ParamInfo("bias", init),
            "gate.weight": matrix(init, d_model, d_model),
            "gate.bias": ParamInfo("bias", init),
        }
