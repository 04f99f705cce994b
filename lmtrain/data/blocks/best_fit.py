"""Documents cut into pieces, and pieces placed in blocks: best fit decreasing (Ding et al. 2024, arXiv 2404.10830)."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.store.store import Store


def num_pieces(document_lengths: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Pieces of documents of so many tokens: 0 of an empty one, else one per ``length`` targets and at least one."""
    return np.where(document_lengths > 0, np.maximum(-(-(document_lengths - 1) // length), 1), 0)


def cut(store: Store, length: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """First token and number of tokens of every piece of every document: int64 and int32 ``[n]``, in order."""
    starts, lengths = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int32)]
    for at, sizes in store.document_lengths():
        first = store.borders.starts(at, at + len(sizes))
        counts = num_pieces(sizes, length)
        number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of the piece in its document
        starts.append(np.repeat(first, counts) + number * length)
        lengths.append(np.minimum(np.repeat(sizes, counts) - number * length, length + 1).astype(np.int32))
    return np.concatenate(starts), np.concatenate(lengths)


def best_fit(sizes: NDArray[np.int32], capacity: int) -> NDArray[np.int64]:
    """The bin of each piece, int64 ``[n]``: largest first, each into the fullest bin with room for it, else a new one.

    sizes: ``[n]`` in ``[1, capacity]``. Pieces of one size are placed together, as many into each bin in turn as fit:
    what one by one does, too, since a bin just filled is the fullest of those it was chosen from. O(n + capacity^2).
    """
    bins = np.empty(len(sizes), dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    free: dict[int, NDArray[np.int64]] = {}  # room left -> bins, in the order in which they came to it
    rooms: list[int] = []  # its keys, sorted
    num_bins = at = 0

    def put(room: int, found: NDArray[np.int64]) -> None:
        if room and len(found):
            if room in free:
                free[room] = np.concatenate([free[room], found])
            else:
                free[room] = found
                insort(rooms, room)

    counts = np.bincount(sizes, minlength=capacity + 1)
    for size in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[size])
        while left:
            i = bisect_left(rooms, size)
            if i < len(rooms):
                room = rooms.pop(i)
                found = free.pop(room)
            else:
                room = capacity
                found = np.arange(num_bins, num_bins - (-left // (capacity // size)))
                num_bins += len(found)
            each = room // size
            full = min(len(found), left // each)
            rest = left - full * each if full < len(found) else 0  # into one bin more, which stays open
            taken = np.concatenate([np.repeat(found[:full], each), np.repeat(found[full : full + 1], rest)])
            bins[order[at : at + len(taken)]] = taken
            put(room - each * size, found[:full])
            put(room - rest * size, found[full : full + 1])
            put(room, found[full + 1 :])
            at, left = at + len(taken), left - len(taken)
    return bins
