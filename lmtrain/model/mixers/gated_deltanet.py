"""Gated DeltaNet (arXiv 2412.06464): the delta rule with a decay per head.

g = -exp(A_log) softplus(W_a x + dt_bias)      R_t = exp(g_t) S_{t-1}      S_t = R_t + beta_t k_t (v_t - R_t^T k_t)^T
y_t = S_t^T q_t      out = W_o (RMSNorm_head(y) * silu(W_g x))             q, k, v, beta: DeltaInputs
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from lmtrain.errors import UsageError
from lmtrain.model.answers import Answers
from lmtrain.model.branch import Branch, ParamInfo, Place, State, Streams, matrix, named, register
from lmtrain.model.context import Context
from lmtrain.model.delta_inputs import DeltaInputs
from lmtrain.model.init import log_uniform_range, normal
from lmtrain.model.readout import Readout
from lmtrain.model.settings import at_least, divisor_near, positive, taps
from lmtrain.model.state_space import DecayRate
from lmtrain.ops import delta
from lmtrain.ops.op import Cost


@dataclass(frozen=True)
class GatedDeltaNetConfig(Answers):
    """Gated DeltaNet mixer."""

    kind: str = "gated_deltanet"
    """gated_deltanet"""
    num_heads: int = 6
    """Heads of queries and keys."""
    num_value_heads: int | None = None
    """Heads of values, a multiple of num_heads, which share keys in groups; default: num_heads."""
    head_dim: int = 256
    """Channels per head of queries and keys."""
    value_dim: int = 512
    """Channels per head of values."""
    conv_width: int = 4
    """Taps of the short convolutions."""
    negative_eigenvalues: bool = False
    """beta in (0, 2) instead of (0, 1): a transition may turn a key's sign (arXiv 2411.12537)."""
    norm_eps: float = 1e-5
    """Added to the mean square of the norm over each head."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_heads", "num_value_heads", "head_dim", "value_dim")
        taps(self)
        positive(self, "norm_eps")
        if self.value_heads % self.num_heads:
            works = divisor_near(self.value_heads, self.num_heads)
            told = f"num_heads {self.num_heads} does not divide num_value_heads {self.value_heads}; {works} does"
            raise UsageError(f"gated_deltanet: {told}")

    @property
    def value_heads(self) -> int:
        return self.num_value_heads or self.num_heads

    def scan_cost(self, d_model: int, seq_len: int) -> Cost:
        keys, rates = (1, seq_len, self.num_heads, self.head_dim), (1, seq_len, self.value_heads)
        return delta.cost((*rates, self.value_dim), keys, keys, rates, rates)


@register("gated_deltanet")
class GatedDeltaNet(Branch):
    """See the module. State: ``delta`` fp32 ``[B, Hv, K, V]``; ``q_conv``, ``k_conv``, ``v_conv`` ``[B, W - 1, *]``."""

    Config: ClassVar[type[GatedDeltaNetConfig]] = GatedDeltaNetConfig
    sp = "scan"

    def __init__(self, cfg: GatedDeltaNetConfig, d_model: int, place: Place) -> None:
        super().__init__()
        self.cfg, self.place, self.d_model = cfg, place, d_model
        heads, beta = cfg.value_heads, 2.0 if cfg.negative_eigenvalues else 1.0
        self.inputs = DeltaInputs(d_model, cfg.num_heads, cfg.head_dim, heads, cfg.value_dim, cfg.conv_width, beta)
        self.a = nn.Linear(d_model, heads, bias=False)
        self.decay = DecayRate(heads)
        self.out = Readout(d_model, heads, cfg.value_dim, eps=cfg.norm_eps, gate="silu")

    def forward(self, x: Tensor, ctx: Context, state: State, streams: Streams) -> tuple[Tensor, State, Streams]:
        v, q, k, beta, tails = self.inputs(x, ctx, state)
        dt, rates = self.decay(self.a(x))
        y, after = ctx.scan(delta, v, q, k, beta, rates * dt, initial_state=state.get("delta"))
        return self.out(y, x), {**tails, "delta": after} if ctx.carries else {}, {}

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return self.inputs.state_shapes()

    def param_info(self) -> dict[str, ParamInfo]:
        heads, init = self.cfg.value_heads, normal(0.02)
        return {
            **named("inputs", self.inputs.param_info(init)),
            "a.weight": matrix(init, self.d_model, heads, rows=heads),
            **named("decay", self.decay.param_info(heads, log_uniform_range(0.01, 16.0))),
            **named("out", self.out.param_info(init)),
        }
