"""Initial values: each parameter drawn whole, on the host, from a generator seeded by the run's seed and its name, or
by the name of the parameter whose value it shares.

So a parameter is the same at every world size, and adding a branch does not change the others.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Generator, Tensor

from lmtrain.model.branch import Init, ParamInfo


def draw(name: str, info: ParamInfo, shape: tuple[int, ...], seed: int) -> Tensor:
    """The full initial value of parameter ``name``, fp32 on the host."""
    digest = hashlib.blake2b(f"{seed}/{info.drawn_as or name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return info.init(shape, generator)


def constant(value: float) -> Init:
    """Every element equal."""
    return lambda shape, generator: torch.full(shape, value)


def fixed(values: Tensor) -> Init:
    """These values, of the parameter's shape; nothing is drawn."""
    return lambda shape, generator: values.to(torch.float32).expand(shape).clone()


def orthogonal(gain: float) -> Init:
    """Rows (or columns, whichever are fewer) orthonormal, times ``gain``."""
    return lambda shape, generator: torch.nn.init.orthogonal_(torch.empty(shape), gain, generator=generator)


def normal(std: float) -> Init:
    """N(0, std^2)."""
    return lambda shape, generator: torch.randn(shape, generator=generator) * std


def uniform(low: float, high: float) -> Init:
    """U(low, high)."""
    return lambda shape, generator: torch.rand(shape, generator=generator) * (high - low) + low


def fan_in_uniform(fan_in: int, scale: float = 1.0) -> Init:
    """U(+-scale / sqrt(fan_in)): torch's default for linear layers and convolutions."""
    bound = scale / math.sqrt(fan_in)
    return uniform(-bound, bound)


def log_uniform_range(low: float, high: float) -> Init:
    """log U(low, high): for decays stored as ``A_log``."""
    return lambda shape, generator: uniform(low, high)(shape, generator).log()


def softplus_inverse_of_log_uniform(low: float, high: float, floor: float) -> Init:
    """b with softplus(b) = exp(U(log low, log high)), at least ``floor``: Mamba's step-size bias."""

    def init(shape: tuple[int, ...], generator: Generator) -> Tensor:
        step = uniform(math.log(low), math.log(high))(shape, generator).exp().clamp(min=floor)
        return step + torch.log(-torch.expm1(-step))

    return init
