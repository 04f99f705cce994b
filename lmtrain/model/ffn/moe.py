"""Mixture of experts, dropless: each token's ``top_k`` experts of ``num_experts``, plus shared experts for all.

    s = softmax(W_r x) or sigmoid(W_r x), in fp32   chosen = top_k(s, or s + bias)   w = s[chosen] (/ their sum) * scale
    y = sum_chosen w_e expert_e(x) + shared(x)          expert(x) = W_down f(W_up x), or gated as in SwiGLU

Balance: ``aux`` is Switch's loss per row (arXiv 2101.03961, eq. 4-6, on one sequence), which no mesh and no
accumulation changes; ``bias`` adds to the scores, for the choice alone, a bias moved against the load once per
optimizer step (arXiv 2408.15664).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain.errors import UsageError
from lmtrain.model.branch import Branch, ParamInfo, Place, State, Streams, register
from lmtrain.model.context import Context
from lmtrain.model.ffn.mlp import MLP, MLPConfig, activate
from lmtrain.model.init import normal
from lmtrain.ops.grouped import grouped_mm
from lmtrain.ops.op import compute_dtype


@dataclass(frozen=True)
class MoEConfig:
    """Mixture-of-experts branch."""

    num_experts: int
    """Routed experts."""
    top_k: int
    """Experts a token uses."""
    d_expert: int
    """Hidden width of a routed expert."""
    kind: str = "moe"
    """moe"""
    num_shared: int = 0
    """Shared experts, which every token uses; together they are one MLP."""
    d_shared: int | None = None
    """Hidden width of one shared expert; default: d_expert."""
    activation: Literal["swiglu", "gelu", "relu2"] = "swiglu"
    """swiglu (gated), gelu (erf), or relu2 (squared ReLU)."""
    router: Literal["softmax", "sigmoid"] = "softmax"
    """How scores become weights: softmax over all experts, or a sigmoid of each."""
    normalise_weights: bool = True
    """Divide the chosen weights by their sum."""
    scale: float = 1.0
    """Factor on the routed experts' sum."""
    balance: Literal["aux", "bias", "none"] = "aux"
    """aux: a loss per row; bias: a selection bias moved once per step; none."""
    aux_weight: float = 0.01
    """Weight of the balancing loss."""
    bias_rate: float = 1e-3
    """How far the selection bias moves in a step."""

    def __post_init__(self) -> None:
        for key in ("num_experts", "top_k", "d_expert"):
            if getattr(self, key) < 1:
                raise UsageError(f"moe: {key}: expected at least 1, got {getattr(self, key)}")
        if self.top_k > self.num_experts:
            raise UsageError(f"moe: top_k: expected at most num_experts {self.num_experts}, got {self.top_k}")
        if self.num_shared < 0:
            raise UsageError(f"moe: num_shared: expected at least 0, got {self.num_shared}")

    @property
    def shared(self) -> MLPConfig | None:
        """The shared experts as one MLP."""
        width = self.num_shared * (self.d_shared or self.d_expert)
        return MLPConfig(d_ff=width, activation=self.activation) if width else None

    def num_params(self, d_model: int, active: bool = False) -> int:
        expert = d_model * self.d_expert * (3 if self.activation == "swiglu" else 2)
        shared = self.shared.num_params(d_model) if self.shared else 0
        return d_model * self.num_experts + shared + expert * (self.top_k if active else self.num_experts)

    def flops_per_token(self, d_model: int, seq_len: int, executed: bool = False) -> int:
        return 2 * self.num_params(d_model, active=True)

    def state_bytes(self, d_model: int, batch: int, seq_len: int) -> int:
        return 0


class RouterWeights(nn.Module):
    """Router scores before softmax or sigmoid, always fp32."""

    keeps_fp32 = True

    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, D]`` to ``[N, E]`` in the computing dtype."""
        return F.linear(x.to(compute_dtype(x)), self.weight)


class Experts(nn.Module):
    """All routed experts of this rank; expert parallelism cuts the parameters along dim 0."""

    def __init__(self, cfg: MoEConfig, d_model: int) -> None:
        super().__init__()
        self.activation = cfg.activation
        self.up = nn.Parameter(torch.empty(cfg.num_experts, d_model, cfg.d_expert))
        if cfg.activation == "swiglu":
            self.gate = nn.Parameter(torch.empty(cfg.num_experts, d_model, cfg.d_expert))
        self.down = nn.Parameter(torch.empty(cfg.num_experts, cfg.d_expert, d_model))

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """Rows ``[M, D]`` sorted by expert, offsets int32 ``[E]`` cumulative, to ``[M, D]``."""
        up = grouped_mm(rows, _mine(self.up), offsets)
        gate = grouped_mm(rows, _mine(self.gate), offsets) if self.activation == "swiglu" else None
        return grouped_mm(activate(self.activation, up, gate), _mine(self.down), offsets)


def _mine(weight: Tensor) -> Tensor:
    """The experts that stand on this rank, of a parameter that may be spread over ranks."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


@register("moe")
class MoE(Branch):
    """See the module. No state. Buffer ``router_bias`` fp32 ``[E]``, starts at 0, moved by ``after_step``."""

    Config: ClassVar[type[MoEConfig]] = MoEConfig
    sp = "token"
    router_bias: Tensor

    def __init__(self, cfg: MoEConfig, d_model: int, place: Place) -> None:
        super().__init__()
        self.cfg, self.place, self.d_model = cfg, place, d_model
        self.router = RouterWeights(d_model, cfg.num_experts)
        self.register_buffer("router_bias", torch.zeros(cfg.num_experts, dtype=torch.float32))
        self.experts = Experts(cfg, d_model)
        self.shared = None if cfg.shared is None else MLP(cfg.shared, d_model, place)

    def forward(self, x: Tensor, ctx: Context, state: State, streams: Streams) -> tuple[Tensor, State, Streams]:
        rows = x.flatten(0, 1)
        weights, chosen, scores = self._route(rows)
        one_hot = F.one_hot(chosen, self.cfg.num_experts).sum(dim=1).unflatten(0, x.shape[:2])  # int64 [B, T, E]
        ctx.note((self.place.index, "load"), one_hot.sum(dim=(0, 1)))
        if self.cfg.balance == "aux":
            x = ctx.add_loss((self.place.index, "balance"), x, self._aux(one_hot, scores.view_as(one_hot), ctx))
            rows = x.flatten(0, 1)
        grouped, offsets, restore = ctx.dispatch(rows, chosen, self.cfg.num_experts)
        y = restore(self.experts(grouped, offsets))  # [N, top_k, D]
        y = (y.to(weights.dtype) * weights[..., None]).sum(dim=1).to(x.dtype).view_as(x)
        return y if self.shared is None else y + self.shared(x, ctx, {}, {})[0], {}, {}

    def _route(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights ``[N, k]``, experts int64 ``[N, k]`` (ties: the lower index), scores ``[N, E]``."""
        logits = self.router(rows)
        scores = logits.softmax(dim=-1) if self.cfg.router == "softmax" else logits.sigmoid()
        preferred = scores.detach() + self.router_bias if self.cfg.balance == "bias" else scores.detach()
        chosen = preferred.sort(dim=-1, descending=True, stable=True).indices[:, : self.cfg.top_k]
        weights = scores.gather(-1, chosen)
        if self.cfg.normalise_weights:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * self.cfg.scale, chosen, scores

    def _aux(self, one_hot: Tensor, scores: Tensor, ctx: Context) -> Tensor:
        """Sum over this rank's tokens of ``E / k * sum_e f_e p_e``, f the share of the row's choices that fell on e."""
        share = scores / scores.sum(dim=-1, keepdim=True)
        counts = ctx.all_sum(one_hot.sum(dim=1), over="row")
        load = counts.to(share.dtype) / counts.sum(dim=-1, keepdim=True)  # [B, E]
        return self.cfg.aux_weight * self.cfg.num_experts * (load[:, None] * share).sum()

    @torch.no_grad()
    def after_step(self, notes: dict[str, Tensor]) -> None:
        """Move the selection bias against the load of the step's whole batch, int64 ``[E]``."""
        if self.cfg.balance == "bias":
            load = notes["load"].to(self.router_bias.device, torch.float64)
            self.router_bias += self.cfg.bias_rate * torch.sign(load.mean() - load).to(torch.float32)

    def param_info(self) -> dict[str, ParamInfo]:
        cfg, d_model, std = self.cfg, self.d_model, 0.02
        out = normal(std / math.sqrt(self.place.count))

        def expert(init_std_out: bool, fan_in: int, fan_out: int, cut: int) -> ParamInfo:
            init = out if init_std_out else normal(std)
            return ParamInfo(
                "matrix", init, True, fan_in=fan_in, fan_out=fan_out, tp_dim=cut, tp_units=cfg.d_expert, expert_dim=0
            )

        into = expert(False, d_model, cfg.d_expert, 2)
        info = {
            "router.weight": ParamInfo("matrix", normal(std), fp32=True, fan_in=d_model, fan_out=cfg.num_experts),
            "experts.up": into,
            "experts.down": expert(True, cfg.d_expert, d_model, 1),
        }
        if cfg.activation == "swiglu":
            info["experts.gate"] = into
        if self.shared is not None:
            info |= {f"shared.{name}": one for name, one in self.shared.param_info().items()}
        return info
