"""Bad input to any op: one line that names the op, the argument, what was expected and what was got."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lmtrain.ops import Documents, attention, linear_cross_entropy
from lmtrain.ops.cross_entropy import cross_entropy
from lmtrain.ops.linear_cross_entropy import linear_cross_entropy_sum
from tests.ops.op_case import Case, documents
from tests.ops.op_cases import CASES

LENGTH = 7
PARTS = {"k+": r"extra_kv\[0\]", "v+": r"extra_kv\[1\]"}  # of an argument
ANY_RANK = {"rmsnorm", "linear_cross_entropy"}  # of their first input
OF_ONE_DTYPE = {("causal_conv1d", "initial_state"), ("linear_cross_entropy", "weight")}  # refused with other words


def spell(tensor: Tensor) -> str:
    return re.escape(str(list(tensor.shape)))


def expected(tensor: Tensor) -> str:
    """The shape that an error should ask for: each size or *; the last may be missing, where it decides the variant."""
    *sizes, last = (rf"({size}|\*)" for size in tensor.shape)
    return rf"\[{', '.join(sizes)}(, {last})?\]" if sizes else rf"\[{last}\]"


def faults() -> Iterator[tuple[str, str, str]]:
    for name, case in CASES.items():
        first, *others = case.inputs(LENGTH)
        for argument in (first, *others):
            # the tail of a convolution has the dtype of its row, the weight of a loss that of the hidden
            if argument not in PARTS and (case.op, argument) not in OF_ONE_DTYPE:
                yield name, argument, "integers"
            if argument != first or case.op not in ANY_RANK:
                yield name, argument, "dims"
            if argument not in PARTS:
                yield name, argument, "device"


@pytest.mark.parametrize(("name", "argument", "fault"), list(faults()))
def test_a_bad_tensor_is_named(name: str, argument: str, fault: str) -> None:
    case, tensors = CASES[name], CASES[name].inputs(LENGTH)
    if fault == "integers" and argument != "initial_state":
        tensors.pop("initial_state", None)  # its dtype may follow from the values'
    first, tensor, named = next(iter(tensors)), tensors[argument], PARTS.get(argument, argument)
    bad, says = {
        "dims": (tensor[0], rf"{named}: expected shape {expected(tensor)}, got {spell(tensor[0])}"),
        "integers": (tensor.long(), f"{named}: expected a floating dtype, got torch.int64"),
        "device": (tensor.to("meta"), f"{named}: expected device cpu as {first}, got meta"),
    }[fault]
    if (argument, fault) == (first, "device"):
        says = rf"\w+: expected device meta as {first}, got cpu"
    with pytest.raises(ValueError, match=f"^{case.op}: {says}$"):
        case.call(tensors | {argument: bad}, None)


@pytest.mark.parametrize("case", [case for case in CASES.values() if case.reach != 0], ids=lambda case: case.op)
def test_documents_of_another_row_are_refused(case: Case) -> None:
    with pytest.raises(ValueError, match=rf"^{case.op}: (docs.ids|positions): expected shape \[2, 7\], got \[2, 6\]$"):
        case.call(case.inputs(LENGTH), documents("fresh", LENGTH - 1))


def test_decreasing_documents_are_refused() -> None:
    """Where they are made: every op takes Documents and nothing else."""
    with pytest.raises(ValueError, match=r"^documents: ids must not decrease along a row$"):
        Documents.from_ids(torch.tensor([[0, 1, 0]]))


@pytest.mark.parametrize("case", [case for case in CASES.values() if case.chunks], ids=lambda case: case.op)
def test_a_chunk_of_nothing_is_refused(case: Case) -> None:
    with pytest.raises(ValueError, match=f"^{case.op}: chunk: expected at least 1, got 0$"):
        case.call(case.inputs(LENGTH), None, chunk=0)


@pytest.mark.parametrize("case", [case for case in CASES.values() if case.affine], ids=lambda case: case.op)
def test_a_setting_that_no_op_has_is_refused(case: Case) -> None:
    # the ops without a setting say it as every Python function does
    with pytest.raises((ValueError, TypeError), match=r"chunck: no such setting|unexpected keyword argument 'chunck'"):
        case.call(case.inputs(LENGTH), None, chunck=8)


@pytest.mark.parametrize(
    ("ids", "before", "says"),
    [
        (torch.zeros(7), None, r"ids must be \[B, T\], got shape \(7,\)"),
        (torch.zeros(2, 7), None, "ids: expected integers, got torch.float32"),
        (torch.zeros(2, 7).int(), [1], r"before: expected shape \[2\], got \[1\]"),
        (torch.zeros(2, 7).int(), [0.5, 1.0], "before: expected integers, got torch.float32"),
        (torch.zeros(2, 7).int(), [-1, 0], "before: expected counts of tokens, got -1"),
    ],
    ids=str,
)
def test_documents_of_something_else_are_refused(ids: Tensor, before: list[float] | None, says: str) -> None:
    with pytest.raises(ValueError, match=f"^documents: {says}$"):
        Documents.from_ids(ids, None if before is None else torch.tensor(before))


@pytest.mark.parametrize("labels", [torch.zeros(2, 7), torch.zeros(2, 7).bool()], ids=lambda t: str(t.dtype))
def test_labels_that_are_no_columns_are_refused(labels: Tensor) -> None:
    for op, arguments in (
        (linear_cross_entropy, (torch.zeros(2, 7, 3), torch.zeros(5, 3))),
        (linear_cross_entropy_sum, (torch.zeros(2, 7, 3), torch.zeros(5, 3))),
        (cross_entropy, (torch.zeros(2, 7, 5),)),
    ):
        with pytest.raises(ValueError, match=f"^{op.__name__}: labels: expected integers, got {labels.dtype}$"):
            op(*arguments, labels)


@pytest.mark.parametrize(
    ("static", "says"),
    [
        ({"window": 0}, "window: expected at least 1, the query's own column, got 0"),
        ({"softcap": 0.0}, "softcap: expected above 0, got 0.0"),
        ({"positions": torch.zeros(2, 7)}, "positions: expected integers, got torch.float32"),
    ],
    ids=["window", "softcap", "positions"],
)
def test_settings_without_a_meaning_are_refused_by_attention(static: dict[str, Any], says: str) -> None:
    q, positions = torch.zeros(2, 7, 1, 3), torch.zeros(2, 7, dtype=torch.int32)
    for call in (attention, attention.output):
        with pytest.raises(ValueError, match=f"^attention: {says}$"):
            call(q, q, q, **{"positions": positions, "scale": 1.0} | static)


def test_the_fused_attention_takes_one_dtype() -> None:
    q, positions = torch.zeros(2, 7, 1, 3), torch.zeros(2, 7, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^attention: k: expected dtype torch.float32 as v, got torch.bfloat16$"):
        attention.output(q, q.bfloat16(), q, positions=positions, scale=1.0)


@pytest.mark.parametrize("case", [case for case in CASES.values() if case.affine], ids=lambda case: case.op)
def test_missing_inputs_are_listed(case: Case) -> None:
    listed = ", ".join(case.affine.names)
    with pytest.raises(ValueError, match=rf"^{case.op}: inputs: expected \({listed}\)(, of which \w may be None)?$"):
        case.affine.op(next(iter(case.inputs(LENGTH).values())))
