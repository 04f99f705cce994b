"""Mixture of memories (arXiv 2502.13685): several gated delta rules, of which every token uses a few.

s = softmax(W_s x), in fp32      used = top_k(s)      w = s[used] / their sum; 1 for a memory that every token uses
k_e = unit(silu(conv_k(W_k^e x)))     v_e = silu(conv_v(W_v^e x))     q_e = unit(silu(conv_q(W_q x))) / sqrt(K)
beta_e = sigmoid(W_b^e x)      g_e = -exp(A_log) softplus(W_a^e x + dt_bias)
S_e: gated_deltanet's      y = sum_used w_e S_e^T q_e      out = W_o (RMSNorm_head(y) * silu(W_g x))

W_q, convolutions, A_log and dt_bias are those of all memories. Convolutions and S_e run over the tokens that use memory
e, and over no other: one has its own query for each. A token that does not use a memory has beta = g = 0 there, which
leaves the state as it is: all memories are one scan, with so many times the heads.
Other than the authors' in training, whose convolutions run on into the next memory, so that a token sees later ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain.model.balance import balance_loss
from lmtrain.model.branch import Branch, ParamInfo, Place, State, Streams, named, register
from lmtrain.model.context import Context
from lmtrain.model.delta_inputs import unit
from lmtrain.model.ffn.router import RouterWeights
from lmtrain.model.init import log_uniform_range, normal
from lmtrain.model.mixers.mom_memory import Memory, Taps, projection, xavier
from lmtrain.model.mixers.mom_settings import MoMConfig
from lmtrain.model.readout import Readout
from lmtrain.model.state_space import DecayRate
from lmtrain.ops import delta, routed_conv
from lmtrain.ops.op import compute_dtype


@register("mom")
class MoM(Branch):
    """See the module; M: num_memories, then the shared one. State, fp32: ``delta`` ``[B, M H, K, V]``, memory after
    memory; ``latest`` ``[B, M, W - 1, H (K + K + V)]``, its last tokens before convolutions, of q, k and v."""

    Config: ClassVar[type[MoMConfig]] = MoMConfig
    sp = "scan"

    def __init__(self, cfg: MoMConfig, d_model: int, place: Place) -> None:
        super().__init__()
        self.cfg, self.place, self.d_model = cfg, place, d_model
        keys, values = cfg.num_heads * cfg.head_dim, cfg.num_heads * cfg.value_dim
        self.router = RouterWeights(d_model, cfg.num_memories, bias=False)
        self.memories = nn.ModuleList(Memory(cfg, d_model) for _ in range(cfg.memories))
        self.q = nn.Linear(d_model, keys, bias=False)
        self.q_conv = Taps(keys, cfg.conv_width)
        self.k_conv = Taps(keys, cfg.conv_width)
        self.v_conv = Taps(values, cfg.conv_width)
        self.decay = DecayRate(cfg.num_heads)
        self.out = Readout(d_model, cfg.num_heads, cfg.value_dim, eps=cfg.norm_eps, gate="silu")

    def forward(self, x: Tensor, ctx: Context, state: State, streams: Streams) -> tuple[Tensor, State, Streams]:
        x, weights, used = self._route(x, ctx)
        q, memories = self.q(x), [memory(x) for memory in self.memories]
        beta, steps = (torch.cat(parts, dim=-1) for parts in list(zip(*memories, strict=True))[2:])
        q, k, v, latest = self._convolve(q, [memory[:2] for memory in memories], used, ctx, state.get("latest"))
        beta, g = self._rates(beta, steps, used)
        y, after = ctx.scan(delta, v, q, k, beta, g, initial_state=state.get("delta"))
        y = y.to(weights.dtype).unflatten(2, (used.shape[-1], -1))
        y = self.out((y * weights[..., None, None]).sum(dim=2).to(x.dtype), x)
        return y, {"latest": latest, "delta": after} if ctx.carries else {}, {}

    def _route(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """x with the loss of its routing, weights in the computing dtype and where they count, ``[B, T, M]``."""
        scores = self.router(x).softmax(dim=-1)
        used = best(scores, self.cfg.top_k)
        if self.cfg.aux_weight:
            loss = self.cfg.aux_weight * balance_loss(used, scores, ctx)
            x = ctx.add_loss((self.place.index, "balance"), x, loss)
        weights = torch.where(used, scores, 0.0)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        if self.cfg.shared_memory:
            weights, used = F.pad(weights, (0, 1), value=1.0), F.pad(used, (0, 1), value=True)
        return x, weights, used

    def _convolve(
        self, q: Tensor, memories: list[tuple[Tensor, Tensor]], used: Tensor, ctx: Context, state: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q and k ``[B, T, M H, K]`` and v ``[B, T, M H, V]`` of q and every memory's k and v; the state to carry."""
        sizes = [t.shape[-1] for t in (q, *memories[0])]
        x = torch.cat([t for k, v in memories for t in (q, k, v)], dim=-1).unflatten(-1, (len(memories), -1))
        taps = torch.cat([self.q_conv(), self.k_conv(), self.v_conv()])
        y, after = ctx.scan(routed_conv, x, used, taps, initial_state=state)
        dims = (self.cfg.head_dim, self.cfg.head_dim, self.cfg.value_dim)
        parts = zip(y.split(sizes, dim=-1), dims, strict=True)
        q, k, v = (part.unflatten(-1, (-1, dim)) for part, dim in parts)
        q, k, v = (t.flatten(2, 3) for t in (unit(q) * self.cfg.head_dim**-0.5, unit(k), v))
        return q, k, v, after

    def _rates(self, beta: Tensor, steps: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
        """beta and g ``[B, T, M H]`` of what the memories took, 0 where a token does not use one."""
        beta, steps = (t.unflatten(-1, (used.shape[-1], -1)) for t in (beta, steps))
        dt, rates = self.decay(steps)
        beta, g = torch.sigmoid(beta.to(compute_dtype(beta))), rates * dt
        return torch.where(used[..., None], beta, 0.0).flatten(2), torch.where(used[..., None], g, 0.0).flatten(2)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        cfg = self.cfg
        channels = cfg.num_heads * (2 * cfg.head_dim + cfg.value_dim)
        return {
            "latest": (cfg.memories, cfg.conv_width - 1, channels),
            "delta": (cfg.memories * cfg.num_heads, cfg.head_dim, cfg.value_dim),
        }

    def param_info(self) -> dict[str, ParamInfo]:
        heads, taps, router = self.cfg.num_heads, normal(0.02), self.router.param_info()["weight"]
        info = {
            "router.weight": replace(router, init=xavier(self.d_model, self.cfg.num_memories)),
            "q.weight": projection(self.q, heads),
            **named("q_conv", self.q_conv.param_info(taps, heads)),
            **named("k_conv", self.k_conv.param_info(taps, heads)),
            **named("v_conv", self.v_conv.param_info(taps, heads)),
            **named("decay", self.decay.param_info(heads, log_uniform_range(0.01, 16.0))),
            **named("out", self.out.param_info(xavier(self.d_model, self.out.o.in_features))),
        }
        for name, module in self.named_modules():
            if isinstance(module, Memory):
                info |= named(name, module.param_info())
        return info


def best(scores: Tensor, count: int) -> Tensor:
    """bool ``[..., M]``: the ``count`` largest of ``scores``; of equals, the first."""
    indices = scores.detach().sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, indices, True)
