"""Which experts a token uses, and with what weights.

    s = softmax(W_r x) or sigmoid(W_r x), in fp32   chosen = top_k(s, or s + bias)   w = s[chosen] (/ their sum) * scale

softmax with normalised weights is also the softmax over the chosen scores alone. Experts may stand in groups (nodes),
of which a token uses the best ``top_groups``, judged by the sum of their two best experts (DeepSeek-V3, arXiv
2412.19437).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain.model.branch import ParamInfo
from lmtrain.model.ffn.moe_settings import MoEConfig
from lmtrain.model.init import constant, normal
from lmtrain.ops.op import compute_dtype


class RouterWeights(nn.Module):
    """Router scores before softmax or sigmoid, always fp32."""

    keeps_fp32 = True

    def __init__(self, d_model: int, num_experts: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.bias = nn.Parameter(torch.empty(num_experts)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """``[N, D]`` to ``[N, E]`` in the computing dtype."""
        return F.linear(x.to(compute_dtype(x)), self.weight, self.bias)

    def param_info(self) -> dict[str, ParamInfo]:
        num_experts, d_model = self.weight.shape
        info = {"weight": ParamInfo("matrix", normal(0.02), fp32=True, fan_in=d_model, fan_out=num_experts)}
        return info if self.bias is None else info | {"bias": ParamInfo("bias", constant(0.0), fp32=True)}


def route(cfg: MoEConfig, logits: Tensor, selection_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights ``[N, k]``, experts int64 ``[N, k]`` (ties: the lower index), scores ``[N, E]``; logits ``[N, E]``."""
    scores = logits.softmax(dim=-1) if cfg.router == "softmax" else logits.sigmoid()
    preferred = scores.detach() + selection_bias if cfg.balance == "bias" else scores.detach()
    if cfg.num_groups > 1:
        preferred = _best_groups(preferred, cfg.num_groups, cfg.top_groups)
    chosen = _best(preferred, cfg.top_k)
    weights = scores.gather(-1, chosen)
    if cfg.normalise_weights:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * cfg.scale, chosen, scores


def _best(preferred: Tensor, count: int) -> Tensor:
    return preferred.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _best_groups(preferred: Tensor, num_groups: int, top_groups: int) -> Tensor:
    """-inf for the experts of all other groups."""
    grouped = preferred.unflatten(-1, (num_groups, -1))
    worth = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(dim=-1)
    kept = torch.zeros_like(worth, dtype=torch.bool).scatter_(-1, _best(worth, top_groups), True)
    return grouped.masked_fill(~kept[..., None], float("-inf")).flatten(-2)
