"""Which training documents nearly equal held-out text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.ingest.filters.words import Known, Runs, runs_of, words_of

SHINGLE = 13
"""Words in a shingle: GPT-3's measure of contamination."""
THRESHOLD = 0.5
"""A training document is dropped if at least this share of its shingles occurs in held-out documents."""

GROUP = 1 << 17
"""Characters compared at once: what is computed for them stays in the processor's cache."""


def shingles(texts: Sequence[str]) -> Runs:
    """Hashes of all runs of 13 words; none of a shorter text (exact comparison must do for it)."""
    return runs_of(words_of(texts), SHINGLE)


def overlap(texts: Sequence[str], known: Known) -> NDArray[np.float64]:
    """float64 ``[texts]``: the share of each text's shingles that are ``known``; 0 where it has none."""
    shares = [np.empty(0)]
    for group in _groups(texts):
        own = shingles(group)
        found = np.zeros(len(own.hashes), dtype=np.bool_)
        found[known.places(own.hashes)[0]] = True
        shares.append(own.sums(found) / np.maximum(np.diff(own.starts), 1))
    return np.concatenate(shares)


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
