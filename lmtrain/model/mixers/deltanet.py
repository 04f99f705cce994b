"""DeltaNet (arXiv 2406.06484): a state that is corrected towards v_t where k_t reads it, and never forgets.

S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T      y_t = S_t^T q_t
out = W_o RMSNorm_head(y)                               q, k, v, beta: DeltaInputs
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lmtrain.model.branch import Branch, ParamInfo, Place, State, Streams, named, register
from lmtrain.model.context import Context
from lmtrain.model.delta_inputs import DeltaConfig, DeltaInputs
from lmtrain.model.init import normal
from lmtrain.model.readout import Readout
from lmtrain.ops import delta
from lmtrain.ops.op import Cost


@dataclass(frozen=True)
class DeltaNetConfig(DeltaConfig):
    """DeltaNet mixer."""

    kind: str = "deltanet"
    """deltanet"""

    def scan_cost(self, d_model: int, seq_len: int) -> Cost:
        row = (1, seq_len, self.num_heads, self.head_dim)
        return delta.cost(row, row, row, row[:3])


@register("deltanet")
class DeltaNet(Branch):
    """See the module. State: ``delta`` fp32 ``[B, H, K, V]``; ``q_conv``, ``k_conv``, ``v_conv`` ``[B, W - 1, *]``."""

    Config: ClassVar[type[DeltaNetConfig]] = DeltaNetConfig
    sp = "scan"

    def __init__(self, cfg: DeltaNetConfig, d_model: int, place: Place) -> None:
        super().__init__()
        self.cfg, self.place, self.d_model = cfg, place, d_model
        heads, width, beta = cfg.num_heads, cfg.head_dim, 2.0 if cfg.negative_eigenvalues else 1.0
        self.inputs = DeltaInputs(d_model, heads, width, heads, width, cfg.conv_width, beta)
        self.out = Readout(d_model, heads, width, eps=cfg.norm_eps)

    def forward(self, x: Tensor, ctx: Context, state: State, streams: Streams) -> tuple[Tensor, State, Streams]:
        v, q, k, beta, tails = self.inputs(x, ctx, state)
        y, after = ctx.scan(delta, v, q, k, beta, None, initial_state=state.get("delta"))
        return self.out(y, x), {**tails, "delta": after} if ctx.carries else {}, {}

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return self.inputs.state_shapes()

    def param_info(self) -> dict[str, ParamInfo]:
        init = normal(0.02)
        return {**named("inputs", self.inputs.param_info(init)), **named("out", self.out.param_info(init))}
