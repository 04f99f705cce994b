"""A keyed permutation of [0, N) without a table: any index in O(1), any N up to 2^52, equal on every machine."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
LIMIT = 2**52


def mix(x: Words) -> Words:
    """The splitmix64 finaliser: every output bit depends on every input bit. uint64 of any shape; wraps around."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def permute(index: NDArray[np.int64], size: int, key: Words | np.uint64) -> NDArray[np.int64]:
    """Where the permutation of [0, size) chosen by ``key`` sends each ``index``.

    index: int64 ``[n]`` in [0, size). key: uint64, one for all or ``[n]``. Returns int64 ``[n]``.

    A Feistel network on the grid a x b with a = ceil(sqrt(size)), walked until it falls inside. The round function must
    not be linear: an affine one passes every bijection test and still leaves the low bits almost unshuffled.
    """
    if not 0 < size <= LIMIT:
        raise ValueError(f"permutation: size must be in 1..2^52, got {size}")
    rows = math.isqrt(size - 1) + 1
    a, b = np.uint64(rows), np.uint64(-(-size // rows))
    x = np.asarray(index, dtype=np.int64).astype(np.uint64)
    keys = np.broadcast_to(np.asarray(key, dtype=np.uint64), x.shape)
    y = _rounds(x, a, b, keys, 8 if size < 1000 else 6)
    outside = np.flatnonzero(y >= size)
    while outside.size:
        y[outside] = _rounds(y[outside], a, b, keys[outside], 8 if size < 1000 else 6)
        outside = outside[y[outside] >= size]
    return y.astype(np.int64)


def _rounds(x: Words, a: np.uint64, b: np.uint64, key: Words, rounds: int) -> Words:
    left, right = x // b, x % b
    with np.errstate(over="ignore"):
        for i in range(1, rounds + 1, 2):
            left = (left + mix(right ^ mix(key + np.uint64(i) * GOLDEN)) % a) % a
            right = (right + mix(left ^ mix(key + np.uint64(i + 1) * GOLDEN)) % b) % b
        return left * b + right
