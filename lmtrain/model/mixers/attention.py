"""Softmax attention: MHA, GQA or MQA, rotary or no positions, per-head QK-norm, sliding window.

o_i = sum_j softmax_j(q_i . k_j / sqrt(K)) v_j over the j of i's document, at most ``window`` of them, i included
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from lmtrain.errors import UsageError
from lmtrain.model.branch import Branch, ParamInfo, Place, State, Streams, register
from lmtrain.model.context import Context
from lmtrain.model.init import normal
from lmtrain.model.norm import RMSNorm
from lmtrain.model.rope import rotate


@dataclass(frozen=True)
class AttentionConfig:
    """Softmax attention mixer."""

    num_heads: int
    """Query heads."""
    kind: str = "attention"
    """attention"""
    num_kv_heads: int | None = None
    """Key and value heads; default: num_heads."""
    head_dim: int | None = None
    """Channels per head; default: d_model / num_heads."""
    rope: bool = True
    """Rotary positions; false: none (NoPE)."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths."""
    qk_norm: bool = False
    """RMSNorm on every query and key head before the rotation (Qwen3)."""
    window: int | None = None
    """Tokens a query sees, itself included; null: its whole document."""

    def __post_init__(self) -> None:
        for key in ("num_heads", "num_kv_heads", "head_dim", "window"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UsageError(f"attention: {key}: expected at least 1, got {value}")
        if self.num_heads % self.kv_heads:
            raise UsageError(f"attention: num_kv_heads {self.kv_heads} does not divide num_heads {self.num_heads}")

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    def width(self, d_model: int) -> int:
        """Channels per head. Raises UsageError where it is neither given nor a whole number, or odd under rope."""
        if self.head_dim is None and d_model % self.num_heads:
            lower = max(h for h in range(1, self.num_heads + 1) if d_model % h == 0)
            raise UsageError(
                f"attention: d_model {d_model} does not divide by num_heads {self.num_heads}; "
                f"set head_dim, or num_heads {lower}"
            )
        width = self.head_dim or d_model // self.num_heads
        if self.rope and width % 2:
            raise UsageError(f"attention: rope needs an even head_dim, got {width}")
        return width

    def num_params(self, d_model: int, active: bool = False) -> int:
        width = self.width(d_model)
        return 2 * d_model * width * (self.num_heads + self.kv_heads) + (2 * width if self.qk_norm else 0)

    def flops_per_token(self, d_model: int, seq_len: int, executed: bool = False) -> int:
        width = self.width(d_model)
        span = min(self.window or seq_len, seq_len)
        keys = seq_len if executed else span - span * (span - 1) / (2 * max(seq_len, 1))  # mean keys seen by a query
        projections = 4 * d_model * width * (self.num_heads + self.kv_heads)
        return projections + int(4 * self.num_heads * width * keys)

    def state_bytes(self, d_model: int, batch: int, seq_len: int) -> int:
        kept = seq_len if self.window is None else min(seq_len, self.window - 1)
        return 4 * batch * kept * 2 * self.kv_heads * self.width(d_model)


@register("attention")
class Attention(Branch):
    """See the module. State: ``cache``, opaque, what the context keeps of keys and values."""

    Config: ClassVar[type[AttentionConfig]] = AttentionConfig
    sp = "heads"

    def __init__(self, cfg: AttentionConfig, d_model: int, place: Place) -> None:
        super().__init__()
        self.cfg, self.place, self.d_model = cfg, place, d_model
        self.head_dim = cfg.width(d_model)
        self.q = nn.Linear(d_model, cfg.num_heads * self.head_dim, bias=False)
        self.k = nn.Linear(d_model, cfg.kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(d_model, cfg.kv_heads * self.head_dim, bias=False)
        self.o = nn.Linear(cfg.num_heads * self.head_dim, d_model, bias=False)
        if cfg.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(self.head_dim, 1e-6), RMSNorm(self.head_dim, 1e-6)

    def forward(self, x: Tensor, ctx: Context, state: State, streams: Streams) -> tuple[Tensor, State, Streams]:
        batch, length, _ = x.shape
        q, k, v = (linear(x).view(batch, length, -1, self.head_dim) for linear in (self.q, self.k, self.v))
        if self.cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.cfg.rope:
            q, k = (rotate(t, ctx.positions, self.cfg.rope_theta) for t in (q, k))
        scale = 1 / math.sqrt(self.head_dim)
        o, cache = ctx.attention(q, k, v, window=self.cfg.window, scale=scale, cache=state.get("cache"))
        return self.o(o.reshape(batch, length, -1)), {} if cache is None else {"cache": cache}, {}

    def param_info(self) -> dict[str, ParamInfo]:
        cfg, d_model, inner = self.cfg, self.d_model, self.cfg.num_heads * self.head_dim
        std = 0.02

        def matrix(heads: int) -> ParamInfo:
            fan_out = heads * self.head_dim
            return ParamInfo("matrix", normal(std), True, fan_in=d_model, fan_out=fan_out, tp_dim=0, tp_units=heads)

        out = normal(std / math.sqrt(self.place.count))
        info = {
            "q.weight": matrix(cfg.num_heads),
            "k.weight": matrix(cfg.kv_heads),
            "v.weight": matrix(cfg.kv_heads),
            "o.weight": ParamInfo("matrix", out, True, fan_in=inner, fan_out=d_model, tp_dim=1, tp_units=cfg.num_heads),
        }
        if cfg.qk_norm:
            info |= {"q_norm.weight": self.q_norm.param_info()["weight"]}
            info |= {"k_norm.weight": self.k_norm.param_info()["weight"]}
        return info
