"""RWKV's token shift: every token beside the one before it in its document."""

from __future__ import annotations

import torch
from torch import Tensor

from lmtrain.model.context import Context


def token_shift(x: Tensor, ctx: Context, tail: Tensor | None) -> tuple[Tensor, Tensor]:
    """x ``[B, T, D]`` moved on by one token, zeros at a document's first; and the tail to carry ``[B, 1, D]``."""
    left, tail = ctx.halo(x, 1, tail)
    previous = torch.cat([left, x[:, :-1]], dim=1)
    return torch.where((ctx.positions > 0)[..., None], previous, previous.new_zeros(())), tail
