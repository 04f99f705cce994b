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
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from lmtrain.data.order.permutation import GOLDEN, Permutations, mix
from lmtrain.data.order.schedule import Event, ScheduleLog
from lmtrain.errors import UsageError, nearest

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class _Stage:
    """The samples from one event on. Arrays are by the stage's own sources, sorted by name.

    Its word is made when asked for: policies make stages by the thousand, and few are read at any time.
    """

    first: int
    offset: int  # place of sample ``first`` in the endless word: after blocks were skipped it does not begin at 0
    ids: NDArray[np.int32]  # [D] position of each source in Sampler.names
    weights: tuple[int, ...]  # [D] divided by their greatest common divisor; their sum is the period of the word
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
        self._made: dict[tuple[int, int], Permutations] = {}  # by the first and the last epoch, the newest eight
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
        self._made = {}
        for event in events:
            at = bisect_right(self._events, event.first_block, key=lambda past: past.first_block)
            self._events.insert(at, event)
            del self._stages[at:]
        for event in self._events[len(self._stages) :]:
            self._stages.append(self._stage(event))
        self._firsts = np.array([stage.first for stage in self._stages], dtype=np.int64)

    def copy(self) -> Sampler:
        """One that may be extended, to see what would come of it."""
        trial = copy(self)
        trial._events, trial._stages = list(self._events), list(self._stages)
        return trial

    def next_change(self, k: int) -> int:
        """The first block from ``k`` on at which an event may take effect."""
        return k

    def get(self, ks: Indices) -> tuple[NDArray[np.int32], Indices, Indices]:
        """source ids int32, window indices int64 and epochs int64 ``[n]`` of the samples ``ks`` int64 ``[n]``."""
        ks = np.asarray(ks, dtype=np.int64)
        source = np.empty(len(ks), dtype=np.int32)
        ordinal = np.empty(len(ks), dtype=np.int64)
        stage_of = np.searchsorted(self._firsts, ks, side="right") - 1
        for number in np.unique(stage_of):
            stage, at = self._stages[number], np.flatnonzero(stage_of == number)
            word, rank = balanced_word(stage.weights)
            period, place = np.divmod(ks[at] - stage.first + stage.offset, len(word))
            own = word[place]
            source[at] = stage.ids[own]
            ordinal[at] = stage.base[source[at]] + period * np.array(stage.weights)[own] + rank[place]
        epoch, index = np.divmod(ordinal, self._sizes[source])
        orders, which = self._orders(source, epoch)
        return source, orders(index, which), epoch

    def _orders(self, source: NDArray[np.int32], epoch: Indices) -> tuple[Permutations, Indices]:
        """The orders that these sources have in these epochs, ``[n]`` each, and which of them each sample follows."""
        count = len(self.names)
        first, last = (int(epoch.min()), int(epoch.max())) if len(epoch) else (0, 0)
        if (last + 1 - first) * count > len(source):
            return self._permutations(source, epoch), np.arange(len(source))
        made = self._made.get((first, last))  # from call to call they are nearly always the same
        if made is None:
            sources, epochs = np.tile(np.arange(count), last + 1 - first), np.arange(first, last + 1).repeat(count)
            made = self._permutations(sources, epochs)
            self._made = dict([*self._made.items()][-7:]) | {(first, last): made}
        return made, (epoch - first) * count + source

    def _permutations(self, source: NDArray[Any], epoch: Indices) -> Permutations:
        keys = mix(self._keys[source] + mix(epoch.astype(np.uint64) * GOLDEN))
        return Permutations(np.maximum(self._sizes[source], 1), keys)  # a source without a block is not met

    def counts(self, k: int) -> dict[str, int]:
        """Blocks of each source consumed before sample ``k``, those skipped among them, in closed form."""
        stage = self._stages[max(int(np.searchsorted(self._firsts, k, side="right")) - 1, 0)]
        period, place = divmod(k - stage.first + stage.offset, sum(stage.weights))
        # a stage's own beginning needs no word: a report asks for those of all stages
        begun = balanced_word(stage.weights)[0][:place] if place else np.empty(0, dtype=np.int32)
        counts = self._counts(stage, period, np.bincount(begun, minlength=len(stage.ids)))
        return dict(zip(self.names, map(int, counts), strict=True))

    def shares(self, k: int) -> dict[str, float]:
        """The share of the blocks that each source has at sample ``k``; every source is named."""
        stage = self._stages[max(int(np.searchsorted(self._firsts, k, side="right")) - 1, 0)]
        present = {
            self.names[d]: weight / sum(stage.weights) for d, weight in zip(stage.ids, stage.weights, strict=True)
        }
        return {name: float(present.get(name, 0.0)) for name in self.names}

    def _counts(self, stage: _Stage, period: int, letters: Sequence[int] | Indices) -> Indices:
        """Consumed once ``period`` words of ``stage`` and the ``letters`` (counts ``[D]``) of the next were read."""
        counts = np.zeros(len(self.names), dtype=np.int64)
        counts[: len(stage.base)] = stage.base
        counts[stage.ids] += period * np.array(stage.weights) + np.array(letters)
        return counts

    def _stage(self, event: Event) -> _Stage:
        """The stage that ``event`` opens after the last one there is."""
        last = self._stages[-1] if self._stages else None
        if last and not event.weights:
            offset = last.offset + event.first_block - last.first + event.skip
            return replace(last, first=event.first_block, offset=offset)
        base = np.zeros(len(self.names), dtype=np.int64)
        if last:
            read = event.first_block - last.first + last.offset + event.skip
            period, place = divmod(read, sum(last.weights))
            base = self._counts(last, period, letters_before(place, last.weights))
        names = sorted(event.weights)
        divisor = math.gcd(*event.weights.values())
        weights = tuple(event.weights[name] // divisor for name in names)
        ids = np.array([self.names.index(name) for name in names], dtype=np.int32)
        return _Stage(event.first_block, 0, ids, weights, base)


@lru_cache(maxsize=64)
def balanced_word(weights: tuple[int, ...]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """A word of length P = sum(weights) with ``weights[d]`` letters d, every prefix of length j holding letter d
    ``j * weights[d] / P`` times to within ``1 - 1 / (2D - 2)`` (Tijdeman 1980); and each letter's rank among its kind.
    """
    word = np.array(_spell(weights, sum(weights)), dtype=np.int32)
    rank = np.empty(len(word), dtype=np.int32)
    rank[np.argsort(word, kind="stable")] = np.concatenate([np.arange(weight) for weight in weights])
    word.flags.writeable = rank.flags.writeable = False
    return word, rank


@lru_cache(maxsize=1 << 16)  # by the borders of stages: when an event comes in the past, those after it are as before
def letters_before(place: int, weights: tuple[int, ...]) -> tuple[int, ...]:
    """How often each letter comes in the first ``place`` letters of the word of ``weights``."""
    return tuple(np.bincount(_spell(weights, place), minlength=len(weights)).tolist()) if place else (0,) * len(weights)


def _spell(weights: tuple[int, ...], stop: int) -> list[int]:
    """The first ``stop`` letters: earliest deadline first among those already released, the lower one of two alike.

    Where none is released the next one to be is taken. Integers only.
    """
    total, scale, letters = sum(weights), max(2 * len(weights) - 2, 1), len(weights)
    releases, keys = [], []
    for d, weight in enumerate(weights):
        ordinal = np.arange(min(weight, stop * weight // total + 2), dtype=np.int64)  # no prefix holds more
        releases.append(-(-(ordinal * scale + 1) * total // (weight * scale)) - 1)
        deadline = ((ordinal + 1) * scale - 1) * total // (weight * scale)
        keys.append(deadline * letters + d)
    release, key = np.concatenate(releases), np.concatenate(keys)
    order = np.lexsort((key % letters, release))
    release_of, key_of = release[order].tolist(), key[order].tolist()
    ready: list[int] = []
    word = [0] * stop
    following = 0
    for place in range(stop):
        while following < len(key_of) and (release_of[following] <= place or not ready):
            heapq.heappush(ready, key_of[following])
            following += 1
        word[place] = heapq.heappop(ready) % letters
    return word
