"""One store of the stores of the shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from lmtrain.data.order.permutation import permute
from lmtrain.data.store.store import Store, StoreWriter

DOCUMENTS, TOKENS = 1 << 16, 1 << 22
"""Copied at once, at most (but for one document that is longer)."""


def shuffle(parts: Sequence[Path], final: Path, vocab_size: int, name: str) -> None:
    """Write the documents in a keyed order: blocks are shuffled later, the documents inside one block never again."""
    key = np.uint64(xxhash.xxh3_64_intdigest(f"documents/{name}".encode()))

    def orders(count: int) -> Iterator[NDArray[np.int64]]:
        for start in range(0, count, DOCUMENTS):
            yield permute(np.arange(start, min(start + DOCUMENTS, count)), count, key)

    _copy(parts, final, vocab_size, orders)


def join(parts: Sequence[Path], final: Path, vocab_size: int) -> None:
    """Write the documents in the order of the parts."""

    def orders(count: int) -> Iterator[NDArray[np.int64]]:
        for start in range(0, count, DOCUMENTS):
            yield np.arange(start, min(start + DOCUMENTS, count))

    _copy(parts, final, vocab_size, orders)


def _copy(
    parts: Sequence[Path], final: Path, vocab_size: int, orders: Callable[[int], Iterator[NDArray[np.int64]]]
) -> None:
    """Write the documents of all parts, numbered through, in the orders that ``orders`` makes of their count."""
    stores = [Store(part) for part in parts]
    starts = [store.document_starts for store in stores]
    firsts = np.cumsum([0, *(store.num_documents for store in stores)])
    with StoreWriter(final, vocab_size) as writer:
        for order in orders(int(firsts[-1])):
            part_of = np.searchsorted(firsts, order, side="right") - 1
            tokens: list[NDArray[np.int32]] = []
            waiting = 0
            for number, document in zip(part_of.tolist(), (order - firsts[part_of]).tolist(), strict=True):
                start, stop = starts[number][document : document + 2].tolist()
                tokens.append(stores[number].tokens(start, stop - start))
                waiting += stop - start
                if waiting >= TOKENS:
                    _write(writer, tokens)
                    tokens, waiting = [], 0
            _write(writer, tokens)


def _write(writer: StoreWriter, tokens: list[NDArray[np.int32]]) -> None:
    if tokens:
        writer.extend(np.concatenate(tokens), np.array([len(document) for document in tokens]))
