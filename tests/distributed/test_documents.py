"""Documents and time, for every branch, where two ranks hold a row. The checks: ``tests/model/row_checks.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lmtrain.errors import UsageError
from tests.distributed.ranks import Ranks
from tests.model import row_checks
from tests.model.row_checks import EDGE, LENGTH, SOFTMAX, VARIANTS, Row, needs_whole_rows, whole_heads

pytestmark = pytest.mark.distributed

WORLD = 2
CUT = [name for name in VARIANTS if not needs_whole_rows(name)]
METHODS = [(name, "gather") for name in CUT] + [(name, "heads") for name in CUT if whole_heads(name, WORLD)]
every_method = pytest.mark.parametrize(("variant", "method"), METHODS)
every_variant = pytest.mark.parametrize("variant", CUT)


def on_a_cut_row(check: Callable[..., None], method: str, *args: Any) -> None:
    check(Row(dist.group.WORLD, method), *args)


@every_method
def test_influence_stays_in_the_document_and_the_past(ranks: Ranks, variant: str, method: str) -> None:
    columns = [0, 1, EDGE - 2, EDGE - 1, EDGE, EDGE + 1, EDGE + 2, LENGTH - 1]
    ranks.run(WORLD, on_a_cut_row, row_checks.check_influence, method, variant, row_checks.documents(), columns)


def any_layout(layouts: list[list[set[int]]], method_of: dict[str, str]) -> None:
    for starts in layouts:
        docs = row_checks.documents([sorted(columns) for columns in starts], [1] * len(starts))
        for variant, method in method_of.items():
            row = Row(dist.group.WORLD, method)
            row_checks.check_influence(row, variant, docs, [EDGE - 1, EDGE, LENGTH - 1])
            row_checks.check_segments(Row(dist.group.WORLD), variant, docs, [8])


@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate], database=None)
@given(starts=st.lists(st.sets(st.integers(0, LENGTH - 1), max_size=6), min_size=2, max_size=2))
def test_any_layout(ranks: Ranks, starts: list[set[int]]) -> None:
    method_of = {"mamba2": "gather", "attention_grouped": "heads", "attention_window": "gather", "hybrid": "heads"}
    ranks.run(WORLD, any_layout, [starts], method_of)


@every_variant
def test_a_row_that_starts_a_document_ignores_its_initial_state(ranks: Ranks, variant: str) -> None:
    ranks.run(WORLD, on_a_cut_row, row_checks.check_initial_state, "gather", variant)


@every_variant
@pytest.mark.parametrize("cuts", [[EDGE], [6, 18]], ids=str)
def test_segments_are_one_pass(ranks: Ranks, variant: str, cuts: list[int]) -> None:
    ranks.run(WORLD, on_a_cut_row, row_checks.check_segments, "gather", variant, row_checks.documents(), cuts)


def refusal(variant: str) -> str:
    docs = row_checks.documents()
    model, tokens = row_checks.build(variant, docs.ids.numel()), row_checks.distinct_tokens(docs)
    with pytest.raises(UsageError) as caught:
        Row(dist.group.WORLD, "heads").run(model, tokens, docs, carries=True)
    return str(caught.value)


@pytest.mark.parametrize("variant", SOFTMAX)
def test_heads_refuse_carried_state(ranks: Ranks, variant: str) -> None:
    for told in ranks.run(WORLD, refusal, variant):
        assert told == "sp_attention=heads: state is carried; use sp_attention=gather or auto"
