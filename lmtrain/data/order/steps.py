"""Which blocks an optimizer step reads, and in rows of which length: closed forms of the recipe."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lmtrain.errors import UsageError

Indices = NDArray[np.int64]
Ramp = Sequence[tuple[int, int]]
"""Pairs (tokens, value), rising from 0: a value holds from the first step that begins when so many tokens were read."""


class Steps:
    """Step t reads the blocks ``[first_block(t), first_block(t + 1))``.

    batch_tokens: of a step; batch_ramp, if not empty, says it over tokens read. seq_len, seq_lens: likewise of a row.
    block_tokens divides all sizes of a step and is a multiple of all lengths (see ``check_ramp``).

    run_blocks: steps in a group, which all read as many blocks: step j of a group reads block j of each of its runs.
    Raises UsageError for a stage of the batch ramp that does not last whole groups.
    """

    def __init__(
        self,
        *,
        block_tokens: int,
        batch_tokens: int,
        seq_len: int,
        batch_ramp: Ramp = (),
        seq_lens: Ramp = (),
        run_blocks: int = 1,
    ) -> None:
        self.block_tokens, self.run_blocks = block_tokens, run_blocks
        self.sizes = [max(size // block_tokens, 1) for _, size in batch_ramp or [(0, batch_tokens)]]
        """Blocks of a step, stage by stage of the ramp."""
        self._starts, self._blocks = [0], [0]
        for size, (tokens, _) in zip(self.sizes, batch_ramp[1:], strict=False):
            missing = tokens - self._blocks[-1] * block_tokens
            steps = max(-(-missing // (size * block_tokens)), 0)
            if steps % run_blocks:
                raise UsageError(
                    f"train.batch_ramp: {steps} steps of {size * block_tokens} tokens lead to {tokens} tokens, which "
                    f"are no whole groups of {run_blocks} (data.run_blocks); nearest: "
                    f"{(self._blocks[-1] + nearest_multiple(steps, run_blocks) * size) * block_tokens} tokens"
                )
            self._starts.append(self._starts[-1] + steps)
            self._blocks.append(self._blocks[-1] + steps * size)
        lengths = seq_lens or [(0, seq_len)]
        self._length_steps = [self.num_steps(tokens) for tokens, _ in lengths]
        self.lengths = [length for _, length in lengths]
        """Tokens of a row, stage by stage."""

    def first_block(self, step: int) -> int:
        """Blocks read before ``step``, counted from 0."""
        stage = bisect_right(self._starts, step) - 1
        return self._blocks[stage] + (step - self._starts[stage]) * self.sizes[stage]

    def num_blocks(self, step: int) -> int:
        """Blocks that ``step`` reads."""
        return self.sizes[bisect_right(self._starts, step) - 1]

    def tokens(self, step: int) -> int:
        """Tokens read before ``step``."""
        return self.first_block(step) * self.block_tokens

    def num_steps(self, tokens: int) -> int:
        """The fewest steps, in whole groups, that read at least ``tokens``."""
        blocks = -(-tokens // self.block_tokens)
        stage = bisect_right(self._blocks, blocks) - 1
        group = self.sizes[stage] * self.run_blocks
        return self._starts[stage] + -(-(blocks - self._blocks[stage]) // group) * self.run_blocks

    def group_of(self, ks: Indices) -> tuple[Indices, Indices]:
        """The first block of the group that reads each block, and the blocks of each of its steps: int64 ``[n]``."""
        stage = np.searchsorted(self._blocks, ks, side="right") - 1
        begin, size = np.array(self._blocks)[stage], np.array(self.sizes)[stage]
        return begin + (ks - begin) // (size * self.run_blocks) * (size * self.run_blocks), size

    def seq_len(self, step: int) -> int:
        """Tokens in the rows of ``step``."""
        return self.lengths[bisect_right(self._length_steps, step) - 1]


def nearest_multiple(value: int, unit: int) -> int:
    """The positive multiple of ``unit`` nearest to ``value``."""
    return max(round(value / unit), 1) * unit


def check_ramp(key: str, ramp: Ramp, last: int, last_key: str) -> None:
    """Raise ValueError unless ``ramp`` is empty, or rises from 0 tokens and ends with ``last``."""
    if not ramp:
        return
    places = [tokens for tokens, _ in ramp]
    if places[0] != 0 or sorted(set(places)) != places:
        raise ValueError(f"{key}: [tokens, value] pairs must begin at 0 tokens and rise, got tokens {places}")
    if min(value for _, value in ramp) < 1:
        raise ValueError(f"{key}: values must be at least 1, got {[value for _, value in ramp]}")
    if ramp[-1][1] != last:
        raise ValueError(f"{key}: must end with {last_key} {last}, ends with {ramp[-1][1]}")
