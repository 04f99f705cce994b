"""Feed-forward: SwiGLU ``W_down(silu(W_gate x) * W_up x)``, or ``W_down f(W_up x)`` with GELU or squared ReLU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain.errors import UsageError
from lmtrain.model.branch import Branch, ParamInfo, Place, State, Streams, register
from lmtrain.model.context import Context
from lmtrain.model.init import normal


@dataclass(frozen=True)
class MLPConfig:
    """Feed-forward branch."""

    d_ff: int
    """Hidden width."""
    kind: str = "mlp"
    """mlp"""
    activation: Literal["swiglu", "gelu", "relu2"] = "swiglu"
    """swiglu (gated), gelu (erf), or relu2 (squared ReLU)."""

    def __post_init__(self) -> None:
        if self.d_ff < 1:
            raise UsageError(f"mlp: d_ff: expected at least 1, got {self.d_ff}")

    def num_params(self, d_model: int, active: bool = False) -> int:
        return d_model * self.d_ff * (3 if self.activation == "swiglu" else 2)

    def flops_per_token(self, d_model: int, seq_len: int, executed: bool = False) -> int:
        return 2 * self.num_params(d_model)

    def state_bytes(self, d_model: int, batch: int, seq_len: int) -> int:
        return 0


def activate(activation: str, up: Tensor, gate: Tensor | None) -> Tensor:
    """The hidden layer of an MLP or an expert; ``gate`` belongs to swiglu alone."""
    if gate is not None:
        return F.silu(gate) * up
    return F.gelu(up) if activation == "gelu" else F.relu(up).square()


@register("mlp")
class MLP(Branch):
    """See the module. No state."""

    Config: ClassVar[type[MLPConfig]] = MLPConfig
    sp = "token"

    def __init__(self, cfg: MLPConfig, d_model: int, place: Place) -> None:
        super().__init__()
        self.cfg, self.place, self.d_model = cfg, place, d_model
        self.up = nn.Linear(d_model, cfg.d_ff, bias=False)
        if cfg.activation == "swiglu":
            self.gate = nn.Linear(d_model, cfg.d_ff, bias=False)
        self.down = nn.Linear(cfg.d_ff, d_model, bias=False)

    def forward(self, x: Tensor, ctx: Context, state: State, streams: Streams) -> tuple[Tensor, State, Streams]:
        gate = self.gate(x) if self.cfg.activation == "swiglu" else None
        return self.down(activate(self.cfg.activation, self.up(x), gate)), {}, {}

    def param_info(self) -> dict[str, ParamInfo]:
        d_ff, d_model, std = self.cfg.d_ff, self.d_model, 0.02
        into = ParamInfo("matrix", normal(std), True, fan_in=d_model, fan_out=d_ff, tp_dim=0, tp_units=d_ff)
        out = normal(std / math.sqrt(self.place.count))
        info = {"up.weight": into}
        if self.cfg.activation == "swiglu":
            info["gate.weight"] = into
        info["down.weight"] = ParamInfo("matrix", out, True, fan_in=d_ff, fan_out=d_model, tp_dim=1, tp_units=d_ff)
        return info
