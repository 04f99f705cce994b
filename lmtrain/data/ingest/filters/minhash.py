"""Near-duplicates by MinHash and locality-sensitive hashing: 5-word runs, 14 bands of 8 rows (FineWeb's setting).

Two documents whose sets of runs have Jaccard similarity s share a band with probability 1 - (1 - s^8)^14: 0.77 at
s = 0.75, 0.27 at 0.6, 0.0009 at 0.3.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.ingest.filters.words import Hashes, mix

RUN = 5
BANDS, ROWS = 14, 8
_PIECE = 1 << 12


def band_keys(runs: Hashes) -> Hashes:
    """uint64 ``[14]``: a key per band of a text's ``runs`` of 5 words; texts with one key in common are taken for near-
    duplicates. All 0: it has none.
    """
    runs = np.unique(runs)
    if not runs.size:
        return np.zeros(BANDS, dtype=np.uint64)
    factors, terms = _permutations()
    least = np.full(BANDS * ROWS, np.iinfo(np.uint64).max, dtype=np.uint64)
    for start in range(0, len(runs), _PIECE):
        np.minimum(least, (runs[start : start + _PIECE, None] * factors + terms).min(axis=0), out=least)
    keys = np.zeros(BANDS, dtype=np.uint64)
    for row in least.reshape(BANDS, ROWS).T:
        keys = mix(keys ^ row)
    return np.maximum(keys, np.uint64(1))


@cache
def _permutations() -> tuple[Hashes, Hashes]:
    """Odd factors and terms of x -> a x + b modulo 2^64, uint64 ``[112]`` each."""
    drawn = mix(np.arange(1, 2 * BANDS * ROWS + 1, dtype=np.uint64))
    return drawn[::2] | np.uint64(1), drawn[1::2]


def earlier_match(keys: Hashes) -> NDArray[np.int64]:
    """int64 ``[n]``: the first document that shares a band's key with document i of ``keys`` ``[n, 14]``; i if none.

    A match with a document that itself matches an earlier one counts: of a chain only the first stays.
    """
    own = np.arange(len(keys))
    first = own.copy()
    for band in keys.T:
        _, opener, group = np.unique(band, return_index=True, return_inverse=True)
        np.minimum(first, np.where(band == 0, own, opener[group]), out=first)
    return first
