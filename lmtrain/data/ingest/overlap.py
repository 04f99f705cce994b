"""Which training documents nearly equal held-out text, or hold it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from lmtrain.data.ingest.filters.words import Hashes, Known, Runs, runs_of, words_of
from lmtrain.data.store.arrays import write_array

SHINGLE = 8
"""Words in a shingle. Of 13, as GPT-3 compared evaluations, too few outlive a word changed here and there."""
LEAST = 6
"""Shingles (13 words) of a held-out document that is looked for inside others: shorter ones are phrases."""
THRESHOLD = 0.5
"""A training document is dropped if at least this share of its shingles occurs in held-out documents, or if it has at
least this share of the shingles of one of them."""
MOST = 32
"""Held-out documents that a shingle counts for, the first ones: what stands in more is a licence or a template, and the
cost of comparing is bounded. The others are judged by the rest of their shingles."""
MAX_HELDOUT_BYTES = 50_000
"""One document's part of the held-out text; the rest of it is used nowhere, or one large file would be the measure."""

GROUP = 1 << 17
"""Characters compared at once: what is computed for them stays in the processor's cache."""


class HeldoutText(NamedTuple):
    """What training documents are compared with: held-out documents, by their words.

    wholes: uint64, sorted, each document as a whole. shingles: uint64, sorted, each once. documents: int32, those that
    shingle i is in, at ``documents[starts[i]:starts[i + 1]]``; starts: int64 ``[shingles + 1]``. sizes: int32
    ``[documents]``, how often each is among ``documents``.
    """

    wholes: Hashes
    shingles: Hashes
    starts: NDArray[np.int64]
    documents: NDArray[np.int32]
    sizes: NDArray[np.int32]

    @classmethod
    def of(cls, shingles: Runs, wholes: Hashes) -> HeldoutText:
        """From the shingles of each document and its ``wholes`` (0: it has no word)."""
        document = np.repeat(np.arange(len(wholes), dtype=np.int32), np.diff(shingles.starts))
        order = np.lexsort((document, shingles.hashes))
        document, hashes = document[order], shingles.hashes[order]
        other = np.ones(len(hashes), dtype=np.bool_)
        other[1:] = (hashes[1:] != hashes[:-1]) | (document[1:] != document[:-1])
        document, hashes = document[other], hashes[other]
        known, first, counts = np.unique(hashes, return_index=True, return_counts=True)
        kept = np.arange(len(hashes)) - np.repeat(first, counts) < MOST
        starts = np.zeros(len(known) + 1, dtype=np.int64)
        np.cumsum(np.minimum(counts, MOST), out=starts[1:])
        sizes = np.bincount(document[kept], minlength=len(wholes)).astype(np.int32)
        return cls(np.unique(wholes[wholes != 0]), known, starts, document[kept], sizes)

    @classmethod
    def read(cls, folder: Path) -> HeldoutText:
        return cls(*(np.load(folder / f"{name}.npy") for name in cls._fields))

    def write(self, name: str, file: BinaryIO) -> None:
        """Write the array ``name``, which ``read`` looks for as ``name.npy``."""
        write_array(file, getattr(self, name))


class Comparison:
    """Compares texts with held-out text."""

    def __init__(self, heldout: HeldoutText) -> None:
        self.heldout = heldout
        self._known, self._wholes = Known(heldout.shingles), Known(heldout.wholes)

    def near(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """bool ``[texts]``: which have the words of a held-out document; at least half of whose shingles are held out;
        which have at least half of the shingles of one held-out document of 13 words or more."""
        if not len(self._wholes):
            return np.zeros(len(texts), dtype=np.bool_)
        found = [np.empty(0, dtype=np.bool_), *(self._near(group) for group in _groups(texts))]
        return np.concatenate(found)

    def _near(self, texts: list[str]) -> NDArray[np.bool_]:
        words = words_of(texts)
        own = runs_of(words, SHINGLE)
        near = np.zeros(len(texts), dtype=np.bool_)
        near[self._wholes.places(wholes(words))[0]] = True
        which, place = self._known.places(own.hashes)
        if not which.size:
            return near
        found = np.zeros(len(own.hashes), dtype=np.bool_)
        found[which] = True
        near |= own.sums(found) >= THRESHOLD * np.maximum(np.diff(own.starts), 1)
        text = np.searchsorted(own.starts, which, side="right") - 1
        text, place = np.divmod(np.unique(text * len(self._known) + place), len(self._known))
        counts = np.diff(self.heldout.starts)[place]
        inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        document = self.heldout.documents[np.repeat(self.heldout.starts[place], counts) + inside]
        num_documents = len(self.heldout.sizes)
        pairs, common = np.unique(np.repeat(text, counts) * num_documents + document, return_counts=True)
        text, document = np.divmod(pairs, num_documents)
        sizes = self.heldout.sizes[document]
        near[text[(sizes >= LEAST) & (common >= THRESHOLD * sizes)]] = True
        return near


def shingles(texts: Sequence[str]) -> Runs:
    """Hashes of all runs of 8 words; none of a shorter text (comparison as a whole must do for it)."""
    return runs_of(words_of(texts), SHINGLE)


def wholes(words: Runs) -> Hashes:
    """uint64 ``[texts]``: a hash of all words of each text in their order; 0 where it has none."""
    pairs = pairwise(words.starts.tolist())
    return np.array(
        [xxhash.xxh3_64_intdigest(words.hashes[a:b].data) if b > a else 0 for a, b in pairs], dtype=np.uint64
    )


def heldout_text(text: str) -> str:
    """The part of a held-out document that is used."""
    data = text.encode()
    return text if len(data) <= MAX_HELDOUT_BYTES else data[:MAX_HELDOUT_BYTES].decode("utf-8", errors="ignore")


def _groups(texts: Sequence[str]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group
