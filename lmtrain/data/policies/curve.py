"""The losses of a run so far, in bounded memory: bins of equal numbers of steps, twice as wide each time they fill."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_BINS = 512


class LossCurve:
    """Mean loss by source over the tokens of the whole run, at most ``MAX_BINS`` points.

    A bin holds the sums of its steps; a source that a bin did not see has no point there. Averaging replaces the
    smoothing filter and the subsampling of ADO's code, whose memory grows with the run.
    """

    def __init__(self) -> None:
        self._width = 1
        self._steps: list[int] = []
        self._at: list[float] = []  # sum over the bin's steps of the tokens read so far
        self._tokens: dict[str, list[float]] = {}
        self._bits: dict[str, list[float]] = {}

    def add(self, read: float, tokens: Mapping[str, float], bits: Mapping[str, float]) -> None:
        """A step at whose middle ``read`` tokens of all sources were read. A loss that is not finite is left out."""
        if not self._steps or self._steps[-1] == self._width:
            if len(self._steps) == MAX_BINS:
                self._merge()
            self._steps.append(0)
            self._at.append(0.0)
            for column in (*self._tokens.values(), *self._bits.values()):
                column.append(0.0)
        self._steps[-1] += 1
        self._at[-1] += read
        for name, count in tokens.items():
            if count > 0 and math.isfinite(bits[name]):
                for table, value in ((self._tokens, count), (self._bits, count * bits[name])):
                    table.setdefault(name, [0.0] * len(self._steps))[-1] += value

    def _merge(self) -> None:
        self._width *= 2
        self._steps = _pairs(self._steps)
        self._at = _pairs(self._at)
        for table in (self._tokens, self._bits):
            for name, column in table.items():
                table[name] = _pairs(column)

    def points(self, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Tokens of all sources, and loss of this one: float64 ``[points]`` each."""
        tokens = np.array(self._tokens.get(name, []))
        at = np.array(self._at) / np.array(self._steps)
        seen = np.flatnonzero(tokens)
        return at[seen], np.array(self._bits[name])[seen] / tokens[seen] if seen.size else np.empty(0)

    def names(self) -> list[str]:
        """The sources seen."""
        return list(self._tokens)

    def state_dict(self) -> dict[str, Any]:
        tokens = {name: list(column) for name, column in self._tokens.items()}
        bits = {name: list(column) for name, column in self._bits.items()}
        steps = {"width": self._width, "steps": list(self._steps), "at": list(self._at)}
        return {**steps, "tokens": tokens, "bits": bits}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._width, self._steps, self._at = state["width"], list(state["steps"]), list(state["at"])
        self._tokens = {name: list(column) for name, column in state["tokens"].items()}
        self._bits = {name: list(column) for name, column in state["bits"].items()}


def _pairs(column: list[Any]) -> list[Any]:
    return [a + b for a, b in zip(column[::2], column[1::2], strict=True)]
