"""A keyed permutation of [0, N) without a table: any index in O(1), any N up to 2^52, equal on every machine."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
Indices = NDArray[np.int64]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
LIMIT = 2**52
SMALL = 1000
"""Below this size two rounds more are needed for every place to be equally likely."""


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


def permute(index: Indices, size: Indices | int, key: Words | np.uint64) -> Indices:
    """Where the permutation of [0, size) chosen by ``key`` sends each ``index``.

    index: int64 ``[n]`` in [0, size). size: int or int64 ``[n]``, of each index's own permutation. key: uint64, one for
    all or ``[n]``. Returns int64 ``[n]``.

    A Feistel network on the grid a x b with a = ceil(sqrt(size)), walked until it falls inside. The round function must
    not be linear: an affine one passes every bijection test and still leaves the low bits almost unshuffled.
    """
    x = np.asarray(index, dtype=np.int64).astype(np.uint64)
    sizes = np.broadcast_to(np.asarray(size, dtype=np.int64), x.shape)
    keys = np.broadcast_to(np.asarray(key, dtype=np.uint64), x.shape)
    if x.size and not 0 < int(sizes.min()) <= int(sizes.max()) <= LIMIT:
        raise ValueError(f"permutation: size must be in 1..2^52, got {sizes.min()}..{sizes.max()}")
    small = sizes < SMALL
    if not small.any():
        return _walk(x, sizes, keys, 6).astype(np.int64)
    for part, rounds in ((small, 8), (~small, 6)):
        x[part] = _walk(x[part], sizes[part], keys[part], rounds)
    return x.astype(np.int64)


def _walk(x: Words, sizes: Indices, keys: Words, rounds: int) -> Words:
    rows = np.ceil(np.sqrt(sizes)).astype(np.int64)
    rows += rows * rows < sizes  # a root just above an integer was rounded to it
    a, b = rows.astype(np.uint64), (-(-sizes // rows)).astype(np.uint64)
    limit = sizes.astype(np.uint64)
    y = _rounds(x, a, b, keys, rounds)
    outside = np.flatnonzero(y >= limit)
    while outside.size:
        y[outside] = _rounds(y[outside], a[outside], b[outside], keys[outside], rounds)
        outside = outside[y[outside] >= limit[outside]]
    return y


def _rounds(x: Words, a: Words, b: Words, keys: Words, rounds: int) -> Words:
    left, right = np.divmod(x, b)
    with np.errstate(over="ignore"):
        for i in range(1, rounds + 1, 2):
            left = _turn(left, right, a, keys + np.uint64(i) * GOLDEN)
            right = _turn(right, left, b, keys + np.uint64(i + 1) * GOLDEN)
        return left * b + right


def _turn(half: Words, other: Words, modulus: Words, key: Words) -> Words:
    """(half + mix(other ^ mix(key))) % modulus, for half < modulus <= 2^26."""
    word = mix(key)
    word ^= other
    word = mix(word)
    word %= modulus
    word += half
    return np.minimum(word, word - modulus)  # below the modulus the difference wraps around and is the larger
