"""HGRN2 (arXiv 2404.07904): a gated linear RNN whose state is expanded by an outer product.

f_t = lb + (1 - lb) sigmoid(W_f x)            S_t = Diag(f_t) S_{t-1} + (1 - f_t) (W_i x)^T
y_t = S_t^T silu(W_q x) / sqrt(K)             out = W_o RMSNorm_all(y)
lb = sigmoid(b + logit(l / L)), 0 for l = 0

A lower bound lb of the forget gate per key channel; l is this branch's place among the model's L branches. In the paper
the bounds of all layers are running sums of one softmax over the layers: the same values l / L at the start (b = 0),
but there they rise with depth for ever, while here every branch learns its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain.model.answers import Answers
from lmtrain.model.branch import Branch, ParamInfo, Place, State, Streams, matrix, named, register
from lmtrain.model.context import Context
from lmtrain.model.init import constant, normal
from lmtrain.model.readout import Readout
from lmtrain.model.settings import at_least, positive, whole_heads
from lmtrain.ops import gla
from lmtrain.ops.op import Cost, compute_dtype


@dataclass(frozen=True)
class HGRN2Config(Answers):
    """HGRN2 mixer."""

    kind: str = "hgrn2"
    """hgrn2"""
    head_dim: int = 128
    """Channels per head, of keys and of values: the factor by which the state is expanded."""
    norm_eps: float = 1e-5
    """Added to the mean square of the norm over all heads."""

    def __post_init__(self) -> None:
        at_least(self, 1, "head_dim")
        positive(self, "norm_eps")

    def scan_cost(self, d_model: int, seq_len: int) -> Cost:
        row = (1, seq_len, whole_heads(self, d_model), self.head_dim)
        return gla.cost(row, row, row, row)


class BoundedForget(nn.Module):
    """The log of the forget gate, above a lower bound per channel; always fp32, and in log space throughout."""

    keeps_fp32 = True

    def __init__(self, channels: int, place: Place) -> None:
        super().__init__()
        self.bound = nn.Parameter(torch.empty(channels))
        share = place.index / place.count
        self.start = math.log(share / (1 - share)) if share else -math.inf

    def forward(self, raw: Tensor) -> Tensor:
        bound = self.bound + self.start
        gate = F.logsigmoid(raw.to(compute_dtype(raw)))
        return torch.logaddexp(F.logsigmoid(bound), F.logsigmoid(-bound) + gate)


@register("hgrn2")
class HGRN2(Branch):
    """See the module. State: ``gla`` fp32 ``[B, H, K, V]``."""

    Config: ClassVar[type[HGRN2Config]] = HGRN2Config
    sp = "scan"

    def __init__(self, cfg: HGRN2Config, d_model: int, place: Place) -> None:
        super().__init__()
        self.cfg, self.place, self.d_model = cfg, place, d_model
        self.num_heads = whole_heads(cfg, d_model)
        self.q = nn.Linear(d_model, d_model, bias=False)
        self.f = nn.Linear(d_model, d_model, bias=False)
        self.i = nn.Linear(d_model, d_model, bias=False)
        self.forget = BoundedForget(d_model, place)
        self.out = Readout(d_model, self.num_heads, cfg.head_dim, eps=cfg.norm_eps, joint=True)

    def forward(self, x: Tensor, ctx: Context, state: State, streams: Streams) -> tuple[Tensor, State, Streams]:
        batch, length, _ = x.shape
        q, g = F.silu(self.q(x)) * self.cfg.head_dim**-0.5, self.forget(self.f(x))
        v, q, k, g = (t.view(batch, length, -1, self.cfg.head_dim) for t in (self.i(x), q, -torch.expm1(g), g))
        y, after = ctx.scan(gla, v, q, k, g, None, initial_state=state.get("gla"))
        return self.out(y, x), {"gla": after} if ctx.carries else {}, {}

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"gla": (self.num_heads, self.cfg.head_dim, self.cfg.head_dim)}

    def param_info(self) -> dict[str, ParamInfo]:
        d_model, heads, init = self.d_model, self.num_heads, normal(0.02)
        return {
            **{f"{name}.weight": matrix(init, d_model, d_model, rows=heads) for name in ("q", "f", "i")},
            "forget.bound": ParamInfo("decay", constant(0.0), fp32=True, tp_dim=0, tp_units=heads),
            **named("out", self.out.param_info(init)),
        }
