"""Multi-head latent attention of DeepSeek (arXiv 2405.04434): keys and values of all heads from one small latent.

c = RMSNorm(W_a x) [R]      k_h = [W_k^h c | rotate(W_r x)]      v_h = W_v^h c      q_h = [q_h^n | rotate(q_h^r)]
o_h = softmax(q_h . k_h / sqrt(K_n + K_r)) v_h

The rotated part of the key is one for all heads. Where state is carried, queries are taken through W_k^h to the latent,
where they meet c itself as one key head and one value head: 2 R + K_r numbers a token, whatever the number of heads.
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
from lmtrain.model.init import normal
from lmtrain.model.norm import RMSNorm
from lmtrain.model.rope import rotate
from lmtrain.model.settings import at_least, positive
from lmtrain.ops.op import Cost

NORM_EPS = 1e-6


@dataclass(frozen=True)
class MLAConfig(Answers):
    """Multi-head latent attention mixer."""

    num_heads: int
    """Heads."""
    kind: str = "mla"
    """mla"""
    kv_rank: int = 512
    """Width of the latent that keys and values come from."""
    q_rank: int | None = None
    """Width of the latent that queries come from; null: they come from the input."""
    nope_dim: int = 128
    """Channels of a query or key head without position."""
    rope_dim: int = 64
    """Channels of a query or key head that turn; the keys' are shared by all heads."""
    value_dim: int = 128
    """Channels of a value head."""
    rope: bool = True
    """Turn them; false: none of it (Kimi)."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_heads", "kv_rank", "q_rank", "nope_dim", "rope_dim", "value_dim")
        positive(self, "rope_theta")
        if self.rope and self.rope_dim % 2:
            raise UsageError(f"mla: rope_dim: expected an even number, got {self.rope_dim}")

    @property
    def kv_heads(self) -> int:
        return self.num_heads

    @property
    def key_dim(self) -> int:
        return self.nope_dim + self.rope_dim

    def scan_cost(self, d_model: int, seq_len: int) -> Cost:
        """As trained, with keys and values of every head: two products per query, head and key."""
        pair = 2 * self.num_heads * (self.key_dim + self.value_dim)
        return Cost(pair * (seq_len * (seq_len + 1) // 2), pair * seq_len**2, 0)

    def state_bytes(self, d_model: int, batch: int, seq_len: int) -> int:
        return 4 * batch * seq_len * (2 * self.kv_rank + self.rope_dim)


@register("mla")
class MLA(Branch):
    """See the module. State: ``cache``, opaque: one key head (the latent and the rotated part), one value head."""

    Config: ClassVar[type[MLAConfig]] = MLAConfig
    sp = "heads"

    def __init__(self, cfg: MLAConfig, d_model: int, place: Place) -> None:
        super().__init__()
        self.cfg, self.place, self.d_model = cfg, place, d_model
        heads, rank = cfg.num_heads, cfg.kv_rank
        if cfg.q_rank is not None:
            self.q_down = nn.Linear(d_model, cfg.q_rank, bias=False)
            self.q_norm = RMSNorm(cfg.q_rank, NORM_EPS)
        self.q = nn.Linear(cfg.q_rank or d_model, heads * cfg.key_dim, bias=False)
        self.latent = nn.Linear(d_model, rank, bias=False)
        self.latent_norm = RMSNorm(rank, NORM_EPS)
        self.k_rope = nn.Linear(d_model, cfg.rope_dim, bias=False)
        self.k = nn.Linear(rank, heads * cfg.nope_dim, bias=False)
        self.v = nn.Linear(rank, heads * cfg.value_dim, bias=False)
        self.o = nn.Linear(heads * cfg.value_dim, d_model, bias=False)

    def forward(self, x: Tensor, ctx: Context, state: State, streams: Streams) -> tuple[Tensor, State, Streams]:
        cfg, (batch, length, _) = self.cfg, x.shape
        queries = self.q(x if cfg.q_rank is None else self.q_norm(self.q_down(x))).unflatten(-1, (-1, cfg.key_dim))
        q_nope, q_rope = queries.split((cfg.nope_dim, cfg.rope_dim), dim=-1)
        c, k_rope = self.latent_norm(self.latent(x)), self.k_rope(x)[:, :, None]
        if cfg.rope:
            q_rope, k_rope = (rotate(t, ctx.positions, cfg.rope_theta, interleaved=True) for t in (q_rope, k_rope))
        scale = 1 / math.sqrt(cfg.key_dim)
        if ctx.carries:
            by_head = self.k.weight.unflatten(0, (-1, cfg.nope_dim))  # [H, K_n, R]
            q = torch.cat([torch.einsum("bthk,hkr->bthr", q_nope, by_head), q_rope], dim=-1)
            k, v = torch.cat([c[:, :, None], k_rope], dim=-1), c[:, :, None]
            read, cache = ctx.attention(q, k, v, window=None, scale=scale, cache=state.get("cache"))
            o = torch.einsum("bthr,hvr->bthv", read, self.v.weight.unflatten(0, (-1, cfg.value_dim)))
        else:
            k = self.k(c).unflatten(-1, (-1, cfg.nope_dim))
            k = torch.cat([k, k_rope.expand(-1, -1, k.shape[2], -1)], dim=-1)
            v = self.v(c).unflatten(-1, (-1, cfg.value_dim))
            q = torch.cat([q_nope, q_rope], dim=-1)
            o, cache = ctx.attention(q, k, v, window=None, scale=scale, cache=None)
        return self.o(o.reshape(batch, length, -1)), {} if cache is None else {"cache": cache}, {}

    def param_info(self) -> dict[str, ParamInfo]:
        cfg, d_model, heads, std = self.cfg, self.d_model, self.cfg.num_heads, normal(0.02)
        info: dict[str, ParamInfo] = {}
        if cfg.q_rank is not None:
            info["q_down.weight"] = matrix(std, d_model, cfg.q_rank)
            info |= named("q_norm", self.q_norm.param_info())
        out = normal(0.02 / math.sqrt(self.place.count))
        return {
            **info,
            "q.weight": matrix(std, cfg.q_rank or d_model, heads * cfg.key_dim, rows=heads),
            "latent.weight": matrix(std, d_model, cfg.kv_rank),
            **named("latent_norm", self.latent_norm.param_info()),
            "k_rope.weight": matrix(std, d_model, cfg.rope_dim),
            "k.weight": matrix(std, cfg.kv_rank, heads * cfg.nope_dim, rows=heads),
            "v.weight": matrix(std, cfg.kv_rank, heads * cfg.value_dim, rows=heads),
            "o.weight": matrix(out, heads * cfg.value_dim, d_model, columns=heads),
        }
