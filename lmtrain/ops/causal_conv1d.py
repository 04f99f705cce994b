"""Depthwise causal convolution over time with a short kernel: the local mixing before a scan.

    y_t = act(bias + sum_{d=0}^{W-1} weight[:, W-1-d] * x_{t-d})

where columns left of the row come from the carried tail, and a column of another document is not seen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lmtrain.ops import library
from lmtrain.ops.adapters import causal_conv1d as adapter
from lmtrain.ops.compiled import Like, compiled
from lmtrain.ops.documents import Documents
from lmtrain.ops.op import Cost, Op, check_row, check_shape, compute_dtype

ACTIVATIONS = ("none", "silu")
MAX_WIDTH = 16


class CausalConv1d(Op):
    """``causal_conv1d(x [B,T,C], weight [C,W], bias [C] | None) -> (y [B,T,C], tail [B,W-1,C])``.

    ``initial_state`` is the tail of the columns before the row, zeros if None; which of them a token sees follows from
    ``docs.before``. The returned tail is the last W-1 columns of tail and row, raw and unmasked, in x's dtype. One call
    with T = 1 is a step of decode.
    """

    name = "causal_conv1d"

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        docs: Documents | None = None,
        initial_state: Tensor | None = None,
        activation: str = "silu",
    ) -> tuple[Tensor, Tensor]:
        """Raises ValueError naming the argument, what was expected and what was got."""
        _check(x, weight, bias, docs, initial_state, activation)
        backend = library.backend(self.name, x.device.type, x.dtype)
        if backend == "causal_conv1d":
            return adapter.causal_conv1d(x, weight, bias, docs, initial_state, activation)
        positions = None if docs is None else docs.positions()
        if backend == "reference":
            return self.reference(x, weight, bias, positions, initial_state, activation)
        dtype = compute_dtype(x)
        bias = None if bias is None else bias.to(dtype)
        y, tail = torch.ops.lmtrain.causal_conv1d(x, weight.to(dtype), bias, positions, initial_state, activation)
        return y, tail

    @staticmethod
    def reference(
        x: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor | None, tail: Tensor | None, activation: str
    ) -> tuple[Tensor, Tensor]:
        """The definition, on ``positions`` int32 ``[B,T]`` (None: every column is visible)."""
        dtype = compute_dtype(x)
        length, width = x.shape[1], weight.shape[1]
        if tail is None:
            tail = x.new_zeros(x.shape[0], width - 1, x.shape[2])
        row = torch.cat([tail, x], dim=1)
        y = torch.zeros_like(x, dtype=dtype) if bias is None else bias.to(dtype).expand_as(x)
        for distance in range(width):
            tap = width - 1 - distance
            seen = row[:, tap : tap + length].to(dtype)
            if positions is not None:
                # where, not a product: a NaN of another document must reach neither values nor gradients
                seen = torch.where((positions >= distance)[:, :, None], seen, seen.new_zeros(()))
            y = y + weight[:, tap].to(dtype) * seen
        if activation == "silu":
            y = F.silu(y)
        return y.to(x.dtype), row[:, length:].contiguous()

    def cost(self, *shapes: tuple[int, ...]) -> Cost:
        """Of shapes x ``[B,T,C]`` and weight ``[C,W]``; bytes for fp32, the row read once."""
        (batch, length, channels), (_, width) = shapes[:2]
        values = batch * length * channels
        flops = 2 * width * values
        return Cost(model_flops=flops, executed_flops=flops, bytes=4 * (2 * values + width * channels))


causal_conv1d = CausalConv1d()


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    docs: Documents | None,
    tail: Tensor | None,
    activation: str,
) -> None:
    name = CausalConv1d.name
    check_shape(name, "x", x, (None, None, None))
    batch, _, channels = x.shape
    check_shape(name, "weight", weight, (channels, None))
    width = weight.shape[1]
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"{name}: weight: expected 1 to {MAX_WIDTH} taps, got {width}")
    if bias is not None:
        check_shape(name, "bias", bias, (channels,))
    if tail is not None:
        check_shape(name, "initial_state", tail, (batch, width - 1, channels))
        if tail.dtype != x.dtype:
            raise ValueError(f"{name}: initial_state: expected dtype {x.dtype} as x, got {tail.dtype}")
    check_row(name, "x", x, docs, weight=weight, bias=bias, initial_state=tail)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name}: activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def _outputs(x: Tensor, weight: Tensor, *_: object) -> tuple[Like, ...]:
    return x, (x, (x.shape[0], weight.shape[1] - 1, x.shape[2]))


def _gradients(x: Tensor, weight: Tensor, *_: object) -> tuple[Like | None, ...]:
    return x, weight, (weight, weight.shape[:1]), None, _outputs(x, weight)[1], None


CPU = compiled(CausalConv1d.name, _outputs, _gradients)
library.register(CausalConv1d.name, CPU, adapter.BACKEND, library.Backend("reference"))
