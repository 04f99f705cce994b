"""LightNet (arXiv 2405.21022): linear attention with an additive decay, so that weights over the past sum to 1.

z_t = log sum_{s<=t} exp(k_s)        S_t = exp(z_{t-1} - z_t) S_{t-1} + exp(k_t - z_t) v_t^T
y_t = S_t^T silu(q_t) / sqrt(K)      out = W_o (RMSNorm_all(y) * silu(W_g2 W_g1 x))

That is S_t = softmax_{s<=t}(k_s)^T v for each key channel, the sum over t's document: z starts anew with each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain.model.answers import Answers
from lmtrain.model.branch import Branch, ParamInfo, Place, State, Streams, matrix, named, register
from lmtrain.model.context import Context
from lmtrain.model.init import normal
from lmtrain.model.readout import Readout
from lmtrain.model.settings import at_least, positive, whole_heads
from lmtrain.ops import gla
from lmtrain.ops.log_sum_exp import log_sum_exp
from lmtrain.ops.op import Cost, compute_dtype


@dataclass(frozen=True)
class LightNetConfig(Answers):
    """LightNet mixer."""

    kind: str = "lightnet"
    """lightnet"""
    head_dim: int = 128
    """Channels per head, of keys and of values."""
    gate_rank: int = 128
    """Inner width of the output gate's projection."""
    norm_eps: float = 1e-6
    """Added to the mean square of the norm over all heads."""

    def __post_init__(self) -> None:
        at_least(self, 1, "head_dim", "gate_rank")
        positive(self, "norm_eps")

    def scan_cost(self, d_model: int, seq_len: int) -> Cost:
        """Without the few operations per key of z."""
        row = (1, seq_len, whole_heads(self, d_model), self.head_dim)
        return gla.cost(row, row, row, row)


@register("lightnet")
class LightNet(Branch):
    """See the module. State: ``gla`` fp32 ``[B, H, K, V]`` and ``z`` fp32 ``[B, 2, H * K]``."""

    Config: ClassVar[type[LightNetConfig]] = LightNetConfig
    sp = "scan"

    def __init__(self, cfg: LightNetConfig, d_model: int, place: Place) -> None:
        super().__init__()
        self.cfg, self.place, self.d_model = cfg, place, d_model
        self.num_heads = whole_heads(cfg, d_model)
        self.q = nn.Linear(d_model, d_model, bias=False)
        self.k = nn.Linear(d_model, d_model, bias=False)
        self.v = nn.Linear(d_model, d_model, bias=False)
        self.out = Readout(
            d_model, self.num_heads, cfg.head_dim, eps=cfg.norm_eps, joint=True, gate="silu", gate_rank=cfg.gate_rank
        )

    def forward(self, x: Tensor, ctx: Context, state: State, streams: Streams) -> tuple[Tensor, State, Streams]:
        batch, length, _ = x.shape
        k = self.k(x)
        k = k.to(compute_dtype(k))
        before, z = ctx.scan(log_sum_exp, k, initial_state=state.get("z"))
        total = torch.logaddexp(before, k)
        g = torch.where(before.isneginf(), k.new_zeros(()), before - total)  # a document's first: nothing to decay
        q = F.silu(self.q(x)) * self.cfg.head_dim**-0.5
        inputs = (t.view(batch, length, -1, self.cfg.head_dim) for t in (self.v(x), q, torch.exp(k - total), g))
        y, after = ctx.scan(gla, *inputs, None, initial_state=state.get("gla"))
        return self.out(y, x), {"gla": after, "z": z} if ctx.carries else {}, {}

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"gla": (self.num_heads, self.cfg.head_dim, self.cfg.head_dim), "z": (2, self.d_model)}

    def param_info(self) -> dict[str, ParamInfo]:
        d_model, heads, init = self.d_model, self.num_heads, normal(0.02)
        return {
            **{f"{name}.weight": matrix(init, d_model, d_model, rows=heads) for name in ("q", "k", "v")},
            **named("out", self.out.param_info(init)),
        }
