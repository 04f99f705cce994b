"""The run that the tests of mixture policies share: three sources of equal size and weight."""

from __future__ import annotations

from typing import Any

from lmtrain.data.order.weights import integer_weights
from lmtrain.data.policies.policy import Progress, Run

NAMES = ("code", "docs", "web")
AVAILABLE = dict.fromkeys(NAMES, 10**9)
RUN = Run(AVAILABLE, 10**9)
THIRDS = dict.fromkeys(NAMES, 1 / 3)


def progress(weights: dict[str, float] | None = None, done: int = 0, **changes: Any) -> Progress:
    """``done`` tokens read, in equal parts, of a run of 10^9; the mixture is ``weights`` and was proposed by us."""
    mixture = integer_weights(weights or THIRDS)
    tokens = {name: done // len(mixture) for name in mixture}
    fields = {
        "done": done,
        "tokens": tokens,
        "available": AVAILABLE,
        "total": 10**9,
        "weights": mixture,
        "proposed": mixture,
    }
    return Progress(**(fields | changes))
