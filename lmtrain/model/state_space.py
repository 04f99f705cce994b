"""What state-space mixers share: step sizes with their decay rates, and the way past the state. Always fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain.model.branch import Init, ParamInfo
from lmtrain.model.init import constant, softplus_inverse_of_log_uniform
from lmtrain.ops.op import compute_dtype

STEP_BIAS = softplus_inverse_of_log_uniform(1e-3, 1e-1, 1e-4)
"""Mamba's initial steps: log-uniform in [1e-3, 1e-1], the floor at 1e-4."""


class DecayRate(nn.Module):
    """Step sizes ``dt = softplus(raw + dt_bias)`` and rates ``A = -exp(A_log)``: a state decays by ``exp(dt A)``."""

    keeps_fp32 = True

    def __init__(self, steps: int, *rates: int) -> None:
        """A rate for each of ``steps`` steps, or ``rates`` of them."""
        super().__init__()
        self.dt_bias = nn.Parameter(torch.empty(steps))
        self.A_log = nn.Parameter(torch.empty(steps, *rates))

    def forward(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, T, steps]`` to dt of the same shape and A ``[steps, *rates]``, in the computing dtype."""
        dt = F.softplus(raw.to(compute_dtype(raw)) + self.dt_bias)
        return dt, -torch.exp(self.A_log)

    def param_info(self, units: int, rate: Init, step: Init = STEP_BIAS) -> dict[str, ParamInfo]:
        """units: heads along the steps; rate and step: initial values of ``A_log`` and ``dt_bias``."""
        return {
            "dt_bias": ParamInfo("decay", step, fp32=True, tp_dim=0, tp_units=units),
            "A_log": ParamInfo("decay", rate, fp32=True, tp_dim=0, tp_units=units),
        }


class Skip(nn.Module):
    """Adds ``D x``, D ``[units]``: a factor per channel, or per head of channels."""

    keeps_fp32 = True

    def __init__(self, units: int) -> None:
        super().__init__()
        self.D = nn.Parameter(torch.empty(units))

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """``y + D x``, both ``[B, T, units, ...]``; y in the computing dtype."""
        return torch.addcmul(y, self.D.view(-1, *[1] * (y.dim() - 3)), x.to(y.dtype))

    def param_info(self, units: int, init: Init | None = None) -> dict[str, ParamInfo]:
        """Starts at 1, unless told otherwise."""
        return {"D": ParamInfo("scalar", init or constant(1.0), fp32=True, tp_dim=0, tp_units=units)}
