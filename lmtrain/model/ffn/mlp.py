"""Feed-forward: gated ``W_down(f(W_gate x) * W_up x)``, as SwiGLU and GEGLU, or ``W_down f(W_up x)``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain.model.answers import Answers
from lmtrain.model.branch import Branch, ParamInfo, Place, State, Streams, matrix, register
from lmtrain.model.context import Context
from lmtrain.model.init import constant, normal
from lmtrain.model.settings import at_least

Activation = Literal["swiglu", "swiglu_clamped", "geglu", "gelu", "relu2"]
GATED = ("swiglu", "swiglu_clamped", "geglu")
CLAMP, SHARPNESS = 7.0, 1.702  # of gpt-oss


@dataclass(frozen=True)
class MLPConfig(Answers):
    """Feed-forward branch."""

    d_ff: int
    """Hidden width."""
    kind: str = "mlp"
    """mlp"""
    activation: Activation = "swiglu"
    """Gated: swiglu, swiglu_clamped (gpt-oss), geglu (tanh form). Not gated: gelu (erf), relu2 (squared ReLU)."""
    bias: bool = False
    """Add a bias in every projection (Griffin)."""

    def __post_init__(self) -> None:
        at_least(self, 1, "d_ff")


def activate(activation: Activation, up: Tensor, gate: Tensor | None) -> Tensor:
    """The hidden layer of an MLP or an expert; ``gate`` belongs to the gated ones."""
    if gate is None:
        return F.gelu(up) if activation == "gelu" else F.relu(up).square()
    if activation == "swiglu_clamped":
        gate, up = gate.clamp(max=CLAMP), up.clamp(-CLAMP, CLAMP)
        return gate * torch.sigmoid(SHARPNESS * gate) * (up + 1)
    return (F.gelu(gate, approximate="tanh") if activation == "geglu" else F.silu(gate)) * up


@register("mlp")
class MLP(Branch):
    """See the module. No state."""

    Config: ClassVar[type[MLPConfig]] = MLPConfig
    sp = "token"

    def __init__(self, cfg: MLPConfig, d_model: int, place: Place) -> None:
        super().__init__()
        self.cfg, self.place, self.d_model = cfg, place, d_model
        self.up = nn.Linear(d_model, cfg.d_ff, bias=cfg.bias)
        if cfg.activation in GATED:
            self.gate = nn.Linear(d_model, cfg.d_ff, bias=cfg.bias)
        self.down = nn.Linear(cfg.d_ff, d_model, bias=cfg.bias)

    def forward(self, x: Tensor, ctx: Context, state: State, streams: Streams) -> tuple[Tensor, State, Streams]:
        gate = self.gate(x) if self.cfg.activation in GATED else None
        return self.down(activate(self.cfg.activation, self.up(x), gate)), {}, {}

    def param_info(self) -> dict[str, ParamInfo]:
        d_ff, d_model = self.cfg.d_ff, self.d_model
        out = normal(0.02 / math.sqrt(self.place.count))
        info = {"down.weight": matrix(out, d_ff, d_model, columns=d_ff)}
        if self.cfg.bias:
            info["down.bias"] = ParamInfo("bias", constant(0.0))
        for name in ("up", "gate") if self.cfg.activation in GATED else ("up",):
            info[f"{name}.weight"] = matrix(normal(0.02), d_model, d_ff, rows=d_ff)
            if self.cfg.bias:
                info[f"{name}.bias"] = ParamInfo("bias", constant(0.0), tp_dim=0, tp_units=d_ff)
        return info
