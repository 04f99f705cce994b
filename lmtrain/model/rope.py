"""Rotary positions (arXiv 2104.09864), halves layout as in GPT-NeoX and Llama."""

from __future__ import annotations

import torch
from torch import Tensor

from lmtrain.ops.op import compute_dtype


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """x ``[B, T, H, K]`` rotated by its position ``[B, T]``: pair (i, i + K/2) turns by ``p theta^{-2i/K}``."""
    half = x.shape[-1] // 2
    dtype = compute_dtype(x)
    rate = theta ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = (positions[..., None].to(torch.float64) * rate).to(dtype)[:, :, None]
    cos, sin = angle.cos(), angle.sin()
    a, b = x.to(dtype).split(half, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
