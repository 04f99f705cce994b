"""What a loader process does: a plan of a step, made by the main process, becomes rows of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from lmtrain.data.batch import Batch, make_batch
from lmtrain.data.blocks.blocks import Block, Blocks, ConcatBlocks
from lmtrain.data.catalog import Arrival
from lmtrain.data.config import DataConfig
from lmtrain.ops.cross_entropy import IGNORE


@dataclass(frozen=True)
class StepData:
    """What one data-parallel rank does in one optimizer step.

    micro_batches: uncut rows; the caller cuts them for sequence parallelism. hashes: int64 ``[blocks of the step, 2]``,
    in order of k, the xxh3-128 digest of each block this rank reads and zeros elsewhere: the sum over data ranks has
    all.
    """

    step: int
    micro_batches: list[Batch]
    hashes: Tensor


def token_hash(hashes: Tensor) -> str:
    """xxh3-128, hex, over the digests of a step's blocks in order of k: the same at any number of ranks."""
    return xxhash.xxh3_128_hexdigest(hashes.cpu().numpy().astype("<i8").tobytes())


class StepPlan(NamedTuple):
    """Which blocks a rank reads for a step: all that a reader needs to know of the schedule.

    num_blocks: of the step, on all ranks. slots: int64 ``[n]``, which of them are this rank's; ks, source, window:
    their sample indices, source ids and block numbers. run, place: the run of consecutive blocks that each belongs to,
    and where in it. names: of the sources, by id. added: those of them that came during the run.
    """

    step: int
    seq_len: int
    num_blocks: int
    slots: NDArray[np.int64]
    ks: NDArray[np.int64]
    source: NDArray[np.int32]
    window: NDArray[np.int64]
    run: NDArray[np.int64]
    place: NDArray[np.int64]
    names: tuple[str, ...]
    added: Mapping[str, Arrival]
    log_length: int


class Rows(NamedTuple):
    """A step as a worker sends it: numpy through a pipe, so that no worker needs /dev/shm or file descriptors.

    tokens, ids: int32 ``[micro-batches, rows, seq_len + 1]``; targets: bool, likewise, or None where all may be labels.
    labels: int32 ``[micro-batches, rows, seq_len]``, or None where no block has labels of its own.
    source int32, block int64, run int64, before int32: ``[micro-batches, rows]``.
    """

    step: int
    tokens: NDArray[np.int32]
    ids: NDArray[np.int32]
    targets: NDArray[np.bool_] | None
    labels: NDArray[np.int32] | None
    source: NDArray[np.int32]
    block: NDArray[np.int64]
    run: NDArray[np.int64]
    before: NDArray[np.int32]
    hashes: NDArray[np.int64]
    log_length: int

    def step_data(self) -> StepData:
        width = self.tokens.shape[2] - 1
        micro_batches = [
            make_batch(
                torch.from_numpy(self.tokens[i]),
                torch.from_numpy(self.ids[i]),
                source=torch.from_numpy(self.source[i])[:, None].expand(-1, width),
                block=torch.from_numpy(self.block[i]),
                run=torch.from_numpy(self.run[i]),
                before=torch.from_numpy(self.before[i]),
                log_length=self.log_length,
                targets=None if self.targets is None else torch.from_numpy(self.targets[i]),
                labels=None if self.labels is None else torch.from_numpy(self.labels[i]),
            )
            for i in range(len(self.tokens))
        ]
        return StepData(self.step, micro_batches, torch.from_numpy(self.hashes))


@dataclass(frozen=True)
class Reader:
    """Plans -> rows. Plain data; a worker gets a copy and opens the files itself, those of added sources when needed.

    blocks: by name.
    """

    blocks: dict[str, Blocks]
    cfg: DataConfig
    blocks_per_microbatch: int
    vocab_size: int

    def __getitem__(self, plan: StepPlan) -> Rows:
        per_block, width = self.cfg.block_length // plan.seq_len, plan.seq_len + 1
        num_blocks = len(plan.slots)
        tokens = np.empty((num_blocks, per_block, width), dtype=np.int32)
        ids = np.empty_like(tokens)
        targets: NDArray[np.bool_] | None = None
        own: dict[int, NDArray[np.int32]] = {}
        before = np.zeros(num_blocks, dtype=np.int32)
        hashes = np.zeros((plan.num_blocks, 2), dtype=np.int64)
        for i, slot in enumerate(plan.slots):
            block, digest = self._read(plan, int(plan.source[i]), int(plan.window[i]))
            if plan.place[i]:
                blocks = self.blocks[plan.names[plan.source[i]]]
                assert isinstance(blocks, ConcatBlocks), "settings with runs of other blocks are refused"
                before[i] = blocks.before(int(plan.window[i]), int(plan.place[i]))
            if block.real is not None and targets is None:
                targets = np.ones(tokens.shape, dtype=bool)
            if block.labels is not None:
                own[i] = block.labels[:-1].reshape(per_block, plan.seq_len)
            for row in range(per_block):
                columns = slice(row * plan.seq_len, row * plan.seq_len + width)
                tokens[i, row] = block.tokens[columns]
                np.subtract(block.ids[columns], block.ids[columns.start], out=ids[i, row])
                if block.real is not None and targets is not None:
                    targets[i, row] = block.real[columns]
            hashes[slot] = np.frombuffer(digest, dtype="<i8")
        m = self.blocks_per_microbatch
        shape = (num_blocks // m, m * per_block)
        return Rows(
            plan.step,
            tokens.reshape(*shape, width),
            ids.reshape(*shape, width),
            None if targets is None else targets.reshape(*shape, width),
            _asked(tokens, own).reshape(*shape, plan.seq_len) if own else None,
            np.repeat(plan.source, per_block).reshape(shape),
            np.repeat(plan.ks, per_block).reshape(shape),
            np.repeat(plan.run, per_block).reshape(shape),
            np.repeat(before, per_block).reshape(shape),
            hashes,
            plan.log_length,
        )

    def _read(self, plan: StepPlan, source: int, window: int) -> tuple[Block, bytes]:
        name = plan.names[source]
        if name not in self.blocks:
            self.blocks[name] = plan.added[name].blocks(self.cfg)
        blocks = self.blocks[name]
        block = blocks.block(window)
        digest = xxhash.xxh3_128()
        for values in (block.tokens,) if block.labels is None else (block.tokens, block.labels):
            asked = values if values is block.tokens else np.where(values == IGNORE, 0, values)
            if int(asked.view(np.uint32).max()) >= self.vocab_size:  # in one pass: as uint32 a negative id is large
                wrong = int(((asked < 0) | (asked >= self.vocab_size)).argmax())
                raise blocks.out_of_range(window, wrong, self.vocab_size)
            digest.update(np.ascontiguousarray(values, dtype="<i4").data)
        return block, digest.digest()


def _asked(tokens: NDArray[np.int32], own: Mapping[int, NDArray[np.int32]]) -> NDArray[np.int32]:
    """Labels int32 ``[blocks, rows, seq_len]`` of ``tokens`` ``[blocks, rows, seq_len + 1]``: the next token, but for
    the blocks with labels of their ``own``."""
    labels = tokens[..., 1:].copy()
    for i, given in own.items():
        labels[i] = given
    return labels
