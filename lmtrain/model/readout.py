"""What follows a scan in most linear-attention mixers: norm, gate, projection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain.model.branch import Init, ParamInfo, matrix
from lmtrain.model.norm import RMSNorm

GATES: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}


class Readout(nn.Module):
    """``W_o (RMSNorm(y) * act(W_g x))``, the norm over each head, or joint over all of them.

    gate: act; None: no gate. gate_rank: W_g is a product of two matrices of this inner width.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        value_dim: int,
        *,
        eps: float,
        joint: bool = False,
        gate: Literal["silu", "sigmoid"] | None = None,
        gate_rank: int | None = None,
    ) -> None:
        super().__init__()
        values = num_heads * value_dim
        self.num_heads, self.joint, self.act, self.gate_rank = num_heads, joint, gate, gate_rank
        self.norm = RMSNorm(values if joint else value_dim, eps)
        if gate is not None:
            widths = (d_model, values) if gate_rank is None else (d_model, gate_rank, values)
            self.gate = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in pairwise(widths)))
        self.o = nn.Linear(values, d_model, bias=False)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """What was read ``[B, T, H, V]``, for the branch's input x ``[B, T, d_model]``, to ``[B, T, d_model]``."""
        y = self.norm(y.flatten(2)) if self.joint else self.norm(y).flatten(2)
        if self.act is not None:
            y = y * GATES[self.act](self.gate(x))
        return self.o(y)

    def param_info(self, init: Init) -> dict[str, ParamInfo]:
        """init: initial values of every matrix."""
        heads, rank, d_model, values = self.num_heads, self.gate_rank, self.o.out_features, self.o.in_features
        norm = self.norm.param_info()["weight"]
        info = {
            "norm.weight": replace(norm, tp_dim=0, tp_units=1) if self.joint else norm,  # a joint mean: one unit
            "o.weight": matrix(init, values, d_model, columns=heads),
        }
        if self.act is not None and rank is None:
            info["gate.0.weight"] = matrix(init, d_model, values, rows=heads)
        elif self.act is not None and rank is not None:
            info["gate.0.weight"] = matrix(init, d_model, rank)
            info["gate.1.weight"] = matrix(init, rank, values, rows=heads)
        return info
