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
    real: bool ``[L + 1]``, False on padding; None where there is none. target: bool ``[L + 1]``, False for a token that
    is never a target although it is real (a probe's question); None: all are.
    """

    tokens: NDArray[np.int32]
    ids: NDArray[np.int32]
    real: NDArray[np.bool_] | None = None
    target: NDArray[np.bool_] | None = None


class Blocks(Protocol):
    """Blocks of one source. Pickled by name, not by content: a worker process opens the files itself."""

    @property
    def num_blocks(self) -> int:
        """How many there are; an epoch reads each once."""

    def block(self, p: int) -> Block:
        """Block ``p`` in ``[0, num_blocks)``; always the same."""

    def out_of_range(self, p: int, offset: int, vocab_size: int) -> DataError:
        """The error for token ``offset`` of block p, saying where it comes from."""


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

    def out_of_range(self, p: int, offset: int, vocab_size: int) -> DataError:
        return self.store.out_of_range(p * self.length + offset, vocab_size)
