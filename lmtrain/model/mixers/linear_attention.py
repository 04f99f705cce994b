"""Linear attention (arXiv 2006.16236), and lightning attention as in MiniMax-01 (arXiv 2501.08313).

none:       S_t = S_{t-1} + phi(k_t) v_t^T        y_t = S_t^T phi(q_t) / sqrt(K)      out = W_o RMSNorm_head(y)
lightning:  S_t = exp(-s_h) S_{t-1} + silu(k_t) silu(v_t)^T      y_t = S_t^T silu(q_t)
            s_h = 2^{-8 (h + 1) / H} (1 - l / (L - 1 + 1e-5) + 1e-5)    out = W_o (sigmoid(W_g x) * RMSNorm_all(y))

The norm takes the place of the paper's denominator: dividing y by a positive number does not change it. In s_h, layer l
of L, from 0, is two branches, a mixer and its feed-forward: the first layer forgets fastest, the last hardly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain.errors import UsageError
from lmtrain.model.answers import Answers
from lmtrain.model.branch import Branch, ParamInfo, Place, State, Streams, matrix, named, register
from lmtrain.model.context import Context
from lmtrain.model.init import normal
from lmtrain.model.readout import Readout
from lmtrain.model.settings import at_least, divisor_near, positive
from lmtrain.ops import ssd
from lmtrain.ops.op import Cost, compute_dtype

# in the computing dtype: bf16 would round exp(x) - 1 + 1 of a negative x to 0
FEATURES = {"elu": lambda x: F.elu(x.to(compute_dtype(x))) + 1, "relu": F.relu, "identity": lambda x: x}

BRANCHES_PER_LAYER = 2
"""By which lightning counts layers."""


@dataclass(frozen=True)
class LinearAttentionConfig(Answers):
    """Linear attention mixer, without decay or with the constant one of lightning attention."""

    kind: str = "linear_attention"
    """linear_attention"""
    num_heads: int = 4
    """Heads."""
    head_dim: int | None = None
    """Channels per head, of keys and of values; default: d_model / num_heads."""
    decay: Literal["none", "lightning"] = "none"
    """none, or lightning: MiniMax's layer, which also activates values and gates its output."""
    feature_map: Literal["elu", "relu", "identity"] | None = None
    """Map of queries and keys: elu (elu(x) + 1), relu or identity; default: elu. Lightning has its own."""
    norm_eps: float = 1e-5
    """Added to the mean square of the output's norm; MiniMax: 1e-6."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_heads", "head_dim")
        positive(self, "norm_eps")
        if self.decay == "lightning" and self.feature_map is not None:
            raise UsageError(
                f"linear_attention: feature_map {self.feature_map}: lightning has silu and no other; leave it out, "
                f"or set decay none"
            )

    def width(self, d_model: int) -> int:
        """Channels per head. UsageError where it is neither given nor a whole number."""
        if self.head_dim is None and d_model % self.num_heads:
            works = divisor_near(d_model, self.num_heads)
            told = f"d_model {d_model} does not divide by num_heads {self.num_heads}"
            raise UsageError(f"linear_attention: {told}; set head_dim, or num_heads {works}")
        return self.head_dim or d_model // self.num_heads

    def scan_cost(self, d_model: int, seq_len: int) -> Cost:
        row = (1, seq_len, self.num_heads, self.width(d_model))
        return ssd.cost(row, row[:3], row, row)


def slopes(heads: Tensor, place: Place) -> Tensor:
    """s_h of lightning attention, of all heads ``[H]``, given as 0 to H - 1 in the dtype to compute in."""
    layer, last = place.index // BRANCHES_PER_LAYER, (place.count - 1) // BRANCHES_PER_LAYER
    return torch.exp2(-8 * (heads + 1) / len(heads)) * (1 - layer / (last + 1e-5) + 1e-5)


@register("linear_attention")
class LinearAttention(Branch):
    """See the module. State: ``ssd`` fp32 ``[B, H, K, V]``."""

    Config: ClassVar[type[LinearAttentionConfig]] = LinearAttentionConfig
    sp = "scan"

    def __init__(self, cfg: LinearAttentionConfig, d_model: int, place: Place) -> None:
        super().__init__()
        self.cfg, self.place, self.d_model = cfg, place, d_model
        self.head_dim = cfg.width(d_model)
        inner = cfg.num_heads * self.head_dim
        self.q = nn.Linear(d_model, inner, bias=False)
        self.k = nn.Linear(d_model, inner, bias=False)
        self.v = nn.Linear(d_model, inner, bias=False)
        lightning = cfg.decay == "lightning"
        gate: Literal["sigmoid"] | None = "sigmoid" if lightning else None
        self.out = Readout(d_model, cfg.num_heads, self.head_dim, eps=cfg.norm_eps, joint=lightning, gate=gate)

    def forward(self, x: Tensor, ctx: Context, state: State, streams: Streams) -> tuple[Tensor, State, Streams]:
        batch, length, _ = x.shape
        q, k, v = (linear(x).view(batch, length, -1, self.head_dim) for linear in (self.q, self.k, self.v))
        if self.cfg.decay == "lightning":
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        else:
            phi = FEATURES[self.cfg.feature_map or "elu"]
            q, k = phi(q) * self.head_dim**-0.5, phi(k)
        log_decay = self.log_decay(x).expand(batch, length, -1)
        y, after = ctx.scan(ssd, v, log_decay, k, q, initial_state=state.get("ssd"))
        return self.out(y, x), {"ssd": after} if ctx.carries else {}, {}

    def log_decay(self, x: Tensor) -> Tensor:
        """``[H]``, of all heads: if x met a part of them, the scan would refuse it."""
        heads = torch.arange(self.cfg.num_heads, device=x.device, dtype=compute_dtype(x))
        if self.cfg.decay == "none":
            return torch.zeros_like(heads)
        return -slopes(heads, self.place)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"ssd": (self.cfg.num_heads, self.head_dim, self.head_dim)}

    def param_info(self) -> dict[str, ParamInfo]:
        heads, init = self.cfg.num_heads, normal(0.02)
        inner = heads * self.head_dim
        return {
            **{f"{name}.weight": matrix(init, self.d_model, inner, rows=heads) for name in ("q", "k", "v")},
            **named("out", self.out.param_info(init)),
        }
