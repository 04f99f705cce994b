"""The time mixing of RWKV-7 (arXiv 2503.14456): a generalised delta rule with a decay and a rate per channel.

x_i = lerp(x_t, x_{t-1}, mix_i) for i of r, w, k, v, a, g         r, k, v = W x_r, W x_k, W x_v
log w = -e^{-1/2} sigmoid(w_0 + tanh(x_w W_1) W_2)      a = sigmoid(a_0 + x_a A_1 A_2)      g = sigmoid(x_g G_1) G_2
v += (v_first - v) sigmoid(v_0 + x_v V_1 V_2) but in the first layer, whose v is v_first
kappa = unit(k * k_k)      k~ = k * (1 + (a - 1) * k_a)      S_t = Diag(w) S - (kappa * a) (kappa^T S) + k~ v^T
out = W_o ((LayerNorm_head(S_t^T r) + (r . (k~ * r_k)) v) * g)
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
from lmtrain.model.init import constant, fixed, orthogonal
from lmtrain.model.low_rank import LowRank, Offset
from lmtrain.model.norm import HeadNorm
from lmtrain.model.settings import at_least, whole_heads
from lmtrain.model.token_shift import TokenMix, channels, token_shift
from lmtrain.ops import dplr
from lmtrain.ops.op import Cost

MIXES = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}  # and how fast the first share falls
RANKS = {"decay": 2.5, "rate": 2.5, "value": 1.7, "gate": 5.0}  # over sqrt(d_model)


@dataclass(frozen=True)
class RWKV7Config(Answers):
    """RWKV-7 time mixing. Ranks are by default what the authors' training code takes for the width."""

    kind: str = "rwkv7"
    """rwkv7"""
    head_dim: int = 64
    """Channels per head."""
    decay_rank: int | None = None
    """Inner width of the decay's projection."""
    rate_rank: int | None = None
    """Inner width of the in-context learning rate's projection."""
    value_rank: int | None = None
    """Inner width of the projection that mixes in the first layer's values."""
    gate_rank: int | None = None
    """Inner width of the output gate's projection."""

    def __post_init__(self) -> None:
        at_least(self, 1, "head_dim", *(f"{name}_rank" for name in RANKS))

    def rank(self, name: str, d_model: int) -> int:
        given: int | None = getattr(self, f"{name}_rank")
        return given or max(32, 32 * round(RANKS[name] * math.sqrt(d_model) / 32))

    def scan_cost(self, d_model: int, seq_len: int) -> Cost:
        return dplr.cost(*6 * ((1, seq_len, whole_heads(self, d_model), self.head_dim),))


@register("rwkv7")
class RWKV7(Branch):
    """See above. State: ``shift`` ``[B, 1, D]``, ``wkv`` fp32 ``[B, H, K, V]``. Stream ``v_first`` ``[B, T, D]``."""

    Config: ClassVar[type[RWKV7Config]] = RWKV7Config
    reads = writes = frozenset({"v_first"})
    sp = "scan"

    def __init__(self, cfg: RWKV7Config, d_model: int, place: Place) -> None:
        super().__init__()
        self.cfg, self.place, self.d_model, self.num_heads = cfg, place, d_model, whole_heads(cfg, d_model)
        self.mix = TokenMix(d_model, len(MIXES))
        self.r, self.k, self.v, self.o = (nn.Linear(d_model, d_model, bias=False) for _ in range(4))
        self.decay_raw, self.decay = LowRank(d_model, cfg.rank("decay", d_model), torch.tanh), Offset(d_model)
        self.rate_raw, self.rate = LowRank(d_model, cfg.rank("rate", d_model)), Offset(d_model)
        if place.of_kind:
            self.value_raw, self.value = LowRank(d_model, cfg.rank("value", d_model)), Offset(d_model)
        self.gate = LowRank(d_model, cfg.rank("gate", d_model), torch.sigmoid)
        self.k_k, self.k_a = (nn.Parameter(torch.empty(d_model)) for _ in range(2))
        self.r_k = nn.Parameter(torch.empty(self.num_heads, cfg.head_dim))
        self.norm = HeadNorm(d_model, 64e-5)

    def forward(self, x: Tensor, ctx: Context, state: State, streams: Streams) -> tuple[Tensor, State, Streams]:
        previous, tail = token_shift(x, ctx, state.get("shift"))
        x_r, x_w, x_k, x_v, x_a, x_g = self.mix(x, previous)
        r, k, v = self.r(x_r), self.k(x_k), self.v(x_v)
        log_w = -math.exp(-0.5) * self.decay(self.decay_raw(x_w))
        a = self.rate(self.rate_raw(x_a))
        written = {}
        if self.place.of_kind:
            v = v + (streams["v_first"] - v) * self.value(self.value_raw(x_v)).to(v.dtype)
        else:
            written["v_first"] = v
        wide = k.to(a.dtype)
        kappa = F.normalize(self._by_head(wide * self.k_k), dim=-1, eps=1e-12)
        key = self._by_head(wide * (1 + (a - 1) * self.k_a))
        v, r, log_w, a = (self._by_head(t) for t in (v, r, log_w, a))
        y, after = ctx.scan(dplr, v, r, log_w, key, -kappa, kappa * a, initial_state=state.get("wkv"))
        bonus = (r * key * self.r_k).sum(dim=-1, keepdim=True) * v
        y = self.o((self.norm(y) + bonus.to(y.dtype)).flatten(2) * self.gate(x_g))
        return y, {"shift": tail, "wkv": after} if ctx.carries else {}, written

    def _by_head(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (-1, self.cfg.head_dim))

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"shift": (1, self.d_model), "wkv": (self.num_heads, self.cfg.head_dim, self.cfg.head_dim)}

    def param_info(self) -> dict[str, ParamInfo]:
        d_model, place, heads, width = self.d_model, self.place, self.num_heads, self.cfg.head_dim
        ramp = torch.arange(d_model) / max(d_model - 1, 1)
        linear, half = ramp - 0.5, (width - 1) / 2
        within = (torch.arange(d_model) % width - half) / max(half, 0.5)  # -1 to 1 in every head
        zigzag = within * within.abs()
        decay = -6 + 6 * ramp ** (1 + place.depth**0.3) + 0.5 + 2.5 * zigzag
        shares = [1 - channels(d_model) ** (fall * place.left) for fall in MIXES.values()]
        info = named("mix", self.mix.param_info(shares))
        for name, module in self.named_children():
            if isinstance(module, LowRank):
                info |= named(name, module.param_info())
        info |= named("decay", self.decay.param_info(decay, heads, lr_scale=2.0))
        info |= named("rate", self.rate.param_info(-0.19 + 0.3 * zigzag + 0.4 * linear, heads))
        if place.of_kind:
            info |= named("value", self.value.param_info(0.73 - 0.4 * linear, heads))
        for name, gain in (("r", 1.0), ("k", 0.1), ("v", 1.0)):
            info[f"{name}.weight"] = matrix(orthogonal(gain), d_model, d_model, rows=heads)
        for name, init in (("k_k", fixed(0.71 - 0.1 * linear)), ("k_a", constant(1.02)), ("r_k", constant(-0.04))):
            info[name] = ParamInfo("scalar", init, tp_dim=0, tp_units=heads)
        return info | {
            "norm.weight": ParamInfo(
                "norm", constant(((place.of_kind + 1) / place.kind_count) ** 0.7), tp_dim=0, tp_units=heads
            ),
            "norm.bias": ParamInfo("bias", constant(0.0), tp_dim=0, tp_units=heads),
            "o.weight": matrix(constant(0.0), d_model, d_model, columns=heads),
        }
