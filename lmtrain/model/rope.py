"""Rotary positions (arXiv 2104.09864): of halves, as in GPT-NeoX and Llama, or interleaved; slower in long contexts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lmtrain.errors import UsageError
from lmtrain.ops.op import compute_dtype


@dataclass(frozen=True)
class RopeScaling:
    """Slower rotations, for a context longer than the one that wavelengths were made for.

    A pair that turns n times within ``original_length`` keeps a share w of its rate r, and turns by
    ``r (w + (1 - w) / factor)``: w is 0 up to n = slow and 1 from n = fast. Between, it grows with n (llama3, as in
    Llama 3.1), or with the pair's number, from whole pairs (yarn, arXiv 2309.00071).
    """

    kind: Literal["llama3", "yarn"]
    """llama3; or yarn, which also multiplies scores by (1 + ln(factor) / 10)^2."""
    factor: float
    """How much slower the slow pairs turn: about as much as the context becomes longer."""
    original_length: int
    """Tokens of the context before."""
    slow: float = 1.0
    """Turns within the original length up to which a pair becomes slower by the whole factor."""
    fast: float | None = None
    """Turns from which it stays as it is; default: 4 for llama3, 32 for yarn."""

    def __post_init__(self) -> None:
        if self.factor < 1 or self.original_length < 1:
            told = f"factor and original_length: expected at least 1, got {self.factor:g} and {self.original_length}"
            raise UsageError(f"rope_scaling: {told}")
        if not 0 < self.slow < self.upper:
            raise UsageError(f"rope_scaling: slow: expected between 0 and fast {self.upper:g}, got {self.slow:g}")

    @property
    def upper(self) -> float:
        """``fast``, or its default."""
        usual = 4.0 if self.kind == "llama3" else 32.0
        return usual if self.fast is None else self.fast

    @property
    def amplitude(self) -> float:
        """Factor of the rotated channels of queries and of keys."""
        return 1 + math.log(self.factor) / 10 if self.kind == "yarn" else 1.0

    def slowed(self, rate: Tensor, theta: float) -> Tensor:
        """The rates ``theta^{-2i/R}``, fp64 ``[R/2]``, as they become."""
        pairs = len(rate)
        if self.kind == "llama3":
            turns = rate * self.original_length / (2 * math.pi)
            kept = (turns - self.slow) / (self.upper - self.slow)
        else:
            turning = (self.original_length / (2 * math.pi * turns) for turns in (self.upper, self.slow))
            first, last = (pairs * math.log(wavelength) / math.log(theta) for wavelength in turning)
            first, last = max(math.floor(first), 0), min(math.ceil(last), 2 * pairs - 1)
            number = torch.arange(pairs, device=rate.device, dtype=rate.dtype)
            kept = 1 - (number - first) / (last - first or 1e-3)
        kept = kept.clamp(0, 1)
        return rate * (kept + (1 - kept) / self.factor)


def rotate(
    x: Tensor,
    positions: Tensor,
    theta: float,
    *,
    fraction: float = 1.0,
    interleaved: bool = False,
    scaling: RopeScaling | None = None,
) -> Tensor:
    """x ``[B, T, H, K]`` rotated by its position ``[B, T]``: of the first ``R = fraction K`` channels, pair i turns by
    ``p theta^{-2i/R}``, or as ``scaling`` has it.

    A pair is (i, i + R/2), or (2i, 2i + 1) where ``interleaved`` (DeepSeek, GPT-J).
    """
    turned = int(x.shape[-1] * fraction)
    half, dtype = turned // 2, compute_dtype(x)
    rate = theta ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    if scaling is not None:
        rate = scaling.slowed(rate, theta)
    angle = (positions[..., None].to(torch.float64) * rate).to(dtype)[:, :, None]
    cos, sin = angle.cos(), angle.sin()
    inner, rest = x[..., :turned].to(dtype), x[..., turned:]
    if scaling is not None:
        inner = inner * scaling.amplitude
    a, b = inner.unflatten(-1, (half, 2)).unbind(-1) if interleaved else inner.split(half, dim=-1)
    pair = a * cos - b * sin, b * cos + a * sin
    y = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return y.to(x.dtype) if not rest.shape[-1] else torch.cat([y.to(x.dtype), rest], dim=-1)
