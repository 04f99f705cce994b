"""Sources that are functions: blocks of whole documents, their targets, and what a wrong function is told."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lmtrain.data.blocks.synthetic import SyntheticBlocks
from lmtrain.errors import DataError, LmtrainError, UsageError

HERE = __name__


def ragged(seed: int, index: int, *, longest: int) -> NDArray[np.int64]:
    """2 to ``longest`` tokens, the first of them ``index`` mod 2^31, the second from the seed."""
    rng = np.random.default_rng((seed, index))
    length = rng.integers(2, longest + 1)
    return np.r_[index % 2**31, seed % 1000, rng.integers(0, 99, length - 2)]


@dataclass
class Asked:
    tokens: NDArray[np.int32]
    labels: NDArray[np.int32]


def echo(seed: int, index: int) -> Asked:
    """A number, a pause, and the number again, which is the only answer."""
    number = 1 + index % 7
    return Asked(np.array([number, 0, number]), np.array([-100, number, -100]))


def floats(seed: int, index: int) -> NDArray[np.float64]:
    return np.ones(3)


def huge(seed: int, index: int) -> list[int]:
    return [1, 2**31]


def one(seed: int, index: int) -> list[int]:
    return [1]


def misplaced(seed: int, index: int) -> Asked:
    return Asked(np.array([1, 2, 3]), np.array([9, -100, -100]))


def late(seed: int, index: int) -> Asked:
    return Asked(np.array([1, 2, 3]), np.array([2, 3, 4]))


def blocks(
    function: str = "ragged", length: int = 63, seed: int = 0, name: str = "made", **arguments: Any
) -> SyntheticBlocks:
    return SyntheticBlocks(name, f"{HERE}:{function}", length, seed, arguments)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 64), st.integers(0, 2**31), st.integers(0, 2**64 - 1))
def test_blocks_hold_whole_documents_of_their_own(longest: int, p: int, seed: int) -> None:
    made = blocks(longest=longest, seed=seed)
    block = made.block(p)
    assert [part.shape for part in block if part is not None] == [(64,)] * (3 + (block.real is not None))
    real = np.ones(64, dtype=bool) if block.real is None else block.real
    assert (np.diff(real.astype(int)) <= 0).all() and real[0], "padding is on the right"
    assert (np.diff(block.ids) >= 0).all() and block.ids[0] == 0
    key = None
    for number in np.unique(block.ids[real]):
        document = block.tokens[(block.ids == number) & real]
        key = document[1] if key is None else key
        assert document[0] == (p * 64 + int(number)) % 2**31 and document[1] == key
    left_out = 64 - real.sum()
    assert left_out < longest, "padding only where no further document fits"
    assert not real.all() or block.real is None
    first = np.r_[True, np.diff(block.ids) > 0]
    assert block.target is not None and np.array_equal(block.target, real & ~first)


def test_targets_are_the_answers() -> None:
    block = blocks("echo", length=7).block(5)
    assert block.tokens.tolist() == [6, 0, 6, 7, 0, 7, 0, 0]
    assert block.ids.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert block.real is not None and block.real.tolist() == [True] * 6 + [False] * 2
    assert block.target is not None and np.flatnonzero(block.target).tolist() == [2, 5]


def test_the_same_for_the_same_seed_name_and_index() -> None:
    first = blocks(longest=20)
    again = pickle.loads(pickle.dumps(first))
    assert again == first
    for p in (0, 7, 2**32 - 1):
        assert all(np.array_equal(a, b) for a, b in zip(first.block(p), again.block(p), strict=True))
    assert not np.array_equal(first.block(3).tokens, blocks(longest=20, seed=1).block(3).tokens)
    assert not np.array_equal(first.block(3).tokens, blocks(longest=20, name="other").block(3).tokens)


def test_a_token_outside_the_vocabulary_is_placed() -> None:
    made = blocks("echo", length=7)
    assert str(made.out_of_range(5, 3, 4)) == (
        f"data.sources.made.synthetic: {HERE}:echo: document 41: token id 7 is outside the vocabulary of 4"
    )


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("no colon", {}, UsageError, "expected package.module:function"),
        ("no.such.module:f", {}, UsageError, "No module named 'no'"),
        (f"{HERE}:raged", {}, UsageError, "did you mean ragged"),
        (f"{HERE}:ragged", {}, UsageError, "arguments: .*longest"),
        (f"{HERE}:ragged", {"longest": 9, "lenght": 1}, UsageError, "lenght"),
        (f"{HERE}:floats", {}, DataError, "expected at least two integers"),
        (f"{HERE}:one", {}, DataError, "expected at least two integers"),
        (f"{HERE}:huge", {}, DataError, "2147483648 does not fit into 32 bits"),
        (f"{HERE}:misplaced", {}, DataError, "token 0 is asked for 9"),
        (f"{HERE}:late", {}, DataError, "none for the last"),
    ],
)
def test_wrong_functions_are_refused(
    name: str, arguments: dict[str, Any], error: type[LmtrainError], message: str
) -> None:
    with pytest.raises(error, match=message):
        SyntheticBlocks("made", name, 63, 0, arguments)


def test_a_document_longer_than_a_block_is_refused() -> None:
    with pytest.raises(DataError, match="it has 3 tokens, a block holds 2"):
        blocks("echo", length=1)


def test_mqar_is_a_source() -> None:
    arguments = {"pairs": 4, "length": 32, "num_keys": 8, "num_values": 8}
    block = SyntheticBlocks("recall", "lmtrain.eval.probes.mqar:mqar", 127, 0, arguments).block(9)
    assert block.target is not None and block.target.sum() == 4 * 4
    assert (block.tokens[block.target] > 8).all(), "answers are values"
