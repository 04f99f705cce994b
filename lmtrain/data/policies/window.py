"""Mean losses and shares of the steps since a policy last looked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

MAX_BITS = 1000.0
"""So that what a policy makes of a mean loss, its exponential too, stays finite: 1000 bits are 693 nats."""


class Seen(NamedTuple):
    """Of the sources that were read: mean loss in bits per byte, and share of the targets."""

    bits: dict[str, float]
    share: dict[str, float]


class Window:
    """Sums of targets, and of targets times loss, by source. A loss that is not finite does not count, one above
    ``MAX_BITS`` counts as that.
    """

    def __init__(self) -> None:
        self._tokens: dict[str, float] = {}
        self._bits: dict[str, float] = {}

    def add(self, tokens: Mapping[str, float], bits: Mapping[str, float]) -> None:
        for name, count in tokens.items():
            if count > 0 and math.isfinite(bits[name]):
                self._tokens[name] = self._tokens.get(name, 0.0) + count
                self._bits[name] = self._bits.get(name, 0.0) + count * min(bits[name], MAX_BITS)

    def take(self) -> Seen | None:
        """What was added since the last ``take``; None if that is nothing."""
        tokens, bits = self._tokens, self._bits
        if not tokens:
            return None
        self._tokens, self._bits = {}, {}
        total = sum(tokens.values())
        return Seen(
            {name: bits[name] / count for name, count in tokens.items()},
            {name: count / total for name, count in tokens.items()},
        )

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": dict(self._tokens), "bits": dict(self._bits)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._tokens, self._bits = dict(state["tokens"]), dict(state["bits"])
