"""Which documents are the same, or nearly the same, as one seen before."""

from __future__ import annotations

import re
import unicodedata

import numpy as np
import xxhash
from numpy.typing import NDArray

SHINGLE = 13
"""Words in a shingle: GPT-3's measure of contamination."""
THRESHOLD = 0.5
"""A training document is dropped if at least this share of its shingles occurs in held-out documents."""

_WORD = re.compile(r"\w+")


def text_digest(text: str) -> bytes:
    """16 bytes, xxh3-128 of the text after NFC, lower-casing and collapsing of white space."""
    return xxhash.xxh3_128_digest(" ".join(unicodedata.normalize("NFC", text).lower().split()).encode())


def shingles(text: str) -> NDArray[np.uint64]:
    """Hashes of all runs of 13 words, uint64; empty for a shorter text (exact comparison must do for it)."""
    words = [xxhash.xxh3_64_intdigest(word.encode()) for word in _WORD.findall(text.lower())]
    count = len(words) - SHINGLE + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    hashes = np.array(words, dtype=np.uint64)
    total = np.zeros(count, dtype=np.uint64)
    for i in range(SHINGLE):  # a polynomial in an odd constant, modulo 2^64
        total = total * np.uint64(0x9E3779B97F4A7C15) + hashes[i : i + count]
    return total


def overlap(text: str, known: NDArray[np.uint64]) -> float:
    """Share of the text's shingles that are in the sorted ``known``."""
    own = shingles(text)
    if not own.size or not known.size:
        return 0.0
    at = np.minimum(np.searchsorted(known, own), known.size - 1)
    return float((known[at] == own).mean())
