"""Mamba (arXiv 2312.00752): a scan whose step size, keys and queries depend on the token.

dt = softplus(raw + dt_bias)      A = -exp(A_log)
h_t[d,n] = exp(dt_t[d] A[d,n]) h_{t-1}[d,n] + dt_t[d] B_t[n] u_t[d]      y_t[d] = sum_n C_t[n] h_t[d,n] + D[d] u_t[d]

u, raw, B, C and the output: ``selective``. Falcon-Mamba (arXiv 2410.05355) divides B, C and the inner projection of raw
by their root mean square.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from lmtrain.model.branch import ParamInfo, Place, named, register
from lmtrain.model.mimetic import mimetic
from lmtrain.model.mixers.selective import Selective, SelectiveConfig
from lmtrain.model.settings import at_least
from lmtrain.model.state_space import DecayRate
from lmtrain.ops.op import compute_dtype

SELECTION_EPS = 1e-6
"""Added to the mean squares of ``selection_norm``."""


@dataclass(frozen=True)
class MambaConfig(SelectiveConfig):
    """Mamba mixer."""

    kind: str = "mamba"
    """mamba"""
    selection_norm: bool = False
    """RMSNorm, without weights, of B, of C and of the step size's inner projection (Falcon-Mamba)."""
    mimetic_length: int | None = None
    """Start as linear attention over so many tokens (arXiv 2410.11135); default: the usual initial values."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "mimetic_length")

    def rates(self, inner: int) -> tuple[int, ...]:
        return inner, self.d_state


class NormedLinear(nn.Linear):
    """A projection without bias whose output, over the last dim, has a mean square of 1."""

    def forward(self, x: Tensor) -> Tensor:
        """In x's dtype; the norm in the computing dtype."""
        y = super().forward(x)
        return F.rms_norm(y.to(compute_dtype(y)), y.shape[-1:], eps=SELECTION_EPS).to(y.dtype)


@register("mamba")
class Mamba(Selective):
    """See the module; state: ``Selective``."""

    Config: ClassVar[type[MambaConfig]] = MambaConfig

    def __init__(self, cfg: MambaConfig, d_model: int, place: Place) -> None:
        super().__init__(cfg, d_model, place)
        self.mimetic_length = cfg.mimetic_length
        if cfg.selection_norm:
            self.dt_in = NormedLinear(self.inner, self.rank, bias=False)
            self.B = NormedLinear(self.inner, cfg.d_state, bias=False)
            self.C = NormedLinear(self.inner, cfg.d_state, bias=False)
        self.decay = DecayRate(*cfg.rates(self.inner))

    def steps(self, raw: Tensor, keys: Tensor) -> tuple[Tensor, Tensor | None]:
        dt, rates = self.decay(raw)
        return dt, rates

    def param_info(self) -> dict[str, ParamInfo]:
        info = super().param_info() | named("decay", self.decay.param_info(self.inner, log_of_one_to_n))
        length, taps, biases = self.mimetic_length, ("conv.weight",), ("conv.bias",)
        return mimetic(info, length, steps="dt_out.weight", taps=taps, biases=biases) if length else info


def log_of_one_to_n(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """``log(1..N)`` in every row: S4D-Real."""
    return torch.arange(1, shape[1] + 1).float().log().expand(shape).clone()
