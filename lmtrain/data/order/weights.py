"""Weights of a mixture as integers, so that the order of data holds no float."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lmtrain.errors import UsageError

PERIOD, FINE_PERIOD = 1 << 16, 1 << 18
"""Sum of the integer weights; the fine one where a share is below 1/1000 and would be rounded by more than 1 %."""
COARSE_PERIOD = 1 << 12
"""For a policy, which makes events by the hundred: each costs time and memory in proportion to the period."""


def integer_weights(weights: Mapping[str, float], period: int | None = None) -> dict[str, int]:
    """Positive integers proportional to ``weights``, by largest remainder, each at least 1; zero weights are left out.

    They sum to ``period``; by default to 65536, or 262144 if a share is below 1/1000. Raises UsageError for negative,
    infinite or all-zero ones.
    """
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise UsageError(f"data.sources.{name}.weight: must be a finite number >= 0, got {weight}")
    total = math.fsum(weights.values())
    if total <= 0:
        raise UsageError(f"data.sources: the weights of {', '.join(weights) or 'no sources'} sum to 0")
    shares = {name: weight / total for name, weight in sorted(weights.items()) if weight > 0}
    if period is None:
        period = FINE_PERIOD if min(shares.values()) < 1e-3 else PERIOD
    result = {name: max(int(share * period), 1) for name, share in shares.items()}
    # sorted() is stable, so that equal remainders go by name. What the minimum of 1 added is taken from the largest.
    by_remainder = sorted(shares, key=lambda name: shares[name] * period - result[name], reverse=True)
    missing = period - sum(result.values())
    for name in by_remainder[: max(missing, 0)]:
        result[name] += 1
    for _ in range(-missing):
        result[max(result, key=lambda name: result[name])] -= 1
    return result
