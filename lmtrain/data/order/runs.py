"""The order of blocks in which runs of consecutive blocks stay together, for training that carries its state.

A group is c = ``run_blocks`` consecutive steps of G blocks each. Slot s of step j of a group reads block j of run
``first / c + s``, where ``first`` is the block at which the group begins: a run goes on in the same slot, step after
step. Which run of which source that is says the ``Sampler``, which counts runs where it else counts blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.order.sampler import Sampler
from lmtrain.data.order.schedule import Event, ScheduleLog
from lmtrain.data.order.steps import Indices, Steps, nearest_multiple
from lmtrain.errors import UsageError


def run_and_place(steps: Steps, ks: Indices) -> tuple[Indices, Indices]:
    """The run that each block belongs to, counted from 0 over all groups, and its place in it: int64 ``[n]``."""
    first, size = steps.group_of(ks)
    place, slot = np.divmod(ks - first, size)
    return first // steps.run_blocks + slot, place


def block_order(seed: int, log: ScheduleLog, windows: Mapping[str, int], steps: Steps) -> Sampler:
    """The order of blocks of a run that reads by ``steps``; see ``Sampler``."""
    return Sampler(seed, log, windows) if steps.run_blocks == 1 else RunSampler(seed, log, windows, steps)


class RunSampler(Sampler):
    """A ``Sampler`` that is asked and told about blocks, and permutes runs of ``steps.run_blocks``.

    Its attribute ``windows`` counts runs. The blocks left over at a source's end belong to no run and are not read.
    """

    def __init__(self, seed: int, log: ScheduleLog, windows: Mapping[str, int], steps: Steps) -> None:
        self.steps, self.run_blocks = steps, steps.run_blocks
        super().__init__(seed, log, windows)

    def extend(self, events: Sequence[Event], windows: Mapping[str, int]) -> None:
        """Raises UsageError, too, for an event amid a group, a skip that would cut a run, a source without a run."""
        runs = {name: count // self.run_blocks for name, count in windows.items()}
        # an added source without a share too: it may get one
        for name in sorted({name for event in events for name in (*event.weights, *event.sources)}):
            if (self.windows | runs).get(name, 1) < 1:
                raise UsageError(
                    f"data.sources.{name}: has less than one run of {self.run_blocks} blocks (data.run_blocks); use "
                    "shorter runs, or leave it out"
                )
        super().extend([self._in_runs(event) for event in events], runs)

    def next_change(self, k: int) -> int:
        first, size = (int(values[0]) for values in self.steps.group_of(np.array([k])))
        return k if k == first else first + size * self.run_blocks

    def get(self, ks: Indices) -> tuple[NDArray[np.int32], Indices, Indices]:
        run, place = run_and_place(self.steps, np.asarray(ks, dtype=np.int64))
        source, window, epoch = super().get(run)
        return source, window * self.run_blocks + place, epoch

    def counts(self, k: int) -> dict[str, int]:
        first, size = (int(values[0]) for values in self.steps.group_of(np.array([k])))
        counts = {name: count * self.run_blocks for name, count in super().counts(first // self.run_blocks).items()}
        if k == first:
            return counts
        whole, slot = divmod(k - first, size)  # steps of the group that are done, and slots of the next
        source = super().get(first // self.run_blocks + np.arange(size))[0]
        begun = np.bincount(source, minlength=len(counts)) * whole + np.bincount(source[:slot], minlength=len(counts))
        return {name: count + int(more) for (name, count), more in zip(counts.items(), begun, strict=True)}

    def shares(self, k: int) -> dict[str, float]:
        return super().shares(int(run_and_place(self.steps, np.array([k]))[0][0]))

    def _in_runs(self, event: Event) -> Event:
        block, skip, run = event.first_block, event.skip, self.run_blocks
        if (later := self.next_change(block)) != block:
            raise UsageError(
                f"an event at block {block:,} is in the middle of a group of {run} steps (data.run_blocks); the next "
                f"group begins at block {later:,}"
            )
        if skip % run:
            tokens = self.steps.block_tokens
            raise UsageError(
                f"skip: {skip * tokens:,} tokens are no whole runs of {run} blocks (data.run_blocks); nearest: "
                f"{nearest_multiple(skip, run) * tokens:,}"
            )
        return replace(event, first_block=block // run, skip=skip // run)
