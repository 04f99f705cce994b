"""Bad input to any op: one line that names the op, the argument, what was expected and what was got."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lmtrain.ops import Documents
from tests.ops.op_case import Case, documents
from tests.ops.op_cases import CASES

LENGTH = 7
PARTS = {"k+": r"extra_kv\[0\]", "v+": r"extra_kv\[1\]"}  # of an argument
ANY_RANK = {"rmsnorm", "linear_cross_entropy"}  # of their first input


def spell(tensor: Tensor) -> str:
    return re.escape(str(list(tensor.shape)))


def expected(tensor: Tensor) -> str:
    """The shape that an error should ask for: each size or *; the last may be missing, where it decides the variant."""
    *sizes, last = (rf"({size}|\*)" for size in tensor.shape)
    return rf"\[{', '.join(sizes)}(, {last})?\]" if sizes else rf"\[{last}\]"


def faults() -> Iterator[tuple[str, str, str]]:
    # the values must be floating; the others are converted to what they are
    for name, case in CASES.items():
        first, *others = case.inputs(LENGTH)
        yield name, first, "integers"
        for argument in (first, *others):
            if argument != first or case.op not in ANY_RANK:
                yield name, argument, "dims"
            if argument not in PARTS:
                yield name, argument, "device"


@pytest.mark.parametrize(("name", "argument", "fault"), list(faults()))
def test_a_bad_tensor_is_named(name: str, argument: str, fault: str) -> None:
    case, tensors = CASES[name], CASES[name].inputs(LENGTH)
    if fault == "integers":
        tensors.pop("initial_state", None)  # its dtype follows from the values'
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
def test_missing_inputs_are_listed(case: Case) -> None:
    listed = ", ".join(case.affine.names)
    with pytest.raises(ValueError, match=rf"^{case.op}: inputs: expected \({listed}\)(, of which \w may be None)?$"):
        case.affine.op(next(iter(case.inputs(LENGTH).values())))
