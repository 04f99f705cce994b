"""Retention (RetNet, arXiv 2307.08621): rotary queries and keys, a constant decay per head.

S_t = gamma_h S_{t-1} + rot_t(k_t) v_t^T      gamma_h = 1 - 2^{-5 - h}      y_t = S_t^T rot_t(q_t) / sqrt(K)
out = W_o (RMSNorm_head(y) * silu(W_g x))

The norm has weights and matrices start at N(0, 0.02^2), as in flash-linear-attention; in the paper it has none, and
they start at Xavier's gains 2^-2.5 (q, k, v, gate) and 2^-1 (out).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lmtrain.errors import UsageError
from lmtrain.model.answers import Answers
from lmtrain.model.branch import Branch, ParamInfo, Place, State, Streams, matrix, named, register
from lmtrain.model.context import Context
from lmtrain.model.init import normal
from lmtrain.model.readout import Readout
from lmtrain.model.rope import rotate
from lmtrain.model.settings import at_least, head_width, positive
from lmtrain.ops import ssd
from lmtrain.ops.op import Cost, compute_dtype


@dataclass(frozen=True)
class RetNetConfig(Answers):
    """Retention mixer of RetNet."""

    kind: str = "retnet"
    """retnet"""
    num_heads: int = 8
    """Heads; the later, the slower they forget."""
    expand_k: float = 1.0
    """Width of all keys over d_model."""
    expand_v: float = 2.0
    """Width of all values over d_model."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths."""
    norm_eps: float = 1e-5
    """Added to the mean square of the norm over each head."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_heads")
        positive(self, "expand_k", "expand_v", "rope_theta", "norm_eps")

    def widths(self, d_model: int) -> tuple[int, int]:
        """Key and value channels of a head. UsageError unless both are whole numbers, and keys are pairs."""
        key_dim, value_dim = (head_width(self, expand, d_model) for expand in ("expand_k", "expand_v"))
        if key_dim % 2:
            told = f"retnet: rotary keys need an even number of channels per head, got {key_dim}"
            raise UsageError(f"{told}; double expand_k")
        return key_dim, value_dim

    def scan_cost(self, d_model: int, seq_len: int) -> Cost:
        key_dim, value_dim = self.widths(d_model)
        row = (1, seq_len, self.num_heads)
        return ssd.cost((*row, value_dim), row, (*row, key_dim), (*row, key_dim))


@register("retnet")
class RetNet(Branch):
    """See the module. State: ``ssd`` fp32 ``[B, H, K, V]``."""

    Config: ClassVar[type[RetNetConfig]] = RetNetConfig
    sp = "scan"

    def __init__(self, cfg: RetNetConfig, d_model: int, place: Place) -> None:
        super().__init__()
        self.cfg, self.place, self.d_model = cfg, place, d_model
        self.key_dim, self.value_dim = cfg.widths(d_model)
        self.q = nn.Linear(d_model, cfg.num_heads * self.key_dim, bias=False)
        self.k = nn.Linear(d_model, cfg.num_heads * self.key_dim, bias=False)
        self.v = nn.Linear(d_model, cfg.num_heads * self.value_dim, bias=False)
        self.out = Readout(d_model, cfg.num_heads, self.value_dim, eps=cfg.norm_eps, gate="silu")

    def forward(self, x: Tensor, ctx: Context, state: State, streams: Streams) -> tuple[Tensor, State, Streams]:
        batch, length, _ = x.shape
        q, k = (linear(x).view(batch, length, -1, self.key_dim) for linear in (self.q, self.k))
        q, k = (rotate(t, ctx.positions, self.cfg.rope_theta) for t in (q, k))
        v = self.v(x).view(batch, length, -1, self.value_dim)
        log_decay = self.log_decay(x).expand(batch, length, -1)
        y, after = ctx.scan(ssd, v, log_decay, k, q * self.key_dim**-0.5, initial_state=state.get("ssd"))
        return self.out(y, x), {"ssd": after} if ctx.carries else {}, {}

    def log_decay(self, x: Tensor) -> Tensor:
        """``[H]``, of all heads: if x met a part of them, the scan would refuse it."""
        heads = torch.arange(self.cfg.num_heads, device=x.device, dtype=compute_dtype(x))
        return torch.log1p(-torch.exp2(-5 - heads))

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"ssd": (self.cfg.num_heads, self.key_dim, self.value_dim)}

    def param_info(self) -> dict[str, ParamInfo]:
        d_model, heads, init = self.d_model, self.cfg.num_heads, normal(0.02)
        return {
            "q.weight": matrix(init, d_model, heads * self.key_dim, rows=heads),
            "k.weight": matrix(init, d_model, heads * self.key_dim, rows=heads),
            "v.weight": matrix(init, d_model, heads * self.value_dim, rows=heads),
            **named("out", self.out.param_info(init)),
        }
