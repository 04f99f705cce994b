"""Random inputs of the ops: ``(draw, batch, length, decay)`` to tensors by name, the initial state last.

``draw(*shape)`` is normal, in fp64, and new at each call; decay scales log decays. Widths are no multiples of a vector.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = dict[str, Tensor]
Draw = Callable[..., Tensor]


def diag_scan(draw: Draw, batch: int, length: int, decay: float) -> Tensors:
    x, log_a = draw(batch, length, 21), -decay * draw(batch, length, 21).abs()
    return {"x": x, "log_a": log_a, "initial_state": draw(batch, 21)}


def selective_scan(draw: Draw, batch: int, length: int, decay: float, *, longhorn: bool) -> Tensors:
    """Longhorn's Delta as in the paper: Delta k^2 lies below 1."""
    channels, groups, d_state = 22, 2, 3
    b = draw(batch, length, groups, d_state)
    dt = draw(batch, length, channels).sigmoid()
    if longhorn:
        dt = decay * dt / (1 + decay * dt * b.square().sum(dim=-1).repeat_interleave(channels // groups, dim=2))
    return {
        "x": draw(batch, length, channels),
        "dt": dt,
        **({} if longhorn else {"A": -decay * draw(channels, d_state).abs()}),
        "B": b,
        "C": draw(batch, length, groups, d_state),
        "initial_state": draw(batch, channels, d_state),
    }


def ssd(draw: Draw, batch: int, length: int, decay: float, *, groups: int) -> Tensors:
    heads, d_state, head_dim = 4, 5, 19
    return {
        "x": draw(batch, length, heads, head_dim),
        "log_a": -decay * draw(batch, length, heads).abs(),
        "B": draw(batch, length, groups, d_state),
        "C": draw(batch, length, groups, d_state),
        "initial_state": draw(batch, heads, d_state, head_dim),
    }


def gla(draw: Draw, batch: int, length: int, decay: float, *, bonus: bool, keys: int = 5, values: int = 19) -> Tensors:
    heads = 2
    return {
        "v": draw(batch, length, heads, values),
        "q": draw(batch, length, heads, keys),
        "k": draw(batch, length, heads, keys),
        "g": -decay * draw(batch, length, heads, keys).abs(),
        **({"u": draw(heads, keys)} if bonus else {}),
        "initial_state": draw(batch, heads, keys, values),
    }


def delta(draw: Draw, batch: int, length: int, decay: float, *, gate: str, groups: int, heads: int = 4) -> Tensors:
    keys, values = 5, 19
    logs = {"none": (), "scalar": (heads,), "vector": (heads, keys)}[gate]
    return {
        "v": draw(batch, length, heads, values),
        "q": draw(batch, length, groups, keys),
        "k": F.normalize(draw(batch, length, groups, keys), dim=-1),
        "beta": 2 * draw(batch, length, heads).sigmoid(),
        **({"g": -decay * draw(batch, length, *logs).abs()} if logs else {}),
        "initial_state": draw(batch, heads, keys, values),
    }


def dplr(draw: Draw, batch: int, length: int, decay: float) -> Tensors:
    heads, keys, values = 2, 5, 3
    kappa = F.normalize(draw(batch, length, heads, keys), dim=-1)
    return {
        "v": draw(batch, length, heads, values),
        "r": draw(batch, length, heads, keys),
        "w": -decay * draw(batch, length, heads, keys).abs(),
        "k": draw(batch, length, heads, keys),
        "a": -kappa * (-decay * draw(batch, length, heads, 1).abs()).exp(),
        "b": kappa * draw(batch, length, heads, keys).sigmoid(),
        "initial_state": draw(batch, heads, keys, values),
    }


def wkv4(draw: Draw, batch: int, length: int, decay: float, *, keys: float = 1.0) -> Tensors:
    width = 21
    return {
        "v": draw(batch, length, width),
        "k": keys * draw(batch, length, width),
        "w": -decay * draw(width).abs(),
        "u": draw(width),
        "initial_state": torch.stack([draw(batch, width), 1 + draw(batch, width).abs(), draw(batch, width)], dim=1),
    }


def wkv4_unique(state: Tensor) -> Tensor:
    """What the triple (a, b, p) stands for: a / b and p + log b; zeros of an empty one."""
    a, b, p = state.unbind(dim=1)
    empty, scale = b == 0, torch.where(b == 0, torch.ones_like(b), b)
    return torch.where(empty[:, None], torch.zeros_like(state[:, :2]), torch.stack([a / scale, p + scale.log()], dim=1))


def blockdiag(draw: Draw, batch: int, length: int, decay: float) -> Tensors:
    blocks, size = 3, 3
    matrices = F.normalize(draw(batch, length, blocks, size, size), dim=-2)
    return {
        "v": draw(batch, length, blocks, size),
        "A": matrices * (0.8 / max(decay, 1)),
        "initial_state": draw(batch, blocks, size),
    }


def conv(
    draw: Draw, batch: int, length: int, decay: float, *, width: int, bias: bool = True, channels: int = 21
) -> Tensors:
    return {
        "x": draw(batch, length, channels),
        "weight": draw(channels, width),
        **({"bias": draw(channels)} if bias else {}),
        "initial_state": draw(batch, width - 1, channels),
    }


def routed_conv(draw: Draw, batch: int, length: int, decay: float, *, width: int) -> Tensors:
    memories, channels = 3, 21
    return {
        "x": draw(batch, length, memories, channels),
        "weight": draw(channels, width),
        "initial_state": draw(batch, memories, width - 1, channels),
    }


def routes(tensors: Tensors) -> Tensors:
    """Which memories a token uses: one value in three says that it does not; a NaN does not."""
    return {"used": ~(tensors["x"].detach()[..., 0] < -0.43)}


def routed_conv_sees(tensors: Tensors) -> Tensor:
    """bool ``[B, T, T]``: j is among the last W users, up to t, of a memory that t uses."""
    used = routes(tensors)["used"]
    users = used.cumsum(dim=1)
    near = users[:, :, None] - users[:, None] < tensors["weight"].shape[1]
    return (near & used[:, :, None] & used[:, None]).any(dim=-1)
