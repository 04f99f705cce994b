"""The words of texts and their runs as 64-bit hashes: what every filter that compares texts compares.

Case and punctuation do not count. In scripts that put no blanks between words a character is a word.
Many texts at a time, by prefix sums of a polynomial modulo 2^64: a few operations of numpy for a megabyte.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
MAX_LENGTH = 1 << 20
"""Characters hashed at once; a longer text is cut there, be it in a word."""
WITHOUT_SPACES = (
    (0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3021, 0x3029), (0x3038, 0x303B), (0x3400, 0x4DBF), (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF), (0x20000, 0x3FFFD),                                                    # Han
    (0x3041, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F), (0x1AFF0, 0x1B16F),                # Kana
    (0x0E00, 0x0E7F), (0x0E80, 0x0EFF), (0x1780, 0x17FF), (0x1000, 0x109F), (0xA9E0, 0xA9FF), (0xAA60, 0xAA7F),
    (0x1950, 0x19DF), (0x1A20, 0x1AAF), (0xAA80, 0xAADF), (0xA980, 0xA9DF), (0x1B00, 0x1B7F),
)  # fmt: skip
"""First and last code point of the blocks in which one character is one word: Han, Kana; then Thai, Lao, Khmer,
Myanmar (three blocks), Tai Le and New Tai Lue, Tai Tham, Tai Viet, Javanese, Balinese."""
NONE, INSIDE, ALONE = range(3)
_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 1 << 64)


class Runs(NamedTuple):
    """Hashes of words, or of runs of words, of several texts. hashes: uint64 ``[n]``. starts: int64 ``[texts + 1]``:
    those of text i are ``hashes[starts[i]:starts[i + 1]]``."""

    hashes: Hashes
    starts: NDArray[np.int64]

    def of(self, i: int) -> Hashes:
        return self.hashes[self.starts[i] : self.starts[i + 1]]

    def sums(self, flags: NDArray[np.bool_]) -> NDArray[np.int64]:
        """int64 ``[texts]``: how many of a text's hashes are flagged, bool ``[n]``."""
        total = np.zeros(len(flags) + 1, dtype=np.int64)
        np.cumsum(flags, out=total[1:])
        return np.diff(total[self.starts])


def words_of(texts: Sequence[str]) -> Runs:
    r"""The words of each text after NFC and lower-casing: runs of ``\w`` and combining marks, and each character of
    ``WITHOUT_SPACES`` alone."""
    hashes, counts = [np.empty(0, dtype=np.uint64)], np.zeros(len(texts) + 1, dtype=np.int64)
    group: list[tuple[int, str]] = []
    size = 0
    for i, text in enumerate(texts):
        lowered = text.lower() if text.isascii() else unicodedata.normalize("NFC", text).lower()
        for at in range(0, len(lowered), MAX_LENGTH):
            part = lowered[at : at + MAX_LENGTH]
            if size + len(part) > MAX_LENGTH:
                hashes.append(_hash(group, counts))
                group, size = [], 0
            group.append((i, part))
            size += len(part) + 1
    hashes.append(_hash(group, counts))
    return Runs(np.concatenate(hashes), np.cumsum(counts))


def runs_of(words: Runs, length: int) -> Runs:
    """Each run of ``length`` words of each text; a shorter text has none."""
    counts = np.maximum(np.diff(words.starts) - (length - 1), 0)
    starts = np.zeros(len(words.starts), dtype=np.int64)
    np.cumsum(counts, out=starts[1:])
    if not starts[-1]:
        return Runs(np.empty(0, dtype=np.uint64), starts)
    n = len(words.hashes) - length + 1
    first = np.arange(n)
    inside = first + length <= np.repeat(words.starts[1:], np.diff(words.starts))[:n]
    first = first[inside]
    hashes = np.empty(len(first), dtype=np.uint64)
    for at in range(0, len(first), MAX_LENGTH):  # powers are kept for so many places
        here = first[at : at + MAX_LENGTH]
        own = words.hashes[here[0] : here[-1] + length]
        hashes[at : at + MAX_LENGTH] = _differences(own, here - here[0], here - here[0] + length)
    return Runs(hashes, starts)


class Known:
    """A set of hashes to look for. hashes: uint64, sorted, each once."""

    def __init__(self, hashes: Hashes) -> None:
        self.hashes = hashes
        bits = min(max(len(hashes).bit_length() + 4, 8), 26)
        self._shift = np.uint64(64 - bits)
        self._some = np.zeros(1 << bits, dtype=np.bool_)  # most others end here: cheaper than a search
        self._some[hashes >> self._shift] = True

    def __len__(self) -> int:
        return len(self.hashes)

    def places(self, own: Hashes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which of ``own`` are known, and where in ``hashes``: int64 ``[found]`` each."""
        maybe = np.flatnonzero(self._some[own >> self._shift])
        at = np.minimum(np.searchsorted(self.hashes, own[maybe]), max(len(self.hashes) - 1, 0))
        same = self.hashes[at] == own[maybe] if len(self.hashes) else np.zeros(len(maybe), dtype=np.bool_)
        return maybe[same], at[same]


def mix(x: Hashes) -> Hashes:
    """The finaliser of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _hash(group: list[tuple[int, str]], counts: NDArray[np.int64]) -> Hashes:
    """Hashes of the words of all parts; their number is added to ``counts[text + 1]``."""
    joined = "\n".join(part for _, part in group)
    if joined.isascii():
        points: NDArray[np.integer] = np.frombuffer(joined.encode(), dtype=np.uint8)
    else:
        points = np.frombuffer(joined.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
    kind = np.zeros(len(points) + 2, dtype=np.uint8)
    kind[1:-1] = _kinds()[points]
    differ = kind[1:] != kind[:-1]
    if points.dtype == np.uint8:
        border = np.flatnonzero(differ)
        starts, ends = border[::2], border[1::2]
    else:
        alone = kind == ALONE
        starts = np.flatnonzero((kind[1:] != NONE) & (differ | alone[1:]))
        ends = np.flatnonzero((kind[:-1] != NONE) & (differ | alone[:-1]))
    ends_of_parts = np.cumsum([len(part) + 1 for _, part in group])
    before = np.searchsorted(starts, ends_of_parts)
    for (i, _), count in zip(group, np.diff(before, prepend=0).tolist(), strict=True):
        counts[i + 1] += count
    return mix(_differences(points.astype(np.uint64) + np.uint64(1), starts, ends))


def _differences(values: Hashes, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> Hashes:
    """uint64: of each span the polynomial of its values, sum over j of ``values[start + j] * BASE^j``."""
    sums = np.zeros(len(values) + 1, dtype=np.uint64)
    np.cumsum(values * _powers(_BASE, len(values)), out=sums[1:])
    return (sums[ends] - sums[starts]) * _powers(_INVERSE, len(values) + 1)[starts]


_kept: dict[int, Hashes] = {}


def _powers(base: int, count: int) -> Hashes:
    """uint64 ``[count]``: base^0, base^1, ... modulo 2^64."""
    known = _kept.get(base, np.ones(1, dtype=np.uint64))
    while len(known) < count:
        known = np.concatenate([known, known * np.uint64(pow(base, len(known), 1 << 64))])
    _kept[base] = known
    return known[:count]


@cache
def _kinds() -> NDArray[np.uint8]:
    """Of every code point: NONE, INSIDE a word, or a word ALONE."""
    table = np.zeros(sys.maxunicode + 1, dtype=np.uint8)
    everything = np.arange(len(table), dtype="<u4").tobytes().decode("utf-32-le", errors="surrogatepass")
    for found in re.finditer(r"\w+", everything):
        table[found.start() : found.end()] = INSIDE
    marks = (*range(0x300, 0x20000), *range(0xE0100, 0xE01F0))  # all that there are lie there
    table[[point for point in marks if unicodedata.category(everything[point])[0] == "M"]] = INSIDE
    for first, last in WITHOUT_SPACES:
        own = table[first : last + 1]
        own[own == INSIDE] = ALONE
    return table
