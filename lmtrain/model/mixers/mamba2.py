"""Mamba-2 (arXiv 2405.21060): short convolution, scalar-decay scan, gated normalisation.

dt = softplus(W_dt u + dt_bias)      S_t = exp(-exp(A_log) dt_t) S_{t-1} + dt_t B_t x_t^T      y_t = S_t^T C_t + D x_t
out = W_o (RMSNorm_groups(y * silu(z)) * weight)            x, B, C pass a causal convolution and silu first
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lmtrain.errors import UsageError
from lmtrain.model.answers import Answers
from lmtrain.model.branch import Branch, ParamInfo, Place, State, Streams, matrix, named, register
from lmtrain.model.context import Context
from lmtrain.model.init import constant, fan_in_uniform, log_uniform_range
from lmtrain.model.mimetic import mimetic
from lmtrain.model.settings import at_least, positive, taps
from lmtrain.model.state_space import DecayRate, Skip
from lmtrain.ops import causal_conv1d, ssd
from lmtrain.ops.op import Cost
from lmtrain.ops.rmsnorm import rmsnorm


@dataclass(frozen=True)
class Mamba2Config(Answers):
    """Mamba-2 mixer."""

    kind: str = "mamba2"
    """mamba2"""
    d_state: int = 128
    """Rows of each head's state."""
    head_dim: int = 64
    """Channels per head."""
    expand: int = 2
    """Inner width over d_model."""
    num_groups: int = 1
    """Groups of heads that share B and C."""
    conv_width: int = 4
    """Taps of the short convolution."""
    chunk: int = 64
    """Tokens per chunk of the scan; does not change the function."""
    norm_eps: float = 1e-5
    """Added to the mean square of the gated norm."""
    mimetic_length: int | None = None
    """Start as linear attention over so many tokens (arXiv 2410.11135); default: the usual initial values."""

    def __post_init__(self) -> None:
        at_least(self, 1, "d_state", "head_dim", "expand", "num_groups", "chunk", "mimetic_length")
        taps(self)
        positive(self, "norm_eps")

    def check(self, d_model: int) -> None:
        """UsageError unless the width divides into heads and groups."""
        if d_model * self.expand % self.head_dim:
            raise UsageError(
                f"mamba2: head_dim {self.head_dim} does not divide the inner width {d_model * self.expand}"
            )
        if d_model * self.expand // self.head_dim % self.num_groups:
            heads = d_model * self.expand // self.head_dim
            raise UsageError(f"mamba2: num_groups {self.num_groups} does not divide the {heads} heads")

    def sizes(self, d_model: int) -> tuple[int, int, int]:
        """Inner width E, heads H, and the width 2 G N of B and C together."""
        inner = self.expand * d_model
        return inner, inner // self.head_dim, 2 * self.num_groups * self.d_state

    def scan_cost(self, d_model: int, seq_len: int) -> Cost:
        _, heads, _ = self.sizes(d_model)
        keys = (1, seq_len, self.num_groups, self.d_state)
        return ssd.cost((1, seq_len, heads, self.head_dim), (1, seq_len, heads), keys, keys, chunk=self.chunk)


@register("mamba2")
class Mamba2(Branch):
    """See the module. State: ``conv`` ``[B, W - 1, E + 2 G N]`` and ``ssm`` fp32 ``[B, H, N, P]``."""

    Config: ClassVar[type[Mamba2Config]] = Mamba2Config
    sp = "scan"

    def __init__(self, cfg: Mamba2Config, d_model: int, place: Place) -> None:
        super().__init__()
        cfg.check(d_model)
        self.cfg, self.place, self.d_model = cfg, place, d_model
        inner, heads, keys = cfg.sizes(d_model)
        self.z = nn.Linear(d_model, inner, bias=False)
        self.x = nn.Linear(d_model, inner, bias=False)
        self.B = nn.Linear(d_model, keys // 2, bias=False)
        self.C = nn.Linear(d_model, keys // 2, bias=False)
        self.dt = nn.Linear(d_model, heads, bias=False)
        self.conv_x = nn.Parameter(torch.empty(inner, cfg.conv_width))
        self.conv_x_bias = nn.Parameter(torch.empty(inner))
        self.conv_bc = nn.Parameter(torch.empty(keys, cfg.conv_width))
        self.conv_bc_bias = nn.Parameter(torch.empty(keys))
        self.decay = DecayRate(heads)
        self.skip = Skip(heads)
        self.norm = nn.Parameter(torch.empty(inner))
        self.o = nn.Linear(inner, d_model, bias=False)

    def forward(self, x: Tensor, ctx: Context, state: State, streams: Streams) -> tuple[Tensor, State, Streams]:
        cfg, (batch, length, _) = self.cfg, x.shape
        z, u = self.z(x), torch.cat([self.x(x), self.B(x), self.C(x)], dim=-1)
        left, tail = ctx.halo(u, cfg.conv_width - 1, state.get("conv"))
        weight, bias = torch.cat([self.conv_x, self.conv_bc]), torch.cat([self.conv_x_bias, self.conv_bc_bias])
        u, _ = causal_conv1d(u, weight, bias, docs=ctx.docs, initial_state=left, activation="silu")
        keys = self.conv_bc.shape[0] // 2
        values, b, c = u.split([u.shape[-1] - 2 * keys, keys, keys], dim=-1)
        values = values.reshape(batch, length, -1, cfg.head_dim)
        b, c = (t.reshape(batch, length, -1, cfg.d_state) for t in (b, c))
        dt, rates = self.decay(self.dt(x))
        scaled = values.to(dt.dtype) * dt[..., None]
        y, ssm = ctx.scan(ssd, scaled, rates * dt, b, c, initial_state=state.get("ssm"), chunk=cfg.chunk)
        y = rmsnorm(self.skip(y, values).flatten(2), self.norm, eps=cfg.norm_eps, gate=z, num_groups=cfg.num_groups)
        return self.o(y.to(x.dtype)), {"conv": tail, "ssm": ssm} if ctx.carries else {}, {}

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        inner, heads, keys = self.cfg.sizes(self.d_model)
        return {"conv": (self.cfg.conv_width - 1, inner + keys), "ssm": (heads, self.cfg.d_state, self.cfg.head_dim)}

    def param_info(self) -> dict[str, ParamInfo]:
        inner, heads, keys = self.cfg.sizes(self.d_model)
        width, groups = self.cfg.conv_width, self.cfg.num_groups
        linear, conv = fan_in_uniform(self.d_model), fan_in_uniform(width)
        out = fan_in_uniform(inner, 1 / math.sqrt(self.place.count))
        info = {
            "z.weight": matrix(linear, self.d_model, inner, rows=heads),
            "x.weight": matrix(linear, self.d_model, inner, rows=heads),
            "B.weight": matrix(linear, self.d_model, keys // 2),
            "C.weight": matrix(linear, self.d_model, keys // 2),
            "dt.weight": matrix(linear, self.d_model, heads, rows=heads),
            "conv_x": ParamInfo("conv", conv, tp_dim=0, tp_units=heads),
            "conv_x_bias": ParamInfo("bias", conv, tp_dim=0, tp_units=heads),
            "conv_bc": ParamInfo("conv", conv),
            "conv_bc_bias": ParamInfo("bias", conv),
            **named("decay", self.decay.param_info(heads, log_uniform_range(1.0, 16.0))),
            **named("skip", self.skip.param_info(heads)),
            "norm": ParamInfo("norm", constant(1.0), tp_dim=0, tp_units=groups),
            "o.weight": matrix(out, inner, self.d_model, columns=heads),
        }
        length, taps, biases = self.cfg.mimetic_length, ("conv_x", "conv_bc"), ("conv_x_bias", "conv_bc_bias")
        return mimetic(info, length, steps="dt.weight", taps=taps, biases=biases) if length else info
