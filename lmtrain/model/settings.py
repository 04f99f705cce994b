"""Checks that the settings of several branches share. Each raises UsageError, naming what would work."""

from __future__ import annotations

import math
from typing import Any

from lmtrain.errors import UsageError
from lmtrain.ops.causal_conv1d import MAX_WIDTH


def at_least(settings: Any, minimum: int, *keys: str) -> None:
    """Refuse settings of which one of these keys is below ``minimum``, or no finite number; None passes."""
    for key in keys:
        value = getattr(settings, key)
        if value is not None and not minimum <= value < math.inf:
            raise UsageError(f"{settings.kind}: {key}: expected at least {minimum}, got {value}")


def positive(settings: Any, *keys: str) -> None:
    """Refuse settings of which one of these keys is 0 or less, or no finite number; None passes."""
    for key in keys:
        value = getattr(settings, key)
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"{settings.kind}: {key}: expected more than 0, got {value:g}")


def taps(settings: Any) -> None:
    """Refuse a ``conv_width`` that the short convolution does not have."""
    if not 2 <= settings.conv_width <= MAX_WIDTH:
        raise UsageError(f"{settings.kind}: conv_width: expected 2 to {MAX_WIDTH}, got {settings.conv_width}")


def head_width(settings: Any, expand: str, d_model: int) -> int:
    """Channels of each of ``num_heads`` heads that are ``settings.<expand>`` times d_model wide together."""
    total, heads = d_model * getattr(settings, expand), settings.num_heads
    if total != int(total) or total < 1 or total % heads:
        share = f"{expand} {getattr(settings, expand)} of d_model {d_model}"
        works = f"; num_heads {divisor_near(int(total), heads)} does" if total == int(total) and total >= 1 else ""
        raise UsageError(f"{settings.kind}: {share} does not divide by num_heads {heads}{works}")
    return int(total) // heads


def whole_heads(settings: Any, d_model: int) -> int:
    """Heads of ``settings.head_dim`` channels in d_model."""
    if d_model % settings.head_dim:
        works = divisor_near(d_model, settings.head_dim)
        told = f"head_dim {settings.head_dim} does not divide d_model {d_model}; {works} does"
        raise UsageError(f"{settings.kind}: {told}")
    return int(d_model // settings.head_dim)


def divisor_near(total: int, wanted: int) -> int:
    """The largest divisor of ``total`` that is at most ``wanted``."""
    return max(n for n in range(1, wanted + 1) if total % n == 0)
