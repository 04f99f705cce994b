"""Rotary positions (arXiv 2104.09864): of halves, as in GPT-NeoX and Llama, or interleaved."""

from __future__ import annotations

import torch
from torch import Tensor

from lmtrain.ops.op import compute_dtype


def rotate(x: Tensor, positions: Tensor, theta: float, *, fraction: float = 1.0, interleaved: bool = False) -> Tensor:
    """x ``[B, T, H, K]`` rotated by its position ``[B, T]``: of the first ``R = fraction K`` channels, pair i turns by
    ``p theta^{-2i/R}``.

    A pair is (i, i + R/2), or (2i, 2i + 1) where ``interleaved`` (DeepSeek, GPT-J).
    """
    turned = int(x.shape[-1] * fraction)
    half, dtype = turned // 2, compute_dtype(x)
    rate = theta ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = (positions[..., None].to(torch.float64) * rate).to(dtype)[:, :, None]
    cos, sin = angle.cos(), angle.sin()
    inner, rest = x[..., :turned].to(dtype), x[..., turned:]
    a, b = inner.unflatten(-1, (half, 2)).unbind(-1) if interleaved else inner.split(half, dim=-1)
    pair = a * cos - b * sin, b * cos + a * sin
    y = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return y.to(x.dtype) if not rest.shape[-1] else torch.cat([y.to(x.dtype), rest], dim=-1)
