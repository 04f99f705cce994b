"""Steps of a batch ramp and a length curriculum: the closed forms are those of walking step by step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmtrain.data.config import DataConfig
from lmtrain.data.order.steps import Steps, check_ramp


@given(
    st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 6)), max_size=4),
    st.lists(st.tuples(st.integers(1, 5000), st.sampled_from([8, 16, 32])), max_size=3),
)
def test_closed_forms_are_those_of_a_walk(ramp: list[tuple[int, int]], lengths: list[tuple[int, int]]) -> None:
    block = 32
    batch_ramp = [(0, 2 * block), *((at, size * block) for at, size in sorted(dict(ramp).items()))]
    seq_lens = [(0, 8), *sorted(dict(lengths).items())]
    steps = Steps(
        block_tokens=block, batch_tokens=batch_ramp[-1][1], seq_len=32, batch_ramp=batch_ramp, seq_lens=seq_lens
    )
    tokens = 0
    for step in range(250):
        size = [size for at, size in batch_ramp if at <= tokens][-1]
        assert steps.tokens(step) == tokens == steps.first_block(step) * block
        assert steps.num_blocks(step) * block == size
        assert steps.seq_len(step) == [length for at, length in seq_lens if at <= tokens][-1]
        assert steps.num_steps(tokens) == step and steps.num_steps(tokens + 1) == step + 1
        tokens += size
    assert steps.first_block(10**12) - steps.first_block(10**12 - 1) == batch_ramp[-1][1] // block


def test_without_ramps() -> None:
    steps = Steps(block_tokens=64, batch_tokens=640, seq_len=32)
    assert [steps.first_block(t) for t in (0, 1, 7)] == [0, 10, 70]
    assert (steps.num_blocks(5), steps.seq_len(5), steps.num_steps(641), steps.num_steps(0)) == (10, 32, 2, 0)


@pytest.mark.parametrize(
    ("ramp", "message"),
    [
        ([(5, 8)], r"r: \[tokens, value\] pairs must begin at 0 tokens and rise, got tokens \[5\]"),
        ([(0, 4), (9, 6), (9, 8)], r"got tokens \[0, 9, 9\]"),
        ([(0, 0), (9, 8)], r"r: values must be at least 1, got \[0, 8\]"),
        ([(0, 4)], r"r: must end with last 8, ends with 4"),
    ],
)
def test_ramps_that_cannot_be(ramp: list[tuple[int, int]], message: str) -> None:
    check_ramp("r", [], 8, "last")
    check_ramp("r", [(0, 4), (10, 8)], 8, "last")
    with pytest.raises(ValueError, match=message):
        check_ramp("r", ramp, 8, "last")


def test_lengths_divide_the_block() -> None:
    with pytest.raises(ValueError, match="seq_lens: 48 does not divide a block of 64 tokens"):
        DataConfig("t", 64, seq_lens=[(0, 48), (100, 64)])
