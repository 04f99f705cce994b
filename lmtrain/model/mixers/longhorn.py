"""Longhorn (arXiv 2407.14207): the state solves a regression on every token in closed form, in place of a decay.

beta = sigmoid(raw + bias)      Delta = beta / (1 + beta |B|^2)
h_t[d,n] = (1 - Delta_t[d] B_t[n]^2) h_{t-1}[d,n] + Delta_t[d] B_t[n] u_t[d]
y_t[d] = sum_n C_t[n] h_t[d,n] + D[d] u_t[d]

u, raw, B (the paper's k), C (its q) and the output: ``selective``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lmtrain.model.branch import ParamInfo, Place, register
from lmtrain.model.init import constant
from lmtrain.model.mixers.selective import Selective, SelectiveConfig
from lmtrain.ops.op import compute_dtype


@dataclass(frozen=True)
class LonghornConfig(SelectiveConfig):
    """Longhorn mixer."""

    kind: str = "longhorn"
    """longhorn"""


class RegressionStep(nn.Module):
    """``beta / (1 + beta |k|^2)`` with ``beta = sigmoid(raw + bias)``, always fp32; times k^2 it is below 1."""

    keeps_fp32 = True

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, raw: Tensor, keys: Tensor) -> Tensor:
        """raw ``[B, T, E]``, keys ``[B, T, N]``."""
        dtype = compute_dtype(raw)
        beta = torch.sigmoid(raw.to(dtype) + self.bias)
        return beta / (1 + beta * keys.to(dtype).square().sum(dim=-1, keepdim=True))


@register("longhorn")
class Longhorn(Selective):
    """See the module; state: ``Selective``."""

    Config: ClassVar[type[LonghornConfig]] = LonghornConfig

    def __init__(self, cfg: LonghornConfig, d_model: int, place: Place) -> None:
        super().__init__(cfg, d_model, place)
        self.step = RegressionStep(self.inner)

    def steps(self, raw: Tensor, keys: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.step(raw, keys), None

    def param_info(self) -> dict[str, ParamInfo]:
        bias = ParamInfo("decay", constant(0.0), fp32=True, tp_dim=0, tp_units=self.inner)
        return {**super().param_info(), "step.bias": bias}
