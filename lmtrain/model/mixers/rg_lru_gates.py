"""The gates of Griffin's recurrence: how much of the state is kept, and how much of the token is written."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from lmtrain.model.branch import ParamInfo, named
from lmtrain.model.init import constant, normal
from lmtrain.ops.op import compute_dtype

RATE = 8.0
"""The log decay at r = 1 over softplus(Lambda)."""
STEEPEST = 1000.0
"""Bound of the root's gradient, which has none where a is 1."""


class Gates(nn.Module):
    """``log a = -8 r softplus(Lambda)`` and ``sqrt(1 - a^2) i u``, r and i of u by block-diagonal matrices.

    All of it in fp32, the matrices included: r enters the decay of every later token.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.recurrent = BlockLinear(num_heads, channels // num_heads)
        self.input = BlockLinear(num_heads, channels // num_heads)
        self.exact = ExactGates(channels)

    def forward(self, u: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """u ``[B, T, C]`` and document starts ``[B, T]`` to log a and what is written, in the computing dtype."""
        log_a, factor = self.exact(self.recurrent(u), self.input(u), starts)
        return log_a, factor * u

    def param_info(self) -> dict[str, ParamInfo]:
        heads, size, _ = self.recurrent.weight.shape
        init = normal(1 / math.sqrt(size))
        block = ParamInfo("matrix", init, True, fp32=True, fan_in=size, fan_out=size, tp_dim=0, tp_units=heads)
        bias = ParamInfo("bias", constant(0.0), fp32=True, tp_dim=0, tp_units=heads)
        decay = ParamInfo("decay", initial_lambda, fp32=True, tp_dim=0, tp_units=heads)
        exact = {"recurrent_bias": bias, "input_bias": bias, "Lambda": decay}
        return {"recurrent.weight": block, "input.weight": block, **named("exact", exact)}


class BlockLinear(nn.Module):
    """``u W`` per head, always fp32: weight ``[H, b, b]``, in by out."""

    keeps_fp32 = True

    def __init__(self, num_heads: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, size, size))

    def forward(self, u: Tensor) -> Tensor:
        """``[B, T, H b]`` to the same, in the computing dtype."""
        heads = u.to(compute_dtype(u)).unflatten(-1, (-1, self.weight.shape[1]))
        return torch.einsum("bthi,hij->bthj", heads, self.weight).flatten(2)


class ExactGates(nn.Module):
    """Log decay and the factor of what is written, always fp32."""

    keeps_fp32 = True

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.recurrent_bias = nn.Parameter(torch.empty(channels))
        self.input_bias = nn.Parameter(torch.empty(channels))
        self.Lambda = nn.Parameter(torch.empty(channels))

    def forward(self, recurrent: Tensor, written: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Raw gates ``[B, T, C]`` and document starts ``[B, T]`` to log a and ``sqrt(1 - a^2) i``."""
        r = torch.sigmoid(recurrent + self.recurrent_bias)
        i = torch.sigmoid(written + self.input_bias)
        log_a = -RATE * r * F.softplus(self.Lambda)
        root = torch.where(starts[..., None], 1.0, BoundedRoot.apply(-torch.expm1(2 * log_a)))
        return log_a, root * i


class BoundedRoot(torch.autograd.Function):
    """``sqrt(x)`` whose gradient is at most ``STEEPEST``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        root = x.sqrt()
        ctx.save_for_backward(root)
        return root

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (root,) = ctx.saved_tensors
        return grads[0] / (2 * root).clamp(min=1 / STEEPEST)


def initial_lambda(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """``softplus(Lambda) = -log(s) / 2`` with s uniform in [0.9^2, 0.999^2]: a is sqrt(s)^(8 r)."""
    low, high = 0.9**2, 0.999**2
    s = torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low + 1e-8
    return torch.expm1(-0.5 * s.log()).log().float()
