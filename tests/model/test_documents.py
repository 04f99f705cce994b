"""Documents and time, for every branch, on one process. ``tests/distributed/test_documents.py``: on cut rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.model.branch import BRANCHES as KINDS
from tests.model import row_checks
from tests.model.row_checks import EDGE, LENGTH, VARIANTS, Row

every_variant = pytest.mark.parametrize("variant", VARIANTS)
layouts = st.lists(st.sets(st.integers(0, LENGTH - 1), max_size=6), min_size=1, max_size=2)
# fp64 runs the definitions, fp32 the kernels that training uses
dtypes = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-3)], ids=str)
few = settings(max_examples=8, deadline=None, derandomize=True)


def test_every_kind_is_in_the_matrix() -> None:
    assert {branch.kind for branch in row_checks.BRANCHES.values()} == set(KINDS)


@every_variant
@dtypes
def test_influence_stays_in_the_document_and_the_past(variant: str, dtype: torch.dtype, tolerance: float) -> None:
    row_checks.check_influence(Row(), variant, row_checks.documents(), dtype=dtype)


@every_variant
@few
@given(starts=layouts, before=st.integers(0, 3), column=st.integers(0, LENGTH - 1))
def test_influence_in_any_layout(variant: str, starts: list[set[int]], before: int, column: int) -> None:
    docs = row_checks.documents([sorted(columns) for columns in starts], [before] * len(starts))
    row_checks.check_influence(Row(), variant, docs, [column])


@every_variant
def test_a_row_that_starts_a_document_ignores_its_initial_state(variant: str) -> None:
    row_checks.check_initial_state(Row(), variant)


@every_variant
@pytest.mark.parametrize("cuts", [[EDGE], [6, 18], [1, 2, 13, 23]], ids=str)
def test_segments_are_one_pass(variant: str, cuts: list[int]) -> None:
    """Rows have documents that start at a cut, one and two columns before it (a tail of two documents) and after it."""
    row_checks.check_segments(Row(), variant, row_checks.documents(), cuts)


@every_variant
@few
@given(starts=layouts, before=st.integers(0, 3), cuts=st.sets(st.integers(1, LENGTH - 1), max_size=3))
def test_segments_in_any_layout(variant: str, starts: list[set[int]], before: int, cuts: set[int]) -> None:
    docs = row_checks.documents([sorted(columns) for columns in starts], [before] * len(starts))
    row_checks.check_segments(Row(), variant, docs, sorted(cuts))


@every_variant
@dtypes
@pytest.mark.parametrize("at_once", [1, 3])
def test_prefill_and_decode_are_the_parallel_form(
    variant: str, at_once: int, dtype: torch.dtype, tolerance: float
) -> None:
    row_checks.check_decode(variant, (7, 1, 2, 12), 8, at_once, dtype, tolerance)
