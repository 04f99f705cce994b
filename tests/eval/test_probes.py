"""The probes' documents: what is asked has one answer, found in one way only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmtrain.errors import UsageError
from lmtrain.eval.probes.document import NOT_ASKED, Document
from lmtrain.eval.probes.mqar import FILLER, mqar
from lmtrain.eval.probes.mqar import vocab_size as mqar_vocab_size
from lmtrain.eval.probes.parity import EVEN, ODD, VOCAB_SIZE, parity
from lmtrain.ops.cross_entropy import IGNORE

seeds, indices = st.integers(0, 2**31), st.integers(0, 2**40)


@st.composite
def recalls(draw: st.DrawFn) -> tuple[Document, int, int, int]:
    """A document of MQAR, its pairs, keys and values."""
    pairs, num_values = draw(st.integers(1, 9)), draw(st.integers(1, 12))
    num_keys, extra = draw(st.integers(pairs, 20)), draw(st.integers(0, 7))
    length = 4 * pairs + 2 * extra
    made = mqar(draw(seeds), draw(indices), pairs=pairs, length=length, num_keys=num_keys, num_values=num_values)
    assert made.tokens.shape == made.labels.shape == (length,)
    return made, pairs, num_keys, num_values


@given(recalls())
def test_every_query_has_exactly_one_matching_key_before_it(case: tuple[Document, int, int, int]) -> None:
    made, pairs, num_keys, _ = case
    tokens, asked = made.tokens, np.flatnonzero(made.labels != NOT_ASKED)
    assert len(asked) == pairs
    for at in asked:
        before = np.flatnonzero(tokens[:at] == tokens[at])
        assert len(before) == 1 and before[0] < 2 * pairs and before[0] % 2 == 0
        assert 1 <= tokens[at] <= num_keys
        assert made.labels[at] == tokens[before[0] + 1] == tokens[at + 1]
    assert sorted(tokens[asked]) == sorted(tokens[: 2 * pairs : 2])


@given(recalls())
def test_keys_values_and_filler_are_told_apart_and_stand_where_they_belong(
    case: tuple[Document, int, int, int],
) -> None:
    made, pairs, num_keys, num_values = case
    slots = made.tokens.reshape(-1, 2)
    filler = (slots == FILLER).any(axis=1)
    assert not filler[:pairs].any() and (slots[filler] == FILLER).all()
    assert ((slots[~filler, 0] >= 1) & (slots[~filler, 0] <= num_keys)).all()
    assert ((slots[~filler, 1] > num_keys) & (slots[~filler, 1] < mqar_vocab_size(num_keys, num_values))).all()


def test_an_answer_is_not_guessable_from_its_position_its_key_or_earlier_answers() -> None:
    """4 values: every one is right a quarter of the time at the first and last question, for one key, and even where
    all earlier answers were others (drawn without replacement, the last would then be certain)."""
    documents = [mqar(3, index, pairs=4, length=20, num_keys=6, num_values=4) for index in range(3000)]
    first, last, of_key, unseen = Counter[int](), Counter[int](), Counter[int](), Counter[bool]()
    for made in documents:
        asked = np.flatnonzero(made.labels != NOT_ASKED)
        answers = made.labels[asked]
        first[int(answers[0])] += 1
        last[int(answers[-1])] += 1
        of_key.update(int(answer) for at, answer in zip(asked, answers, strict=True) if made.tokens[at] == 2)
        if len(set(answers[:-1])) == 3:
            unseen[answers[-1] not in answers[:-1]] += 1
    for counts in (first, last, of_key):
        total = sum(counts.values())
        assert len(counts) == 4 and all(abs(count / total - 0.25) < 0.05 for count in counts.values())
    assert abs(unseen[True] / sum(unseen.values()) - 0.25) < 0.06


def test_queries_stand_in_any_slot_and_in_any_order() -> None:
    slots, order = Counter[int](), Counter[bool]()
    for index in range(2000):
        made = mqar(5, index, pairs=2, length=12, num_keys=4, num_values=4)
        asked = np.flatnonzero(made.labels != NOT_ASKED)
        slots.update(int(at) for at in asked)
        order[made.tokens[asked[0]] == made.tokens[0]] += 1
    assert sorted(slots) == [4, 6, 8, 10]
    assert all(abs(count / 4000 - 0.25) < 0.05 for count in slots.values())
    assert abs(order[True] / 2000 - 0.5) < 0.06


def test_the_smallest_recall_by_hand() -> None:
    made = mqar(0, 0, pairs=1, length=4, num_keys=1, num_values=1)
    assert made.tokens.tolist() == [1, 2, 1, 2]
    assert made.labels.tolist() == [NOT_ASKED, NOT_ASKED, 2, NOT_ASKED]


@pytest.mark.parametrize(
    ("pairs", "length", "num_keys", "told"),
    [(4, 14, 8, "length"), (4, 17, 8, "length"), (0, 8, 8, "length"), (4, 16, 3, "pairs")],
)
def test_recall_that_does_not_fit_is_refused(pairs: int, length: int, num_keys: int, told: str) -> None:
    with pytest.raises(UsageError, match=f"mqar: {told}: expected"):
        mqar(0, 0, pairs=pairs, length=length, num_keys=num_keys, num_values=4)


@given(seeds, indices, st.integers(1, 60))
def test_parity_turns_with_every_one(seed: int, index: int, bits: int) -> None:
    made = parity(seed, index, bits=bits)
    assert made.tokens.shape == made.labels.shape == (bits + 1,)
    odd = False
    for bit, answer in zip(made.tokens[:-1], made.labels[:-1], strict=True):
        assert bit in (0, 1)
        odd ^= bool(bit)
        assert answer == (ODD if odd else EVEN)
    assert made.tokens[-1] == made.labels[-2] < VOCAB_SIZE
    assert made.labels[-1] == NOT_ASKED


def test_parity_is_balanced_at_every_position_and_for_either_last_bit() -> None:
    documents = [parity(7, index, bits=12) for index in range(2000)]
    odd = np.stack([made.labels[:-1] == ODD for made in documents])
    ones = np.stack([made.tokens[:-1] for made in documents]) == 1
    assert (abs(odd.mean(axis=0) - 0.5) < 0.05).all()
    assert (abs(odd[:, 1:][ones[:, 1:]].mean() - 0.5)) < 0.02
    assert (abs(odd[:, 1:][~ones[:, 1:]].mean() - 0.5)) < 0.02


def test_parity_by_hand() -> None:
    """1 1 1 0 0 0 0 0 has 1, 2, 3, 3, ... ones so far; also holds numpy's stream: a seed means the same data later."""
    made = parity(0, 0, bits=8)
    assert made.tokens.tolist() == [1, 1, 1, 0, 0, 0, 0, 0, ODD]
    assert made.labels.tolist() == [ODD, EVEN, ODD, ODD, ODD, ODD, ODD, ODD, NOT_ASKED]


def test_parity_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="parity: bits: expected at least 1, got 0"):
        parity(0, 0, bits=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda seed, index: mqar(seed, index, pairs=4, length=24, num_keys=8, num_values=8),
        lambda seed, index: parity(seed, index, bits=24),
    ],
    ids=["mqar", "parity"],
)
def test_a_document_depends_on_seed_and_index_alone(make: Callable[[int, int], Document]) -> None:
    first = make(1, 10**9)
    make(1, 0), make(2, 10**9)
    again = make(1, 10**9)
    assert first.tokens.tolist() == again.tokens.tolist() and first.labels.tolist() == again.labels.tolist()
    assert first.tokens.dtype == first.labels.dtype == np.int32
    kinds = {tuple(make(seed, index).tokens) for seed in range(3) for index in range(40)}
    assert len(kinds) == 120


def test_what_does_not_count_is_what_the_loss_ignores() -> None:
    assert NOT_ASKED == IGNORE
