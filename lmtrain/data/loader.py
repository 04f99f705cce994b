"""Batches of a run: step t of data rank r is computed from t and r alone, by any number of workers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lmtrain.data.batch import Batch, make_batch
from lmtrain.data.config import DataConfig
from lmtrain.data.processes import die_with_parent
from lmtrain.data.sampler import Sampler
from lmtrain.data.schedule import ScheduleLog
from lmtrain.data.sources import open_sources
from lmtrain.data.store import Store
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import DataError, LmtrainError, UsageError, nearest


@dataclass(frozen=True)
class StepData:
    """What one data-parallel rank does in one optimizer step.

    micro_batches: uncut rows; the caller cuts them for sequence parallelism. hashes: int64 ``[blocks_per_step, 2]``, in
    order of k, the xxh3-128 digest of each block this rank reads and zeros elsewhere: the sum over data ranks has all.
    """

    step: int
    micro_batches: list[Batch]
    hashes: Tensor


def token_hash(hashes: Tensor) -> str:
    """xxh3-128, hex, over the digests of a step's blocks in order of k: the same at any number of ranks."""
    return xxhash.xxh3_128_hexdigest(hashes.cpu().numpy().astype("<i8").tobytes())


class Loader:
    """Reads the blocks of a run.

    Step t holds blocks ``[K(t), K(t + 1))`` with ``K(t) = t * batch_tokens / block_tokens``; micro-batch i of data rank
    r of R holds ``m`` of them from ``K(t) + (i * R + r) * m``. A block is ``c = block_tokens / seq_len`` rows.

    microbatch: rows of one micro-batch on one rank, ``m * c``. log: which source is read when. workers: processes that
    read ahead; 0 reads in the caller's. Raises UsageError or DataError in one line before anything is read.

    source_names: by source id. tokens_available: tokens of whole blocks by name. vocab_size, fingerprint: the
    tokenizer's.
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
    ) -> None:
        self.cfg = cfg
        self.workers = workers
        self.block_tokens = cfg.block_tokens or cfg.seq_len
        blocks = _blocks_per_microbatch(cfg, batch_tokens, microbatch, dp_size)
        self.blocks_per_step = batch_tokens // self.block_tokens
        tokenizer = Tokenizer.load(cfg.tokenizer)
        self.vocab_size, self.fingerprint = tokenizer.vocab_size, tokenizer.fingerprint
        stores = {source.name: source.train for source in open_sources(cfg, tokenizer)}
        self.source_names = list(stores)
        windows = {name: store.num_windows(self.block_tokens) for name, store in stores.items()}
        self.tokens_available = {name: count * self.block_tokens for name, count in windows.items()}
        for name in sorted({name for event in log.events for name in event.weights}):
            if name not in windows:
                raise UsageError(f"the schedule names source {name}, data.sources does not{nearest(name, windows)}")
            if windows[name] < 1:
                raise DataError(
                    f"data.sources.{name}: {stores[name].prefix} has {stores[name].num_tokens:,} tokens, one block "
                    f"needs {self.block_tokens + 1:,} (data.block_tokens or data.seq_len, and the last target)"
                )
        self.sampler = Sampler(seed, log, windows)
        self._reader = _Reader(
            list(stores.values()),
            self.sampler,
            self.block_tokens,
            cfg.seq_len,
            self.vocab_size,
            self.blocks_per_step,
            blocks,
            dp_rank,
            dp_size,
            len(log.events),
        )

    def check(self, stop: int) -> None:
        """Raise UsageError if steps ``[0, stop)`` read a source more often than ``data.max_epochs``."""
        for name, blocks in self.sampler.counts(stop * self.blocks_per_step).items():
            needed, available = blocks * self.block_tokens, self.tokens_available[name]
            if needed > self.cfg.max_epochs * available:
                raise UsageError(
                    f"data.sources.{name}: {stop} steps need {needed:,} tokens, it has {available:,} "
                    f"({needed / available:.1f} epochs, data.max_epochs is {self.cfg.max_epochs:g}); add text, lower "
                    "its weight, train on less, or raise data.max_epochs"
                )

    def steps(self, first: int, stop: int) -> Iterator[StepData]:
        """Steps ``first`` to ``stop - 1`` in order; each a pure function of its number."""
        self.check(stop)
        if self.workers == 0 or stop <= first:
            yield from (self._reader[step].step_data() for step in range(first, stop))
            return
        for rows in DataLoader(
            _Carrier(self._reader),
            batch_size=None,
            sampler=range(first, stop),
            collate_fn=_unchanged,
            num_workers=self.workers,
            multiprocessing_context="spawn",  # a fork would inherit the run's lock and the threads' locks
            worker_init_fn=partial(_start_worker, os.getpid()),
        ):
            if isinstance(rows, LmtrainError):
                raise rows
            yield rows.step_data()


class _Rows(NamedTuple):
    """A step as a worker sends it: numpy through a pipe, so that no worker needs /dev/shm or file descriptors.

    tokens, ids: int32 ``[micro-batches, rows, seq_len + 1]``. source int32, block int64: ``[micro-batches, rows]``.
    """

    step: int
    tokens: NDArray[np.int32]
    ids: NDArray[np.int32]
    source: NDArray[np.int32]
    block: NDArray[np.int64]
    hashes: NDArray[np.int64]
    log_length: int

    def step_data(self) -> StepData:
        width = self.tokens.shape[2] - 1
        parts = (torch.from_numpy(part) for part in (self.tokens, self.ids, self.source, self.block))
        micro_batches = [
            make_batch(tokens, ids, source=source[:, None].expand(-1, width), block=block, log_length=self.log_length)
            for tokens, ids, source, block in zip(*parts, strict=True)
        ]
        return StepData(self.step, micro_batches, torch.from_numpy(self.hashes))


@dataclass(frozen=True)
class _Reader:
    """Step number -> rows of this rank. Plain data; a worker gets a copy and opens the stores itself."""

    stores: list[Store]
    sampler: Sampler
    block_tokens: int
    seq_len: int
    vocab_size: int
    blocks_per_step: int
    blocks_per_microbatch: int
    dp_rank: int
    dp_size: int
    log_length: int

    def __getitem__(self, step: int) -> _Rows:
        m = self.blocks_per_microbatch
        slots = np.arange(self.blocks_per_step).reshape(-1, self.dp_size, m)[:, self.dp_rank].reshape(-1)
        ks = step * self.blocks_per_step + slots
        source, window, _ = self.sampler.get(ks)
        per_block = self.block_tokens // self.seq_len
        rows = len(ks) * per_block
        tokens = np.empty((rows, self.seq_len + 1), dtype=np.int32)
        ids = np.empty_like(tokens)
        hashes = np.zeros((self.blocks_per_step, 2), dtype=np.int64)
        for i, slot in enumerate(slots):
            block, documents, digest = self._block(self.stores[source[i]], int(window[i]))
            for row in range(per_block):
                columns = slice(row * self.seq_len, (row + 1) * self.seq_len + 1)
                tokens[i * per_block + row] = block[columns]
                ids[i * per_block + row] = documents[columns] - documents[columns.start]
            hashes[slot] = np.frombuffer(digest, dtype="<i8")
        shape = (len(ks) // m, m * per_block)
        return _Rows(
            step,
            tokens.reshape(*shape, -1),
            ids.reshape(*shape, -1),
            np.repeat(source, per_block).reshape(shape),
            np.repeat(ks, per_block).reshape(shape),
            hashes,
            self.log_length,
        )

    def _block(self, store: Store, window: int) -> tuple[NDArray[np.int32], NDArray[np.int32], bytes]:
        start = window * self.block_tokens
        tokens = store.window(window, self.block_tokens)
        if int(tokens.max()) >= self.vocab_size or int(tokens.min()) < 0:
            wrong = int(((tokens < 0) | (tokens >= self.vocab_size)).argmax())
            raise store.out_of_range(start + wrong, self.vocab_size)
        digest = xxhash.xxh3_128_digest(tokens.astype("<i4", copy=False).tobytes())
        return tokens, store.document_ids(start, self.block_tokens + 1), digest


@dataclass(frozen=True)
class _Carrier(Dataset[_Rows | LmtrainError]):
    """The reader in a worker: hands an error over as it is, where DataLoader would wrap it in a traceback."""

    reader: _Reader

    def __getitem__(self, step: int) -> _Rows | LmtrainError:
        try:
            return self.reader[step]
        except LmtrainError as error:
            return error


def _blocks_per_microbatch(cfg: DataConfig, batch_tokens: int, microbatch: int, dp_size: int) -> int:
    """Blocks of one micro-batch, or UsageError naming the value that does not divide and the nearest that does."""
    block = cfg.block_tokens or cfg.seq_len
    per_block = block // cfg.seq_len
    if microbatch < 1 or microbatch % per_block:
        raise UsageError(
            f"microbatch {microbatch} is not a multiple of the {per_block} rows of a block (data.block_tokens / "
            f"data.seq_len); nearest: {nearest_multiple(microbatch, per_block)}"
        )
    blocks = microbatch // per_block
    unit = block * dp_size * blocks
    if batch_tokens < 1 or batch_tokens % unit:
        raise UsageError(
            f"train.batch_tokens {batch_tokens} is not a multiple of {unit} = {microbatch} rows (microbatch) x "
            f"{cfg.seq_len} tokens x {dp_size} data-parallel ranks; nearest: {nearest_multiple(batch_tokens, unit)}"
        )
    return blocks


def nearest_multiple(value: int, unit: int) -> int:
    """The positive multiple of ``unit`` nearest to ``value``."""
    return max(round(value / unit), 1) * unit


def _unchanged(rows: Any) -> Any:
    return rows  # DataLoader's own would turn the arrays into tensors in shared memory


def _start_worker(parent: int, worker: int) -> None:
    die_with_parent(parent)
