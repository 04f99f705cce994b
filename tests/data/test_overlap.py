"""Which training documents are too like held-out text: the rule against its plain definition, and what it finds."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.data.ingest import overlap
from lmtrain.data.ingest.filters.words import words_of
from lmtrain.data.ingest.overlap import Comparison, HeldoutText, shingles, wholes

Text = Callable[[int, int], str]
LETTERS = st.lists(st.lists(st.sampled_from("abc"), max_size=9).map(" ".join), max_size=5)


def compared(heldout: Sequence[str], texts: Sequence[str]) -> list[bool]:
    return Comparison(HeldoutText.of(shingles(heldout), wholes(words_of(heldout)))).near(texts).tolist()


def plainly(heldout: Sequence[str], texts: Sequence[str], length: int, most: int, least: int) -> list[bool]:
    """The definition, with sets of tuples of words."""

    def runs(text: str) -> list[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]

    counted: dict[tuple[str, ...], list[int]] = {}
    for i, text in enumerate(heldout):
        for run in set(runs(text)):
            counted.setdefault(run, []).append(i)
    own = [{run for run, where in counted.items() if i in where[:most]} for i in range(len(heldout))]
    found = []
    for text in texts:
        here = runs(text)
        share = here and sum(run in counted for run in here) >= 0.5 * len(here)
        covered = any(len(each) >= least and len(each & set(here)) >= 0.5 * len(each) for each in own)
        equal = any(text.split() and text.split() == each.split() for each in heldout)
        found.append(bool(share or covered or equal))
    return found


@given(LETTERS, LETTERS, st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 1 << 17]))
@settings(max_examples=200, deadline=None)
def test_the_rule_is_its_definition(heldout: list[str], texts: list[str], length: int, most: int, at_once: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "SHINGLE", length)
        patch.setattr(overlap, "MOST", most)
        patch.setattr(overlap, "LEAST", 2)
        patch.setattr(overlap, "GROUP", at_once)
        assert compared(heldout, texts) == plainly(heldout, texts, length, most, 2)


def test_read_is_what_was_written(tmp_path: Path, make_text: Text) -> None:
    texts = [make_text(1, 40), make_text(2, 5), ""]
    made = HeldoutText.of(shingles(texts), wholes(words_of(texts)))
    for name in HeldoutText._fields:
        with (tmp_path / f"{name}.npy").open("wb") as file:
            made.write(name, file)
    read = HeldoutText.read(tmp_path)
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(made, read, strict=True))
    assert made.sizes.tolist() == [33, 0, 0] and len(made.wholes) == 2


CHARACTERS = "的一是不了人我在有他这为之大来以个中上们到说国和地也子时道出而要于就下得可你年生"
CHINESE = "".join(random.Random(0).choices(CHARACTERS, k=120))


def changed(words: Sequence[str], places: Sequence[int]) -> list[str]:
    return ["other" if i in places else word for i, word in enumerate(words)]


def test_what_is_found_and_what_is_not(make_text: Text) -> None:
    long, short = make_text(1, 120), make_text(2, 11)
    words, clauses = long.split(), re.findall(".{8}", CHINESE)
    cases = [
        (" ".join(changed(words, [60])), True),
        (" ".join(changed(words, [10, 40, 70, 110])), True),
        (" ".join(changed(words, range(6, 120, 12))), False),  # a third of the runs of 8 words is left
        (make_text(3, 400) + long + make_text(4, 400), True),
        (make_text(3, 400) + " ".join(words[:80]) + make_text(4, 400), True),  # most of it
        (make_text(3, 400) + " ".join(words[:40]) + make_text(4, 400), False),  # a third
        (short.upper().replace(" ", ", "), True),
        (" ".join(changed(short.split(), [5])), False),  # no run of 8 words is left
        ("and " + short, True),
        (make_text(3, 400) + short, False),  # fewer than 13 words are not looked for inside longer text
        ("\uff0c".join(clauses), True),
        ("\u3002".join(clauses)[::-1], False),
        ("".join("某" if i in (9, 50, 90) else c for i, c in enumerate(CHINESE)), True),
    ]
    assert compared([long, short, CHINESE], [text for text, _ in cases]) == [found for _, found in cases]


def test_a_licence_in_many_heldout_documents_stays_a_small_part_of_each(make_text: Text) -> None:
    """A shingle that stands in more than MOST documents is no reason to leave out whatever has that licence."""
    licence = make_text(0, 60)
    heldout = [licence + make_text(i, 100) for i in range(1, 60)]
    assert compared(heldout, [licence + make_text(99, 100), licence + heldout[58][-400:]]) == [False, True]
