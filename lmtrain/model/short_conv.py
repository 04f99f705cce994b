"""The short causal convolution in front of a recurrence, as a module: it never crosses a document."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lmtrain.model.branch import Init, ParamInfo
from lmtrain.model.context import Context
from lmtrain.model.init import constant
from lmtrain.ops import causal_conv1d


class ShortConv(nn.Module):
    """Depthwise, ``width`` taps, of which the last is the own token's; weight ``[channels, width]``."""

    def __init__(self, channels: int, width: int, bias: bool, activation: Literal["none", "silu"] = "silu") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.activation = activation

    def forward(self, x: Tensor, ctx: Context, tail: Tensor | None) -> tuple[Tensor, Tensor]:
        """``[B, T, C]`` to the same, and the tail to carry ``[B, W - 1, C]``; ``tail``: of the segment before."""
        left, tail = ctx.halo(x, self.weight.shape[1] - 1, tail)
        y, _ = causal_conv1d(x, self.weight, self.bias, docs=ctx.docs, initial_state=left, activation=self.activation)
        return y, tail

    def param_info(self, init: Init, units: int | None = None, bias: Init | None = None) -> dict[str, ParamInfo]:
        """units: heads along the channels; bias: its initial values, 0 unless given."""
        cut = None if units is None else 0
        info = {"weight": ParamInfo("conv", init, tp_dim=cut, tp_units=units)}
        if self.bias is not None:
            info["bias"] = ParamInfo("bias", bias or constant(0.0), tp_dim=cut, tp_units=units)
        return info
