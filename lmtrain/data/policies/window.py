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

    every: steps of a window. start: targets that are passed over first. read: targets so far, those among them.
    """

    def __init__(self, every: int, start: float = 0.0) -> None:
        self.read = 0.0
        self._every, self._start = every, start
        self._tokens: dict[str, float] = {}
        self._bits: dict[str, float] = {}

    def add(self, step: int, tokens: Mapping[str, float], bits: Mapping[str, float]) -> Seen | None:
        """Takes what ``MixPolicy.observe`` is told; every ``every`` steps returns what came since, if anything did."""
        self.read += sum(tokens.values())
        if self.read <= self._start:
            return None
        for name, count in tokens.items():
            if count > 0 and math.isfinite(bits[name]):
                self._tokens[name] = self._tokens.get(name, 0.0) + count
                self._bits[name] = self._bits.get(name, 0.0) + count * min(bits[name], MAX_BITS)
        return self._take() if step % self._every == 0 else None

    def _take(self) -> Seen | None:
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
        return {"read": self.read, "tokens": dict(self._tokens), "bits": dict(self._bits)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.read, self._tokens, self._bits = state["read"], dict(state["tokens"]), dict(state["bits"])
