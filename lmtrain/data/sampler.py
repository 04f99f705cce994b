"""Which window of which source is sample k: a pure function of seed, schedule log and k.

Sources are interleaved by a balanced periodic word, so that every prefix holds each source's share to within one block;
inside a source, epoch after epoch, windows follow a keyed permutation. Nothing is stored per sample.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
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
    """The samples from one event on, ready to be asked. Arrays are by the stage's own sources, sorted by name."""

    first: int
    offset: int  # place of sample ``first`` in the endless word: after blocks were skipped it does not begin at 0
    ids: NDArray[np.int32]  # [D] position of each source in Sampler.names
    weights: Indices  # [D] divided by their greatest common divisor
    word: NDArray[np.int32]  # [P] which source comes at each place of the period
    rank: Indices  # [P] how many of the same source came before it in the period
    base: Indices  # [sources known then] samples of every source before place 0


class Sampler:
    """``windows``: how many each source has, by name; their order gives the source ids (0, 1, ...).

    seed: any int. log: at least one event; every source it names must be in ``windows``. The permutation is keyed by
    (seed, name, epoch): adding a source, or reordering them, leaves the others' orders as they are.
    """

    def __init__(self, seed: int, log: ScheduleLog, windows: Mapping[str, int]) -> None:
        self.seed = seed
        self.names: list[str] = []
        self.windows: dict[str, int] = {}
        self._keys = np.empty(0, dtype=np.uint64)
        self._events: list[Event] = []
        self._stages: list[_Stage] = []
        self._firsts = np.empty(0, dtype=np.int64)
        self.extend(log.events, windows)

    def extend(self, events: Sequence[Event], windows: Mapping[str, int]) -> None:
        """Take further ``events`` and, with the next ids, the sources ``windows``; samples before them stay the same.

        Raises UsageError, with nothing changed, for an event that names a source not known or without a whole block.
        """
        known = self.windows | dict(windows)
        for name in {name for event in events for name in event.weights}:
            if name not in known:
                raise UsageError(f"schedule: unknown source {name}{nearest(name, known)}")
            if known[name] < 1:
                raise UsageError(f"schedule: source {name} has no whole block")
        self.names = list(known)
        self.windows = {name: int(count) for name, count in known.items()}
        keys = [xxhash.xxh3_64_intdigest(name.encode(), seed=self.seed % 2**64) for name in known]
        self._keys, self._sizes = np.array(keys, dtype=np.uint64), np.array(list(known.values()), dtype=np.int64)
        for event in events:
            at = bisect_right(self._events, event.first_block, key=lambda past: past.first_block)
            self._events.insert(at, event)
            del self._stages[at:]
            for later in self._events[at:]:
                self._stages.append(self._stage(later))
        self._firsts = np.array([stage.first for stage in self._stages], dtype=np.int64)

    def copy(self) -> Sampler:
        """One that may be extended, to see what would come of it."""
        trial = copy(self)  # stages are shared: to build hundreds anew would take minutes
        trial._events, trial._stages = list(self._events), list(self._stages)
        return trial

    def get(self, ks: Indices) -> tuple[NDArray[np.int32], Indices, Indices]:
        """source ids int32, window indices int64 and epochs int64 ``[n]`` of the samples ``ks`` int64 ``[n]``."""
        ks = np.asarray(ks, dtype=np.int64)
        source = np.empty(len(ks), dtype=np.int32)
        ordinal = np.empty(len(ks), dtype=np.int64)
        stage_of = np.searchsorted(self._firsts, ks, side="right") - 1
        for number in np.unique(stage_of):
            stage, at = self._stages[number], np.flatnonzero(stage_of == number)
            period, place = np.divmod(ks[at] - stage.first + stage.offset, len(stage.word))
            own = stage.word[place]
            source[at] = stage.ids[own]
            ordinal[at] = stage.base[source[at]] + period * stage.weights[own] + stage.rank[place]
        epoch, index = np.divmod(ordinal, self._sizes[source])
        keys = mix(self._keys[source] + mix(epoch.astype(np.uint64) * GOLDEN))
        return source, permute(index, self._sizes[source], keys), epoch

    def counts(self, k: int) -> dict[str, int]:
        """Blocks of each source consumed before sample ``k``, those skipped among them, in closed form."""
        number = max(int(np.searchsorted(self._firsts, k, side="right")) - 1, 0)
        return dict(zip(self.names, map(int, self._counts(k, self._stages[number])), strict=True))

    def shares(self, k: int) -> dict[str, float]:
        """The share of the blocks that each source has at sample ``k``; every source is named."""
        stage = self._stages[max(int(np.searchsorted(self._firsts, k, side="right")) - 1, 0)]
        present = {self.names[d]: weight / len(stage.word) for d, weight in zip(stage.ids, stage.weights, strict=True)}
        return {name: float(present.get(name, 0.0)) for name in self.names}

    def _counts(self, k: int, stage: _Stage, skip: int = 0) -> Indices:
        period, place = divmod(k - stage.first + stage.offset + skip, len(stage.word))
        counts = np.zeros(len(self.names), dtype=np.int64)
        counts[: len(stage.base)] = stage.base
        counts[stage.ids] += period * stage.weights
        counts[stage.ids] += np.bincount(stage.word[:place], minlength=len(stage.ids))
        return counts

    def _stage(self, event: Event) -> _Stage:
        """The stage that ``event`` opens after the last one there is."""
        if not event.weights:
            last = self._stages[-1]
            offset = last.offset + event.first_block - last.first + event.skip
            return replace(last, first=event.first_block, offset=offset)
        base = np.zeros(len(self.names), dtype=np.int64)
        if self._stages:
            base = self._counts(event.first_block, self._stages[-1], event.skip)
        names = sorted(event.weights)
        divisor = math.gcd(*event.weights.values())
        weights = tuple(event.weights[name] // divisor for name in names)
        word, rank = balanced_word(weights)
        ids = np.array([self.names.index(name) for name in names], dtype=np.int32)
        return _Stage(event.first_block, 0, ids, np.array(weights, dtype=np.int64), word, rank, base)


@lru_cache(maxsize=64)
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
