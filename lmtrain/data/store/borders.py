"""Where the documents of a token stream start: known in memory, or looked up where they lie."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left

import numpy as np
from numpy.typing import NDArray


class Borders(ABC):
    """Border j is the token at which document j starts; border ``num_documents`` is the number of tokens.

    Borders never fall. An empty document starts where the next one does.
    """

    @property
    @abstractmethod
    def num_documents(self) -> int:
        """How many there are, empty ones included."""

    @abstractmethod
    def starts(self, first: int, stop: int) -> NDArray[np.int64]:
        """int64 ``[stop - first]``: the borders ``[first, stop)``, ``stop <= num_documents + 1``."""

    @abstractmethod
    def find(self, position: int) -> int:
        """How many borders lie before token ``position``."""

    def inside(self, start: int, stop: int) -> NDArray[np.int64]:
        """int64: the borders at tokens ``start < border < stop``; one of an empty document comes twice."""
        return self.starts(self.find(start + 1), self.find(stop))


class KnownBorders(Borders):
    """All borders in memory, int64 ``[num_documents + 1]``."""

    def __init__(self, borders: NDArray[np.int64]) -> None:
        self.borders = borders

    @property
    def num_documents(self) -> int:
        return len(self.borders) - 1

    def starts(self, first: int, stop: int) -> NDArray[np.int64]:
        return self.borders[first:stop]

    def find(self, position: int) -> int:
        return int(self.borders.searchsorted(position))


class SearchedBorders(Borders):
    """Borders that stay on disk: found by bisection, about 30 reads among 10^9."""

    @abstractmethod
    def start(self, j: int) -> int:
        """Border j."""

    def find(self, position: int) -> int:
        return bisect_left(range(self.num_documents + 1), position, key=self.start)
