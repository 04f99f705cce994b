"""How often text is read again, and what that is worth."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lmtrain.errors import UsageError

HALF_LIFE = 15.39
"""R*_D of Muennighoff et al. 2023 (arXiv 2305.16264): repeats after which a repeat is worth 1/e of new text."""
NEARLY_FREE = 4.0


def effective_tokens(unique: float, read: float) -> float:
    """What ``read`` tokens of a source of ``unique`` are worth: U + U R* (1 - exp(-R / R*)), R repeats of all of it."""
    if read <= unique or not unique:
        return float(read)
    repeats = read / unique - 1
    return unique + unique * HALF_LIFE * (1 - math.exp(-repeats / HALF_LIFE))


def check_supply(total: float, available: Mapping[str, int], max_epochs: float) -> list[str]:
    """A warning if a run of ``total`` tokens must read all of ``available`` (tokens by source) more than 4 times.

    Raises UsageError if that is more often than ``max_epochs`` (``data.max_epochs``), whatever the mixture will be.
    """
    supply = sum(available.values())
    epochs = total / supply if supply else math.inf
    if epochs > max_epochs:
        raise UsageError(
            f"data.sources: the run needs {total:,.0f} tokens, {', '.join(available)} have {supply:,} together "
            f"({epochs:.1f} epochs, data.max_epochs is {max_epochs:g}); add text, train on less, or raise "
            "data.max_epochs"
        )
    if epochs <= NEARLY_FREE:
        return []
    worth = effective_tokens(supply, total)
    return [f"all sources are read {epochs:.1f} times: {total:,.0f} tokens worth about {worth:,.0f} new ones"]


def check_epochs(plan: Mapping[str, float], available: Mapping[str, int], max_epochs: float) -> list[str]:
    """A warning for each source that ``plan`` (tokens by source) reads more than 4 times.

    Raises UsageError for one that it reads more often than ``max_epochs`` (``data.max_epochs``).
    """
    warnings = []
    for name, needed in plan.items():
        epochs = needed / available[name] if available[name] else math.inf if needed else 0.0
        if epochs > max_epochs:
            raise UsageError(
                f"data.sources.{name}: the run needs {needed:,.0f} tokens, it has {available[name]:,} ({epochs:.1f} "
                f"epochs, data.max_epochs is {max_epochs:g}); add text, lower its weight, train on less, or raise "
                "data.max_epochs"
            )
        if epochs > NEARLY_FREE:
            worth = effective_tokens(available[name], needed)
            warnings.append(
                f"{name} is read {epochs:.1f} times: {needed:,.0f} tokens worth about {worth:,.0f} new ones"
            )
    return warnings
