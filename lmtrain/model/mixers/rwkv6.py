"""The time mixing of RWKV-6 (arXiv 2404.05892): mixes and decays that depend on the token, by low-rank projections.

x_i = lerp(x_t, x_{t-1}, mix_i + M_i)    M = tanh(lerp(x_t, x_{t-1}, mix_x) W_1) W_2    for i of w, k, v, r, g
w = -exp(time_decay + tanh(x_w D_1) D_2)      S_t = Diag(exp(w_t)) S_{t-1} + k_t v_t^T
y_t = (S_{t-1} + Diag(u) k_t v_t^T)^T r_t     out = W_o (LayerNorm_head(y) * silu(W_g x_g))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain.errors import UsageError
from lmtrain.model.answers import Answers
from lmtrain.model.branch import Branch, ParamInfo, Place, State, Streams, matrix, named, register
from lmtrain.model.context import Context
from lmtrain.model.init import constant, fixed, orthogonal, uniform
from lmtrain.model.norm import HeadNorm
from lmtrain.model.token_shift import channels, token_shift
from lmtrain.ops import gla
from lmtrain.ops.op import Cost, compute_dtype

MIXES = "wkvrg"


@dataclass(frozen=True)
class RWKV6Config(Answers):
    """RWKV-6 time mixing."""

    kind: str = "rwkv6"
    """rwkv6"""
    head_dim: int = 64
    """Channels per head."""
    mix_rank: int = 32
    """Inner width of each mix's projection."""
    decay_rank: int = 64
    """Inner width of the decay's projection."""

    def heads(self, d_model: int) -> int:
        """UsageError unless the width divides into heads."""
        if d_model % self.head_dim:
            raise UsageError(f"rwkv6: head_dim {self.head_dim} does not divide d_model {d_model}")
        return d_model // self.head_dim

    def scan_cost(self, d_model: int, seq_len: int) -> Cost:
        shape = (1, seq_len, self.heads(d_model), self.head_dim)
        return gla.cost(shape, shape, shape, shape)


class Decay(nn.Module):
    """Log decay of every channel and the bonus of the own token, always fp32."""

    keeps_fp32 = True

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.time_decay = nn.Parameter(torch.empty(num_heads * head_dim))
        self.bonus = nn.Parameter(torch.empty(num_heads, head_dim))

    def forward(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, T, D]`` to the log decay ``[B, T, D]``; u ``[H, K]``."""
        return -torch.exp(raw.to(compute_dtype(raw)) + self.time_decay), self.bonus * 1

    def param_info(self, place: Place) -> dict[str, ParamInfo]:
        heads, head_dim = self.bonus.shape
        d_model = heads * head_dim
        ramp, zigzag = torch.arange(d_model) / max(d_model - 1, 1), (torch.arange(d_model) + 1) % 3 - 1
        decay = -6 + 5 * ramp ** (0.7 + 1.3 * place.depth)
        bonus = (place.depth * (1 - ramp) + 0.1 * zigzag).view(heads, head_dim)
        return {
            "time_decay": ParamInfo("decay", fixed(decay), fp32=True, lr_scale=2.0, tp_dim=0, tp_units=heads),
            "bonus": ParamInfo("decay", fixed(bonus), fp32=True, tp_dim=0, tp_units=heads),
        }


@register("rwkv6")
class RWKV6(Branch):
    """See the module. State: ``shift`` ``[B, 1, D]`` and ``wkv`` fp32 ``[B, H, K, V]``."""

    Config: ClassVar[type[RWKV6Config]] = RWKV6Config
    sp = "scan"

    def __init__(self, cfg: RWKV6Config, d_model: int, place: Place) -> None:
        super().__init__()
        self.cfg, self.place, self.d_model = cfg, place, d_model
        heads = cfg.heads(d_model)
        self.mix_x = nn.Parameter(torch.empty(d_model))
        self.mix = nn.Parameter(torch.empty(len(MIXES), d_model))
        self.mix_in = nn.Parameter(torch.empty(d_model, len(MIXES) * cfg.mix_rank))
        self.mix_out = nn.Parameter(torch.empty(len(MIXES), cfg.mix_rank, d_model))
        self.decay_in = nn.Parameter(torch.empty(d_model, cfg.decay_rank))
        self.decay_out = nn.Parameter(torch.empty(cfg.decay_rank, d_model))
        self.decay = Decay(heads, cfg.head_dim)
        self.r = nn.Linear(d_model, d_model, bias=False)
        self.k = nn.Linear(d_model, d_model, bias=False)
        self.v = nn.Linear(d_model, d_model, bias=False)
        self.gate = nn.Linear(d_model, d_model, bias=False)
        self.norm = HeadNorm(d_model, 64e-5)
        self.o = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, ctx: Context, state: State, streams: Streams) -> tuple[Tensor, State, Streams]:
        previous, tail = token_shift(x, ctx, state.get("shift"))
        change = previous - x
        low = torch.tanh((x + change * self.mix_x) @ self.mix_in).unflatten(-1, (len(MIXES), -1))
        moved = torch.einsum("btir,ird->ibtd", low, self.mix_out)
        x_w, x_k, x_v, x_r, x_g = (
            x + change * (share + more) for share, more in zip(self.mix.unbind(), moved.unbind(), strict=True)
        )
        g, u = self.decay(torch.tanh(x_w @ self.decay_in) @ self.decay_out)
        v, r, k, g = (t.unflatten(-1, (-1, self.cfg.head_dim)) for t in (self.v(x_v), self.r(x_r), self.k(x_k), g))
        y, after = ctx.scan(gla, v, r, k, g, u, initial_state=state.get("wkv"))
        y = self.o(self.norm(y).flatten(2) * F.silu(self.gate(x_g)))
        return y, {"shift": tail, "wkv": after} if ctx.carries else {}, {}

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        heads, head_dim = self.cfg.heads(self.d_model), self.cfg.head_dim
        return {"shift": (1, self.d_model), "wkv": (heads, head_dim, head_dim)}

    def param_info(self) -> dict[str, ParamInfo]:
        d_model, cfg, left = self.d_model, self.cfg, self.place.left
        ramp = channels(d_model)
        first = 1 - ramp**left
        shares = {"w": first, "k": first, "v": first - 0.3 * self.place.depth, "r": 1 - ramp ** (0.5 * left)}
        shares["g"] = shares["r"]
        heads, zero, small = cfg.heads(d_model), constant(0.0), uniform(-0.01, 0.01)
        after = constant(((self.place.of_kind + 1) / self.place.kind_count) ** 0.7)
        orthonormal, small_orthonormal = orthogonal(1.0), orthogonal(0.1)
        return {
            "mix_x": ParamInfo("scalar", fixed(first)),
            "mix": ParamInfo("scalar", fixed(torch.stack([shares[name] for name in MIXES]))),
            "mix_in": matrix(zero, d_model, len(MIXES) * cfg.mix_rank),
            "mix_out": matrix(small, cfg.mix_rank, d_model),
            "decay_in": matrix(zero, d_model, cfg.decay_rank),
            "decay_out": matrix(small, cfg.decay_rank, d_model),
            **named("decay", self.decay.param_info(self.place)),
            "r.weight": matrix(orthonormal, d_model, d_model, rows=heads),
            "k.weight": matrix(small_orthonormal, d_model, d_model, rows=heads),
            "v.weight": matrix(orthonormal, d_model, d_model, rows=heads),
            "gate.weight": matrix(small_orthonormal, d_model, d_model, rows=heads),
            "norm.weight": ParamInfo("norm", after, tp_dim=0, tp_units=heads),
            "norm.bias": ParamInfo("bias", zero, tp_dim=0, tp_units=heads),
            "o.weight": matrix(zero, d_model, d_model, columns=heads),
        }
