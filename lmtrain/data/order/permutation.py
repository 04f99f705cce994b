"""A keyed permutation of [0, N) without a table: any index in O(1), any N up to 2^52, equal on every machine."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
Indices = NDArray[np.int64]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
LIMIT = 2**52
ROUNDS, ROUNDS_OF_SMALL, SMALL = 6, 8, 1000
"""Below the size SMALL two rounds more are needed for every place to be equally likely."""


def mix(x: Words) -> Words:
    """The splitmix64 finaliser: every output bit depends on every input bit. uint64 of any shape; wraps around."""
    with np.errstate(over="ignore"):
        y = x >> np.uint64(30)
        y ^= x
        y *= np.uint64(0xBF58476D1CE4E5B9)
        z = y >> np.uint64(27)
        z ^= y
        z *= np.uint64(0x94D049BB133111EB)
        y = z >> np.uint64(31)
        y ^= z
        return y


class Permutations:
    """Keyed permutations of [0, size), one for each of ``sizes`` and ``keys`` ``[m]``.

    A Feistel network on the grid a x b with a = ceil(sqrt(size)), walked until it falls inside. The round function must
    not be linear: an affine one passes every bijection test and still leaves the low bits almost unshuffled.
    """

    def __init__(self, sizes: Indices, keys: Words) -> None:
        if sizes.size and not 0 < int(sizes.min()) <= int(sizes.max()) <= LIMIT:
            raise ValueError(f"permutation: size must be in 1..2^52, got {sizes.min()}..{sizes.max()}")
        rows = np.ceil(np.sqrt(sizes)).astype(np.int64)
        rows += rows * rows < sizes  # a root just above an integer was rounded to it
        self._a, self._b = rows.astype(np.uint64), (-(-sizes // rows)).astype(np.uint64)
        self._limit, self._small = sizes.astype(np.uint64), sizes < SMALL
        with np.errstate(over="ignore"):
            self._keys = [mix(keys + np.uint64(i) * GOLDEN) for i in range(1, ROUNDS_OF_SMALL + 1)]

    def __call__(self, index: Indices, which: Indices) -> Indices:
        """Where permutation ``which`` (int64 ``[n]``, in [0, m)) sends each ``index`` int64 ``[n]``; int64 ``[n]``."""
        x = index.astype(np.uint64)
        small = self._small[which] if self._small.any() else np.zeros(0, dtype=np.bool_)
        if not small.any():
            return self._walk(x, which, ROUNDS).astype(np.int64)
        for part, rounds in ((small, ROUNDS_OF_SMALL), (~small, ROUNDS)):
            x[part] = self._walk(x[part], which[part], rounds)
        return x.astype(np.int64)

    def _walk(self, x: Words, which: Indices, rounds: int) -> Words:
        limit = self._limit[which]
        y = self._rounds(x, which, rounds)
        outside = np.flatnonzero(y >= limit)
        while outside.size:
            y[outside] = self._rounds(y[outside], which[outside], rounds)
            outside = outside[y[outside] >= limit[outside]]
        return y

    def _rounds(self, x: Words, which: Indices, rounds: int) -> Words:
        a, b = self._a[which], self._b[which]
        left, right = np.divmod(x, b)
        with np.errstate(over="ignore"):
            for i in range(0, rounds, 2):
                left = _turn(left, right, a, self._keys[i][which])
                right = _turn(right, left, b, self._keys[i + 1][which])
            return left * b + right


def permute(index: Indices, size: Indices | int, key: Words | np.uint64) -> Indices:
    """Where the permutation of [0, size) chosen by ``key`` sends each ``index``.

    index: int64 ``[n]`` in [0, size). size: int or int64 ``[n]``, of each index's own permutation. key: uint64, one for
    all or ``[n]``. Returns int64 ``[n]``.
    """
    index = np.asarray(index, dtype=np.int64)
    sizes, keys = np.asarray(size, dtype=np.int64), np.asarray(key, dtype=np.uint64)
    if sizes.ndim == keys.ndim == 0:
        return Permutations(sizes[None], keys[None])(index, np.zeros(index.shape, dtype=np.int64))
    each = Permutations(np.broadcast_to(sizes, index.shape), np.broadcast_to(keys, index.shape))
    return each(index, np.arange(index.size))


def _turn(half: Words, other: Words, modulus: Words, key: Words) -> Words:
    """(half + mix(other ^ key)) % modulus, for half < modulus <= 2^26."""
    word = mix(key ^ other)
    word %= modulus
    word += half
    return np.minimum(word, word - modulus)  # below the modulus the difference wraps around and is the larger
