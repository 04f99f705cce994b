"""Batches of a run: the main process plans which blocks a step reads, any number of workers read them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from lmtrain.data.catalog import Catalog
from lmtrain.data.config import DataConfig
from lmtrain.data.order.runs import block_order, run_and_place
from lmtrain.data.order.sampler import Sampler
from lmtrain.data.order.schedule import Event, ScheduleLog
from lmtrain.data.order.steps import Ramp, Steps, nearest_multiple
from lmtrain.data.policies.epochs import check_epochs
from lmtrain.data.processes import die_with_parent
from lmtrain.data.reader import Reader, Rows, StepData, StepPlan
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import LmtrainError, UsageError

PREFETCH = 2
"""Steps that each worker reads ahead."""


class Loader:
    """Reads the blocks of a run.

    Micro-batch i of data rank r of R holds, of step t, ``m`` blocks from ``first_block(t) + (i * R + r) * m``. A block
    is ``block_tokens / seq_len`` rows.

    microbatch: rows of ``cfg.seq_len`` in one micro-batch on one rank. log: which source is read when; ``extend`` tells
    of its growth. workers: processes that read ahead; 0 reads in the caller's. batch_ramp: see ``Steps``. Raises
    UsageError or DataError in one line before anything is read.

    schedule: the steps. sampler: the order of blocks. catalog: the sources. vocab_size, fingerprint: the tokenizer's.
    lead: an event that all ranks hear of while they hold step t may take effect from step ``t + lead`` on; in training
    on runs of blocks, at the beginning of a group of steps (``earliest``).
    """

    def __init__(
        self,
        cfg: DataConfig,
        *,
        seed: int,
        batch_tokens: int,
        microbatch: int,
        dp_rank: int,
        dp_size: int,
        log: ScheduleLog,
        workers: int = 0,
        batch_ramp: Ramp = (),
    ) -> None:
        self.cfg, self.workers, self.dp_rank, self.dp_size = cfg, workers, dp_rank, dp_size
        self.block_tokens = cfg.block_length
        self.lead = PREFETCH * workers + 1
        self._blocks_per_microbatch = _blocks_per_microbatch(cfg, batch_tokens, batch_ramp, microbatch, dp_size)
        self.schedule = Steps(
            block_tokens=self.block_tokens,
            batch_tokens=batch_tokens,
            seq_len=cfg.seq_len,
            batch_ramp=batch_ramp,
            seq_lens=cfg.seq_lens,
            run_blocks=cfg.run_blocks,
        )
        tokenizer = Tokenizer.load(cfg.tokenizer)
        self.vocab_size, self.fingerprint = tokenizer.vocab_size, tokenizer.fingerprint
        self.catalog = Catalog(cfg, tokenizer, seed)
        blocks = dict(self.catalog.blocks)  # workers get these; what comes later they open themselves
        self.catalog.add(log.events)
        self.sampler = block_order(seed, log, self.catalog.sizes(), self.schedule)
        self.log_length = len(log.events)
        self._planned = 0  # blocks that some worker may have read
        self._reader = Reader(blocks, cfg, self._blocks_per_microbatch, self.vocab_size)

    @property
    def source_names(self) -> list[str]:
        """By source id."""
        return self.sampler.names

    @property
    def tokens_available(self) -> dict[str, int]:
        """Tokens of whole blocks, or runs, by name."""
        return self._available(self.sampler)

    def _available(self, sampler: Sampler) -> dict[str, int]:
        window = self.block_tokens * self.cfg.run_blocks
        return {name: count * window for name, count in sampler.windows.items()}

    def earliest(self, step: int) -> int:
        """The first block that an event may change of which all ranks hear while they hold ``step``."""
        return self.sampler.next_change(self.schedule.first_block(step + self.lead))

    def tokens_read(self, step: int, sampler: Sampler | None = None) -> dict[str, int]:
        """Tokens of each source consumed before ``step``, those skipped among them."""
        counts = (sampler or self.sampler).counts(self.schedule.first_block(step))
        return {name: count * self.block_tokens for name, count in counts.items()}

    def admit(self, event: Event, stop: int | None, ahead: Sequence[Event] = ()) -> list[str]:
        """Raise UsageError or DataError if the log cannot take ``event`` now; nothing changes.

        stop: the steps of the run; None: what it will read is not known. ahead: events that will follow. Of the sources
        that the run would read more of than without ``event``, none may be read more often than ``data.max_epochs``;
        returns a warning for each that is read often.
        """
        self._refuse_past(event)
        _, new = self.catalog.check([event])
        before, trial = self.sampler.copy(), self.sampler.copy()
        trial.extend([event, *ahead], new)
        if stop is None:
            return []
        before.extend(ahead, {})
        without = self.tokens_read(stop, before)
        plan = {name: count for name, count in self.tokens_read(stop, trial).items() if count > without.get(name, 0)}
        return check_epochs(plan, self._available(trial), self.cfg.max_epochs)

    def extend(self, events: Sequence[Event]) -> None:
        """Take further events of the log, and the sources they add. Every rank does so while it holds the same step.

        Raises UsageError for an event that would change what is being read already, DataError for a source that differs
        here from what the event says.
        """
        for event in events:
            self._refuse_past(event)
        self.sampler.extend(events, self.catalog.add(events))
        self.log_length += len(events)

    def _refuse_past(self, event: Event) -> None:
        if event.first_block < self._planned:
            raise UsageError(
                f"an event at block {event.first_block:,} comes too late: blocks up to {self._planned:,} are being "
                "read already"
            )

    def steps(self, first: int, stop: int) -> Iterator[StepData]:
        """Steps ``first`` to ``stop - 1`` in order; each a pure function of its number and the log."""
        plans = self._plans(first, stop)
        if self.workers == 0 or stop <= first:
            yield from (self._reader[plan].step_data() for plan in plans)
            return
        for rows in DataLoader(
            _Carrier(self._reader),
            batch_size=None,
            sampler=plans,
            collate_fn=_unchanged,
            num_workers=self.workers,
            prefetch_factor=PREFETCH,
            multiprocessing_context="spawn",  # a fork would inherit the run's lock and the threads' locks
            worker_init_fn=partial(_start_worker, os.getpid()),
        ):
            if isinstance(rows, LmtrainError):
                raise rows
            yield rows.step_data()

    def _plans(self, first: int, stop: int) -> Iterator[StepPlan]:
        """Asked for a step when a worker is free for it: the schedule as it is then decides."""
        for step in range(first, stop):
            num_blocks = self.schedule.num_blocks(step)
            self._planned = self.schedule.first_block(step + 1)
            m = self._blocks_per_microbatch
            slots = np.arange(num_blocks).reshape(-1, self.dp_size, m)[:, self.dp_rank].reshape(-1)
            ks = self.schedule.first_block(step) + slots
            source, window, _ = self.sampler.get(ks)
            run, place = run_and_place(self.schedule, ks)
            yield StepPlan(
                step=step,
                seq_len=self.schedule.seq_len(step),
                num_blocks=num_blocks,
                slots=slots,
                ks=ks,
                source=source,
                window=window,
                run=run,
                place=place,
                names=tuple(self.sampler.names),
                added=dict(self.catalog.added),
                log_length=self.log_length,
            )


@dataclass(frozen=True)
class _Carrier(Dataset[Rows | LmtrainError]):
    """The reader in a worker: hands an error over as it is, where DataLoader would wrap it in a traceback."""

    reader: Reader

    def __getitem__(self, plan: StepPlan) -> Rows | LmtrainError:
        try:
            return self.reader[plan]
        except LmtrainError as error:
            return error


def _blocks_per_microbatch(cfg: DataConfig, batch_tokens: int, ramp: Ramp, microbatch: int, dp_size: int) -> int:
    """Blocks of one micro-batch, or UsageError naming the value that does not divide and the nearest that does."""
    block = cfg.block_length
    per_block = block // cfg.seq_len
    if microbatch < 1 or microbatch % per_block:
        raise UsageError(
            f"microbatch {microbatch} is not a multiple of the {per_block} rows of a block (data.block_tokens / "
            f"data.seq_len); nearest: {nearest_multiple(microbatch, per_block)}"
        )
    blocks = microbatch // per_block
    unit = block * dp_size * blocks
    for key, size in [("train.batch_tokens", batch_tokens), *(("train.batch_ramp", size) for _, size in ramp)]:
        if size < 1 or size % unit:
            raise UsageError(
                f"{key} {size} is not a multiple of {unit} = {microbatch} rows (microbatch) x "
                f"{cfg.seq_len} tokens x {dp_size} data-parallel ranks; nearest: {nearest_multiple(size, unit)}"
            )
    return blocks


def _unchanged(rows: Any) -> Any:
    return rows  # DataLoader's own would turn the arrays into tensors in shared memory


def _start_worker(parent: int, worker: int) -> None:
    die_with_parent(parent)
