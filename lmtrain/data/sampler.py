"""Which window of which source is sample k: a pure function of seed, schedule log and k.

Sources are interleaved by a balanced periodic word, so that every prefix holds each source's share to within one block;
inside a source, epoch after epoch, windows follow a keyed permutation. Nothing is stored per sample.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import xxhash
from numpy.typing import NDArray

from lmtrain.data.permutation import GOLDEN, mix, permute
from lmtrain.data.schedule import Event, ScheduleLog
from lmtrain.errors import UsageError, nearest

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class _Stage:
    """One event, ready to be asked. All arrays are by the stage's own sources, sorted by name."""

    first: int
    ids: NDArray[np.int32]  # [D] position of each source in Sampler.names
    weights: Indices  # [D] divided by their greatest common divisor
    word: NDArray[np.int32]  # [P] which source comes at each place of the period
    rank: Indices  # [P] how many of the same source came before it in the period
    base: Indices  # [len(names)] samples of every source before this stage


class Sampler:
    """``windows``: how many each source has, by name; their order gives the source ids (0, 1, ...).

    seed: any int. log: at least one event; every source it names must be in ``windows``. The permutation is keyed by
    (seed, name, epoch): adding a source, or reordering them, leaves the others' orders as they are.
    """

    def __init__(self, seed: int, log: ScheduleLog, windows: Mapping[str, int]) -> None:
        self.names = list(windows)
        self.windows = dict(windows)
        self._sizes = [int(count) for count in windows.values()]
        self._keys = [np.uint64(xxhash.xxh3_64_intdigest(name.encode(), seed=seed % 2**64)) for name in self.names]
        self._stages: list[_Stage] = []
        base = np.zeros(len(self.names), dtype=np.int64)
        for event in log.events:
            if self._stages:
                base = self._counts(event.first_block, self._stages[-1])
            self._stages.append(self._stage(event, base))
        self._firsts = np.array([stage.first for stage in self._stages], dtype=np.int64)

    def get(self, ks: Indices) -> tuple[NDArray[np.int32], Indices, Indices]:
        """source ids int32, window indices int64 and epochs int64 ``[n]`` of the samples ``ks`` int64 ``[n]``."""
        ks = np.asarray(ks, dtype=np.int64)
        source = np.empty(len(ks), dtype=np.int32)
        ordinal = np.empty(len(ks), dtype=np.int64)
        stage_of = np.searchsorted(self._firsts, ks, side="right") - 1
        for number in np.unique(stage_of):
            stage, at = self._stages[number], np.flatnonzero(stage_of == number)
            period, place = np.divmod(ks[at] - stage.first, len(stage.word))
            own = stage.word[place]
            source[at] = stage.ids[own]
            ordinal[at] = stage.base[source[at]] + period * stage.weights[own] + stage.rank[place]
        window, epoch = np.empty_like(ordinal), np.empty_like(ordinal)
        for d in np.unique(source):
            at = np.flatnonzero(source == d)
            epoch[at], index = np.divmod(ordinal[at], self._sizes[d])
            with np.errstate(over="ignore"):
                keys = mix(self._keys[d] + mix(epoch[at].astype(np.uint64) * GOLDEN))
            window[at] = permute(index, self._sizes[d], keys)
        return source, window, epoch

    def counts(self, k: int) -> dict[str, int]:
        """Samples of each source among the first ``k``, in closed form."""
        number = max(int(np.searchsorted(self._firsts, k, side="right")) - 1, 0)
        return dict(zip(self.names, map(int, self._counts(k, self._stages[number])), strict=True))

    def _counts(self, k: int, stage: _Stage) -> Indices:
        period, place = divmod(k - stage.first, len(stage.word))
        counts = stage.base.copy()
        counts[stage.ids] += period * stage.weights
        counts[stage.ids] += np.bincount(stage.word[:place], minlength=len(stage.ids))
        return counts

    def _stage(self, event: Event, base: Indices) -> _Stage:
        names = sorted(event.weights)
        for name in names:
            if name not in self.windows:
                raise UsageError(f"schedule: unknown source {name}{nearest(name, self.names)}")
            if self.windows[name] < 1:
                raise UsageError(f"schedule: source {name} has no whole block")
        divisor = math.gcd(*event.weights.values())
        weights = tuple(event.weights[name] // divisor for name in names)
        word, rank = balanced_word(weights)
        ids = np.array([self.names.index(name) for name in names], dtype=np.int32)
        return _Stage(event.first_block, ids, np.array(weights, dtype=np.int64), word, rank, base)


@lru_cache(maxsize=16)
def balanced_word(weights: tuple[int, ...]) -> tuple[NDArray[np.int32], Indices]:
    """A word of length P = sum(weights) with ``weights[d]`` letters d, every prefix of length j holding letter d
    ``j * weights[d] / P`` times to within ``1 - 1 / (2D - 2)`` (Tijdeman 1980); and each letter's rank among its kind.

    Earliest deadline first among the letters already released; integers only.
    """
    total, scale = sum(weights), max(2 * len(weights) - 2, 1)
    count = [0] * len(weights)

    def release(d: int) -> int:
        return -(-(count[d] * scale + 1) * total // (weights[d] * scale)) - 1

    def deadline(d: int) -> int:
        return ((count[d] + 1) * scale - 1) * total // (weights[d] * scale)

    future = [(release(d), d) for d in range(len(weights))]
    heapq.heapify(future)
    ready: list[tuple[int, int]] = []
    word = np.empty(total, dtype=np.int32)
    rank = np.empty(total, dtype=np.int64)
    for place in range(total):
        while future and (future[0][0] <= place or not ready):
            _, d = heapq.heappop(future)
            heapq.heappush(ready, (deadline(d), d))
        _, d = heapq.heappop(ready)
        word[place], rank[place] = d, count[d]
        count[d] += 1
        if count[d] < weights[d]:
            heapq.heappush(future, (release(d), d))
    word.flags.writeable = rank.flags.writeable = False
    return word, rank
