"""The time mixing of RWKV-6 (arXiv 2404.05892): mixes and decays that depend on the token, by low-rank projections.

x_i = lerp(x_t, x_{t-1}, mix_i + M_i)    M = tanh(lerp(x_t, x_{t-1}, mix_x) W_1) W_2    for i of w, k, v, r, g
w = -exp(time_decay + tanh(x_w D_1) D_2)      S_t = Diag(exp(w_t)) S_{t-1} + k_t v_t^T
y_t = (S_{t-1} + Diag(u) k_t v_t^T)^T r_t     out = W_o (LayerNorm_head(y) * silu(W_g x_g))
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain.model.answers import Answers
from lmtrain.model.branch import Branch, ParamInfo, Place, State, Streams, matrix, named, register
from lmtrain.model.context import Context
from lmtrain.model.init import constant, fixed, orthogonal, uniform
from lmtrain.model.norm import HeadNorm
from lmtrain.model.settings import at_least, whole_heads
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

    def __post_init__(self) -> None:
        at_least(self, 1, "head_dim", "mix_rank", "decay_rank")

    def scan_cost(self, d_model: int, seq_len: int) -> Cost:
        shape = (1, seq_len, whole_heads(self, d_model), self.head_dim)
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
        self.cfg, self.place, self.d_model, self.num_heads = cfg, place, d_model, whole_heads(cfg, d_model)
        self.mix_x = nn.Parameter(torch.empty(d_model))
        self.mix = nn.Parameter(torch.empty(len(MIXES), d_model))
        self.mix_in = nn.Parameter(torch.empty(d_model, len(MIXES) * cfg.mix_rank))
        self.mix_out = nn.Parameter(torch.empty(len(MIXES), cfg.mix_rank, d_model))
        self.decay_in = nn.Parameter(torch.empty(d_model, cfg.decay_rank))
        self.decay_out = nn.Parameter(torch.empty(cfg.decay_rank, d_model))
        self.decay = Decay(self.num_heads, cfg.head_dim)
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
        log_w, u = self.decay(torch.tanh(x_w @ self.decay_in) @ self.decay_out)
        r, k, v = self.r(x_r), self.k(x_k), self.v(x_v)
        v, r, k, log_w = (t.unflatten(-1, (-1, self.cfg.head_dim)) for t in (v, r, k, log_w))
        y, after = ctx.scan(gla, v, r, k, log_w, u, initial_state=state.get("wkv"))
        y = self.o(self.norm(y).flatten(2) * F.silu(self.gate(x_g)))
        return y, {"shift": tail, "wkv": after} if ctx.carries else {}, {}

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"shift": (1, self.d_model), "wkv": (self.num_heads, self.cfg.head_dim, self.cfg.head_dim)}

    def param_info(self) -> dict[str, ParamInfo]:
        d_model, cfg, place, heads = self.d_model, self.cfg, self.place, self.num_heads
        ramp, zero, small = channels(d_model), constant(0.0), uniform(-0.01, 0.01)
        first = 1 - ramp**place.left
        shares = {"w": first, "k": first, "v": first - 0.3 * place.depth, "r": 1 - ramp ** (0.5 * place.left)}
        shares["g"] = shares["r"]
        narrow = {
            "mix_in": matrix(zero, d_model, len(MIXES) * cfg.mix_rank),
            "mix_out": matrix(small, cfg.mix_rank, d_model),
            "decay_in": matrix(zero, d_model, cfg.decay_rank),
            "decay_out": matrix(small, cfg.decay_rank, d_model),
        }
        gains = {"r": 1.0, "k": 0.1, "v": 1.0, "gate": 0.1}
        after = constant(((place.of_kind + 1) / place.kind_count) ** 0.7)
        return {
            "mix_x": ParamInfo("scalar", fixed(first)),
            "mix": ParamInfo("scalar", fixed(torch.stack([shares[name] for name in MIXES]))),
            **{name: replace(info, decay=False) for name, info in narrow.items()},
            **named("decay", self.decay.param_info(place)),
            **{f"{k}.weight": matrix(orthogonal(gain), d_model, d_model, rows=heads) for k, gain in gains.items()},
            "norm.weight": ParamInfo("norm", after, tp_dim=0, tp_units=heads),
            "norm.bias": ParamInfo("bias", zero, tp_dim=0, tp_units=heads),
            "o.weight": matrix(zero, d_model, d_model, columns=heads),
        }
