"""What Mamba and Longhorn share: a selective scan whose steps, keys and queries are read off the convolved values.

u = silu(conv(W_x x))      raw = W_2 W_1 u      B = W_B u      C = W_C u      out = W_o ((scan(u) + D u) * silu(W_z x))

They differ in the step size and the decay that they make of ``raw`` and B.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain.model.answers import Answers
from lmtrain.model.branch import Branch, ParamInfo, Place, State, Streams, matrix, named
from lmtrain.model.context import Context
from lmtrain.model.init import fan_in_uniform
from lmtrain.model.settings import at_least, taps
from lmtrain.model.short_conv import ShortConv
from lmtrain.model.state_space import Skip
from lmtrain.ops import selective_scan
from lmtrain.ops.op import Cost, compute_dtype


@dataclass(frozen=True)
class SelectiveConfig(Answers):
    """Settings that Mamba and Longhorn share."""

    d_state: int = 16
    """State of each channel."""
    expand: int = 2
    """Inner width over d_model."""
    dt_rank: int | None = None
    """Inner width of the step size's projection; default: d_model / 16, rounded up."""
    conv_width: int = 4
    """Taps of the short convolution."""

    def __post_init__(self) -> None:
        at_least(self, 1, "d_state", "expand", "dt_rank")
        taps(self)

    def rank(self, d_model: int) -> int:
        """Inner width of the step size's projection."""
        return self.dt_rank or math.ceil(d_model / 16)

    def rates(self, inner: int) -> tuple[int, ...]:
        """Shape of the learned decay rates; ``()`` if there are none."""
        return ()

    def scan_cost(self, d_model: int, seq_len: int) -> Cost:
        inner = self.expand * d_model
        values, keys = (1, seq_len, inner), (1, seq_len, 1, self.d_state)
        return selective_scan.cost(values, values, self.rates(inner), keys, keys)


class Selective(Branch):
    """See the module. State: ``conv`` ``[B, W - 1, E]`` and ``ssm`` fp32 ``[B, E, N]``."""

    sp = "scan"

    def __init__(self, cfg: SelectiveConfig, d_model: int, place: Place) -> None:
        super().__init__()
        self.cfg, self.place, self.d_model = cfg, place, d_model
        self.inner, self.rank = cfg.expand * d_model, cfg.rank(d_model)
        self.z = nn.Linear(d_model, self.inner, bias=False)
        self.x = nn.Linear(d_model, self.inner, bias=False)
        self.conv = ShortConv(self.inner, cfg.conv_width, bias=True)
        self.dt_in = nn.Linear(self.inner, self.rank, bias=False)
        self.dt_out = nn.Linear(self.rank, self.inner, bias=False)
        self.B = nn.Linear(self.inner, cfg.d_state, bias=False)
        self.C = nn.Linear(self.inner, cfg.d_state, bias=False)
        self.skip = Skip(self.inner)
        self.o = nn.Linear(self.inner, d_model, bias=False)

    def steps(self, raw: Tensor, keys: Tensor) -> tuple[Tensor, Tensor | None]:
        """raw ``[B, T, E]`` and keys ``[B, T, N]`` to what the scan takes as dt ``[B, T, E]`` and A ``[E, N]``."""
        raise TypeError(f"{type(self).__name__} has no steps")

    def forward(self, x: Tensor, ctx: Context, state: State, streams: Streams) -> tuple[Tensor, State, Streams]:
        z = self.z(x)
        u, tail = self.conv(self.x(x), ctx, state.get("conv"))
        keys, queries = self.B(u), self.C(u)
        dt, rates = self.steps(self.dt_out(self.dt_in(u)), keys)
        values, keys, queries = u.to(compute_dtype(u)), keys[:, :, None], queries[:, :, None]
        y, ssm = ctx.scan(selective_scan, values, dt, rates, keys, queries, initial_state=state.get("ssm"))
        y = self.skip(y, u) * F.silu(z)
        return self.o(y.to(x.dtype)), {"conv": tail, "ssm": ssm} if ctx.carries else {}, {}

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"conv": (self.cfg.conv_width - 1, self.inner), "ssm": (self.inner, self.cfg.d_state)}

    def param_info(self) -> dict[str, ParamInfo]:
        d_model, inner, width = self.d_model, self.inner, self.cfg.conv_width
        rank, keys = self.rank, self.cfg.d_state
        into, within, conv = fan_in_uniform(d_model), fan_in_uniform(inner), fan_in_uniform(width)
        out = fan_in_uniform(inner, 1 / math.sqrt(self.place.count))
        return {
            "z.weight": matrix(into, d_model, inner, rows=inner),
            "x.weight": matrix(into, d_model, inner, rows=inner),
            **named("conv", self.conv.param_info(conv, units=inner, bias=conv)),
            "dt_in.weight": matrix(within, inner, rank, columns=inner),
            "dt_out.weight": matrix(fan_in_uniform(rank), rank, inner, rows=inner),
            "B.weight": matrix(within, inner, keys, columns=inner),
            "C.weight": matrix(within, inner, keys, columns=inner),
            **named("skip", self.skip.param_info(inner)),
            "o.weight": matrix(out, inner, d_model, columns=inner),
        }
