"""Kimi Delta Attention (arXiv 2510.26692): the delta rule with a decay per key channel.

g = -exp(A_log_h) softplus(W_2 W_1 x + dt_bias)      R_t = Diag(exp(g_t)) S_{t-1}
S_t = R_t + beta_t k_t (v_t - R_t^T k_t)^T           y_t = S_t^T q_t
out = W_o (RMSNorm_head(y) * sigmoid(W_g2 W_g1 x))   q, k, v, beta: DeltaInputs

No matrix has a bias, as in Kimi Linear's published model; flash-linear-attention has one at W_g2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lmtrain.model.branch import Branch, ParamInfo, Place, State, Streams, matrix, named, register
from lmtrain.model.context import Context
from lmtrain.model.delta_inputs import DeltaConfig, DeltaInputs
from lmtrain.model.init import log_uniform_range, normal
from lmtrain.model.readout import Readout
from lmtrain.model.state_space import DecayRate
from lmtrain.ops import delta
from lmtrain.ops.op import Cost


@dataclass(frozen=True)
class KDAConfig(DeltaConfig):
    """Kimi Delta Attention mixer."""

    kind: str = "kda"
    """kda"""

    def scan_cost(self, d_model: int, seq_len: int) -> Cost:
        row = (1, seq_len, self.num_heads, self.head_dim)
        return delta.cost(row, row, row, row[:3], row)


class ChannelDecay(DecayRate):
    """A step for every key channel ``[H * K]``, a rate for every head ``[H]``."""

    def __init__(self, num_heads: int, key_dim: int) -> None:
        super().__init__(num_heads * key_dim)
        self.A_log = nn.Parameter(torch.empty(num_heads))


@register("kda")
class KDA(Branch):
    """See the module. State: ``delta`` fp32 ``[B, H, K, V]``; ``q_conv``, ``k_conv``, ``v_conv`` ``[B, W - 1, *]``."""

    Config: ClassVar[type[KDAConfig]] = KDAConfig
    sp = "scan"

    def __init__(self, cfg: KDAConfig, d_model: int, place: Place) -> None:
        super().__init__()
        self.cfg, self.place, self.d_model = cfg, place, d_model
        heads, width, beta = cfg.num_heads, cfg.head_dim, 2.0 if cfg.negative_eigenvalues else 1.0
        self.inputs = DeltaInputs(d_model, heads, width, heads, width, cfg.conv_width, beta)
        self.decay_in = nn.Linear(d_model, width, bias=False)
        self.decay_out = nn.Linear(width, heads * width, bias=False)
        self.decay = ChannelDecay(heads, width)
        self.out = Readout(d_model, heads, width, eps=cfg.norm_eps, gate="sigmoid", gate_rank=width)

    def forward(self, x: Tensor, ctx: Context, state: State, streams: Streams) -> tuple[Tensor, State, Streams]:
        v, q, k, beta, tails = self.inputs(x, ctx, state)
        dt, rates = self.decay(self.decay_out(self.decay_in(x)))
        g = rates[:, None] * dt.unflatten(-1, (-1, self.cfg.head_dim))
        y, after = ctx.scan(delta, v, q, k, beta, g, initial_state=state.get("delta"))
        return self.out(y, x), {**tails, "delta": after} if ctx.carries else {}, {}

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return self.inputs.state_shapes()

    def param_info(self) -> dict[str, ParamInfo]:
        d_model, heads, width, init = self.d_model, self.cfg.num_heads, self.cfg.head_dim, normal(0.02)
        return {
            **named("inputs", self.inputs.param_info(init)),
            "decay_in.weight": matrix(init, d_model, width),
            "decay_out.weight": matrix(init, width, heads * width, rows=heads),
            **named("decay", self.decay.param_info(heads, log_uniform_range(1.0, 16.0))),
            **named("out", self.out.param_info(init)),
        }
