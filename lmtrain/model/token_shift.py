"""RWKV's token shift: every token beside the one before it in its document, and mixes of the two per channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lmtrain.model.branch import ParamInfo
from lmtrain.model.context import Context
from lmtrain.model.init import fixed


def token_shift(x: Tensor, ctx: Context, tail: Tensor | None) -> tuple[Tensor, Tensor]:
    """x ``[B, T, D]`` moved on by one token, zeros at a document's first; and the tail to carry ``[B, 1, D]``."""
    left, tail = ctx.halo(x, 1, tail)
    previous = torch.cat([left, x[:, :-1]], dim=1)
    return torch.where((ctx.positions > 0)[..., None], previous, previous.new_zeros(())), tail


class TokenMix(nn.Module):
    """``count`` mixes ``x + (previous - x) weight_i``; weight ``[count, D]`` is the share of the previous token."""

    def __init__(self, d_model: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, d_model))

    def forward(self, x: Tensor, previous: Tensor) -> tuple[Tensor, ...]:
        change = previous - x
        return tuple(x + change * share for share in self.weight.to(x.dtype))

    def param_info(self, shares: Sequence[Tensor]) -> dict[str, ParamInfo]:
        """shares: the initial values of each mix, ``[D]``."""
        return {"weight": ParamInfo("scalar", fixed(torch.stack(list(shares))))}


def channels(d_model: int) -> Tensor:
    """``n / D``: the ramp along the channels that RWKV's initial values are made from."""
    return torch.arange(d_model) / d_model
