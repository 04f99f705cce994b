"""Mixture of experts, dropless: each token's ``top_k`` experts of ``num_experts``, plus shared experts for all.

    y = sum_chosen w_e expert_e(x) + shared(x)          expert(x) = W_down f(W_up x), or gated as in SwiGLU

Which experts, with what weights: ``router``. Balance: ``aux`` is Switch's loss per row (arXiv 2101.03961, eq. 4-6, on
one sequence), which no mesh and no accumulation changes; ``bias`` adds to the scores, for the choice alone, a bias that
is moved against the load once per optimizer step (arXiv 2408.15664).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain.model.balance import balance_loss
from lmtrain.model.branch import Branch, ParamInfo, Place, State, Streams, matrix, named, register
from lmtrain.model.context import Context
from lmtrain.model.ffn.mlp import GATED, MLP, activate
from lmtrain.model.ffn.moe_settings import MoEConfig
from lmtrain.model.ffn.router import RouterWeights, route
from lmtrain.model.init import constant, normal
from lmtrain.ops.grouped import grouped_mm
from lmtrain.ops.op import compute_dtype


class Experts(nn.Module):
    """All routed experts of this rank; expert parallelism cuts the parameters along dim 0."""

    def __init__(self, cfg: MoEConfig, d_model: int) -> None:
        super().__init__()
        self.activation = cfg.activation
        into = ("up", "gate") if cfg.gated else ("up",)
        for name in into:
            self.register_parameter(name, nn.Parameter(torch.empty(cfg.num_experts, d_model, cfg.d_expert)))
        self.down = nn.Parameter(torch.empty(cfg.num_experts, cfg.d_expert, d_model))
        if cfg.bias:
            for name in (*into, "down"):
                width = self.get_parameter(name).shape[2]
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(cfg.num_experts, width)))

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """Rows ``[M, D]`` sorted by expert, offsets int32 ``[E]`` cumulative, to ``[M, D]``."""
        up = self._apply_each("up", rows, offsets)
        gate = self._apply_each("gate", rows, offsets) if self.activation in GATED else None
        return self._apply_each("down", activate(self.activation, up, gate), offsets)

    def _apply_each(self, name: str, rows: Tensor, offsets: Tensor) -> Tensor:
        y = grouped_mm(rows, _mine(getattr(self, name)), offsets)
        bias = getattr(self, f"{name}_bias", None)
        if bias is None:
            return y
        expert = torch.searchsorted(offsets, torch.arange(rows.shape[0], device=rows.device), right=True)
        each = _mine(bias)
        # indexed in the computing dtype: the gradient of an index sums over tokens in the dtype of what it indexes
        return y + each.to(compute_dtype(each))[expert].to(y.dtype)


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
        self.router = RouterWeights(d_model, cfg.num_experts, cfg.bias)
        self.register_buffer("router_bias", torch.zeros(cfg.num_experts, dtype=torch.float32))
        self.experts = Experts(cfg, d_model)
        self.shared = None if cfg.shared is None else MLP(cfg.shared, d_model, place)
        if cfg.shared_gate:
            self.shared_gate = nn.Linear(d_model, 1, bias=False)

    def forward(self, x: Tensor, ctx: Context, state: State, streams: Streams) -> tuple[Tensor, State, Streams]:
        rows = x.flatten(0, 1)
        weights, chosen, scores = route(self.cfg, self.router(rows), self.router_bias)
        one_hot = F.one_hot(chosen, self.cfg.num_experts).sum(dim=1).unflatten(0, x.shape[:2])  # int64 [B, T, E]
        ctx.note((self.place.index, "load"), one_hot.sum(dim=(0, 1)))
        if self.cfg.balance == "aux":
            loss = self.cfg.aux_weight * balance_loss(one_hot, scores.view_as(one_hot), ctx)
            x = ctx.add_loss((self.place.index, "balance"), x, loss)
            rows = x.flatten(0, 1)
        grouped, offsets, restore = ctx.dispatch(rows, chosen, self.cfg.num_experts)
        y = restore(self.experts(grouped, offsets))  # [N, top_k, D]
        y = (y.to(weights.dtype) * weights[..., None]).sum(dim=1).to(x.dtype).view_as(x)
        if self.shared is not None:
            extra, _, _ = self.shared(x, ctx, {}, {})
            y = y + (extra * torch.sigmoid(self.shared_gate(x)) if self.cfg.shared_gate else extra)
        return y, {}, {}

    @torch.no_grad()
    def after_step(self, notes: dict[str, Tensor]) -> None:
        """Move the selection bias against the load of the step's whole batch, int64 ``[E]``."""
        if self.cfg.balance == "bias":
            load = notes["load"].to(self.router_bias.device, torch.float64)
            self.router_bias += self.cfg.bias_rate * torch.sign(load.mean() - load).to(torch.float32)

    def param_info(self) -> dict[str, ParamInfo]:
        cfg, d_model, units = self.cfg, self.d_model, self.cfg.d_expert
        out = replace(matrix(normal(0.02 / math.sqrt(self.place.count)), units, d_model), tp_dim=1)
        into = replace(matrix(normal(0.02), d_model, units), tp_dim=2)
        info = named("router", self.router.param_info())
        for name in ("up", "gate", "down") if cfg.gated else ("up", "down"):
            weight = replace(out if name == "down" else into, tp_units=units, expert_dim=0)
            info[f"experts.{name}"] = weight
            if cfg.bias:
                cut = None if name == "down" else 1
                info[f"experts.{name}_bias"] = ParamInfo(
                    "bias", constant(0.0), tp_dim=cut, tp_units=cut and units, expert_dim=0
                )
        if self.shared is not None:
            info |= named("shared", self.shared.param_info())
        if cfg.shared_gate:
            info["shared_gate.weight"] = matrix(normal(0.02), d_model, 1)
        return info
