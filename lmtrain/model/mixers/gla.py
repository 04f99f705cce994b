"""Gated linear attention (arXiv 2312.06635): a decay per key channel, from a low-rank projection of the token.

g = log sigmoid(W_2 W_1 x + b) / 16      S_t = Diag(exp(g_t)) S_{t-1} + k_t v_t^T      y_t = S_t^T q_t / sqrt(K)
out = W_o (RMSNorm_head(y) * silu(W_g x))
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
from lmtrain.model.init import constant, normal
from lmtrain.model.readout import Readout
from lmtrain.model.settings import at_least, head_width, positive
from lmtrain.ops import gla
from lmtrain.ops.op import Cost, compute_dtype


@dataclass(frozen=True)
class GLAConfig(Answers):
    """Gated linear attention mixer."""

    kind: str = "gla"
    """gla"""
    num_heads: int = 4
    """Heads."""
    expand_k: float = 0.5
    """Width of all keys over d_model."""
    expand_v: float = 1.0
    """Width of all values over d_model."""
    gate_rank: int = 16
    """Inner width of the decay's projection."""
    gate_normalizer: float = 16.0
    """Divisor of the log decay: the larger, the slower heads forget at first."""
    norm_eps: float = 1e-5
    """Added to the mean square of the norm over each head."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_heads", "gate_rank")
        positive(self, "expand_k", "expand_v", "gate_normalizer", "norm_eps")

    def widths(self, d_model: int) -> tuple[int, int]:
        """Key and value channels of a head. UsageError unless both are whole numbers of at least 1."""
        return head_width(self, "expand_k", d_model), head_width(self, "expand_v", d_model)

    def scan_cost(self, d_model: int, seq_len: int) -> Cost:
        key_dim, value_dim = self.widths(d_model)
        keys = (1, seq_len, self.num_heads, key_dim)
        return gla.cost((1, seq_len, self.num_heads, value_dim), keys, keys, keys)


class LogDecay(nn.Module):
    """``log sigmoid(raw + bias) / normalizer``, always fp32."""

    keeps_fp32 = True

    def __init__(self, channels: int, normalizer: float) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(channels))
        self.normalizer = normalizer

    def forward(self, raw: Tensor) -> Tensor:
        return F.logsigmoid(raw.to(compute_dtype(raw)) + self.bias) / self.normalizer


@register("gla")
class GatedLinearAttention(Branch):
    """See the module. State: ``gla`` fp32 ``[B, H, K, V]``."""

    Config: ClassVar[type[GLAConfig]] = GLAConfig
    sp = "scan"

    def __init__(self, cfg: GLAConfig, d_model: int, place: Place) -> None:
        super().__init__()
        self.cfg, self.place, self.d_model = cfg, place, d_model
        self.key_dim, self.value_dim = cfg.widths(d_model)
        keys, values = cfg.num_heads * self.key_dim, cfg.num_heads * self.value_dim
        self.q = nn.Linear(d_model, keys, bias=False)
        self.k = nn.Linear(d_model, keys, bias=False)
        self.v = nn.Linear(d_model, values, bias=False)
        self.decay_in = nn.Linear(d_model, cfg.gate_rank, bias=False)
        self.decay_out = nn.Linear(cfg.gate_rank, keys, bias=False)
        self.decay = LogDecay(keys, cfg.gate_normalizer)
        self.out = Readout(d_model, cfg.num_heads, self.value_dim, eps=cfg.norm_eps, gate="silu")

    def forward(self, x: Tensor, ctx: Context, state: State, streams: Streams) -> tuple[Tensor, State, Streams]:
        batch, length, _ = x.shape
        g = self.decay(self.decay_out(self.decay_in(x)))
        q, k, g = (t.view(batch, length, -1, self.key_dim) for t in (self.q(x), self.k(x), g))
        v = self.v(x).view(batch, length, -1, self.value_dim)
        q = q * self.key_dim**-0.5
        y, after = ctx.scan(gla, v, q, k, g, None, initial_state=state.get("gla"))
        return self.out(y, x), {"gla": after} if ctx.carries else {}, {}

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"gla": (self.cfg.num_heads, self.key_dim, self.value_dim)}

    def param_info(self) -> dict[str, ParamInfo]:
        d_model, heads, rank, init = self.d_model, self.cfg.num_heads, self.cfg.gate_rank, normal(0.02)
        keys, values = heads * self.key_dim, heads * self.value_dim
        return {
            "q.weight": matrix(init, d_model, keys, rows=heads),
            "k.weight": matrix(init, d_model, keys, rows=heads),
            "v.weight": matrix(init, d_model, values, rows=heads),
            "decay_in.weight": matrix(init, d_model, rank),
            "decay_out.weight": matrix(init, rank, keys, rows=heads),
            "decay.bias": ParamInfo("decay", constant(0.0), fp32=True, tp_dim=0, tp_units=heads),
            **named("out", self.out.param_info(init)),
        }
