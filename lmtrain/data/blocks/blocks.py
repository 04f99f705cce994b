"""What a source offers the sampler: numbered blocks of one length, whatever lies behind them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.store.store import Store
from lmtrain.errors import DataError


class Block(NamedTuple):
    """``L`` inputs and one token more, the last target.

    tokens: int32 ``[L + 1]``. ids: int32 ``[L + 1]``, the document of each token, counted from 0 in the block.
    real: bool ``[L + 1]``, False on padding; None where there is none. labels: int32 ``[L + 1]``, what is asked after
    each token, ``IGNORE`` where nothing is (a probe's answers); None: the next token of the same document.
    """

    tokens: NDArray[np.int32]
    ids: NDArray[np.int32]
    real: NDArray[np.bool_] | None = None
    labels: NDArray[np.int32] | None = None


class Blocks(Protocol):
    """Blocks of one source. Pickled by name, not by content: a worker process opens the files itself."""

    @property
    def num_blocks(self) -> int:
        """How many there are; an epoch reads each once."""

    def block(self, p: int) -> Block:
        """Block ``p`` in ``[0, num_blocks)``; always the same."""

    def out_of_range(self, p: int, offset: int, vocab_size: int) -> DataError:
        """The error for token ``offset`` of block p, or for its label, saying where it comes from."""


@dataclass(frozen=True)
class ConcatBlocks:
    """Windows of ``length`` inputs over the stream of all documents: every token but the first is a target once."""

    store: Store
    length: int

    @property
    def num_blocks(self) -> int:
        return self.store.num_windows(self.length)

    def block(self, p: int) -> Block:
        return Block(self.store.window(p, self.length), self.store.document_ids(p * self.length, self.length + 1))

    def before(self, p: int, num_blocks: int) -> int:
        """Tokens of the document of block p's first token that the ``num_blocks`` blocks in front of p hold."""
        start, first = p * self.length, (p - num_blocks) * self.length
        borders = self.store.borders.inside(first, start + 1)
        return start - (int(borders[-1]) if borders.size else first)

    def out_of_range(self, p: int, offset: int, vocab_size: int) -> DataError:
        return self.store.out_of_range(p * self.length + offset, vocab_size)
