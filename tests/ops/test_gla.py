"""gla alone: the sizes its kernel cuts heads into, decays of zero, what its arguments allow. See test_op_matrix.py."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from lmtrain.ops.gla import gla, recurrence
from tests.ops.conftest import RUNNING
from tests.ops.op_case import Running, documents
from tests.ops.op_cases import CASES

both = pytest.mark.parametrize("op", [name for name, op in RUNNING.items() if op.case.op == "gla"], indirect=True)


@both
@pytest.mark.parametrize(("keys", "values"), [(1, 1), (4, 33), (17, 16), (64, 20)])
def test_sizes(op: Running, keys: int, values: int) -> None:
    case = replace(op.case, make=partial(op.case.make, keys=keys, values=values))
    op.assert_matches(case.inputs(70), documents("edges", 70))


@both
def test_a_decay_of_zero_drops_even_infinity(op: Running) -> None:
    tensors = op.case.inputs(40)
    tensors["g"][:, 20] = -float("inf")
    _, expected = op.case.definition(tensors, None)
    tensors["initial_state"].fill_(float("inf"))
    torch.testing.assert_close(op.case.call(tensors, None)[1], expected)


def test_a_read_without_bonus_is_a_bonus_of_zero() -> None:
    """Of the state before the token, which the next one reads as S_{t-1}."""
    v, q, k, g, u, state = CASES["gla_bonus"].inputs(9).values()
    y, _ = gla(v, q, k, g, torch.zeros_like(u), initial_state=state)
    for t in range(9):
        before = recurrence(v[:, :t], q[:, :t], k[:, :t], g[:, :t], None, None, state)[1]
        torch.testing.assert_close(y[:, t], torch.einsum("bhkv,bhk->bhv", before, q[:, t]))


def test_the_read_must_be_as_u_says() -> None:
    case = CASES["gla"]
    with pytest.raises(ValueError, match=r"^gla: exclusive: expected False, as u says, got True$"):
        case.call(case.inputs(7), None, exclusive=True)


def test_cost_is_of_the_definition() -> None:
    shapes = ((1, 64, 4, 3), (1, 64, 4, 5))
    assert gla.cost(*shapes).model_flops == 64 * 4 * 5 * 3 * 5
    assert gla.cost(*shapes, chunk=8).executed_flops < gla.cost(*shapes).executed_flops
