"""Blocks that hold whole documents instead of a window over all of them: best fit (planned once), and unpacked.

A document of more than L + 1 tokens is cut into pieces of L + 1 that share one token: the last target of a piece is the
first input of the next. So every token but the first of its document is a target exactly once, whatever the packing,
and a document of at most L + 1 tokens is never cut. Each piece is a document of its block; padding is on the right.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.blocks.best_fit import num_pieces
from lmtrain.data.blocks.blocks import Block, Blocks
from lmtrain.data.blocks.pack_plan import PackPlan
from lmtrain.data.store.store import Store
from lmtrain.errors import DataError

Pieces = tuple[NDArray[np.int64], NDArray[np.int64]]


class _PackedBlocks(ABC):
    """Blocks of ``length`` inputs, filled with pieces of documents from the left."""

    num_blocks: int

    def __init__(self, store: Store, length: int) -> None:
        self.store, self.length = store, length

    def __reduce__(self) -> tuple[type[_PackedBlocks], tuple[Store, int]]:
        return type(self), (self.store, self.length)

    @abstractmethod
    def pieces(self, p: int) -> Pieces:
        """First token in the store, and number of tokens, of each piece of block p: int64 ``[n]`` each."""

    def block(self, p: int) -> Block:
        starts, lengths = self.pieces(p)
        used, width = int(lengths.sum()), self.length + 1
        tokens = np.zeros(width, dtype=np.int32)
        parts = [
            self.store.tokens(start, count) for start, count in zip(starts.tolist(), lengths.tolist(), strict=True)
        ]
        np.concatenate(parts, out=tokens[:used])
        ids = np.full(width, len(parts), dtype=np.int32)  # padding comes as one document more
        ids[:used] = np.repeat(np.arange(len(parts), dtype=np.int32), lengths)
        return Block(tokens, ids, None if used == width else np.arange(width) < used)

    def out_of_range(self, p: int, offset: int, vocab_size: int) -> DataError:
        starts, lengths = self.pieces(p)
        ends = np.cumsum(lengths)
        piece = int(ends.searchsorted(offset, side="right"))
        return self.store.out_of_range(int(starts[piece] + offset - ends[piece] + lengths[piece]), vocab_size)


class BestFitBlocks(_PackedBlocks):
    """Pieces placed together by best fit decreasing, as ``launch/prepare.py pack PATH length=L`` planned it.

    Raises DataError if there is no plan of this length beside the store, or if it is of another store.
    """

    def __init__(self, store: Store, length: int) -> None:
        super().__init__(store, length)
        self._plan = PackPlan.open(store, length)
        self.num_blocks, self.plan_digest = self._plan.num_blocks, self._plan.digest

    def pieces(self, p: int) -> Pieces:
        return self._plan.block(p)


def plan_digests(blocks: Mapping[str, Blocks]) -> dict[str, str]:
    """The digests of the plans that the sources are read by, by name."""
    return {name: each.plan_digest for name, each in blocks.items() if isinstance(each, BestFitBlocks)}


class UnpackedBlocks(_PackedBlocks):
    """One piece per block; eight bytes of memory per document."""

    def __init__(self, store: Store, length: int) -> None:
        super().__init__(store, length)
        self._first = np.zeros(store.num_documents + 1, dtype=np.int64)  # block of each document's first piece
        for at, lengths in store.document_lengths():
            self._first[at + 1 : at + 1 + len(lengths)] = num_pieces(lengths, length)
        np.cumsum(self._first, out=self._first)
        self.num_blocks = int(self._first[-1])

    def pieces(self, p: int) -> Pieces:
        document = int(self._first.searchsorted(p, side="right")) - 1
        start, stop = self.store.borders.starts(document, document + 2)
        start += (p - self._first[document]) * self.length
        return np.array([start]), np.array([min(self.length + 1, stop - start)])
