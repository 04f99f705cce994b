"""wkv4 alone: the formula of the paper, keys whose e^k overflows, states that do not add. See test_op_matrix.py."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from lmtrain.ops.wkv4 import wkv4
from tests.ops.conftest import RUNNING
from tests.ops.op_case import DECAYS, Running, documents
from tests.ops.op_cases import CASES
from tests.ops.op_inputs import wkv4_unique
from tests.ops.scan_cases import BATCH, rand

both = pytest.mark.parametrize("op", [name for name, op in RUNNING.items() if op.case.op == "wkv4"], indirect=True)


@both
def test_is_the_formula_of_the_paper(op: Running) -> None:
    v, k, w, u, _ = op.case.inputs(9).values()
    y, _ = wkv4(v, k, w, u)
    for t in range(9):
        steps = torch.arange(t - 1, -1, -1)[:, None]
        weights = torch.cat([(steps * w + k[:, :t]).exp(), (u + k[:, t : t + 1]).exp()], dim=1)
        expected = (weights * v[:, : t + 1]).sum(dim=1) / weights.sum(dim=1)
        torch.testing.assert_close(y[:, t], expected, rtol=1e-13, atol=1e-13)


@both
@pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS)
def test_large_keys(op: Running, decay: float) -> None:
    """e^k of which fp32 cannot hold."""
    case = replace(op.case, make=partial(op.case.make, keys=100.0), tolerance=2e-5)
    replace(op, case=case).assert_matches(case.inputs(100, decay), documents("edges", 100))


def test_an_empty_state_is_neutral_and_a_reset_forgets_infinity() -> None:
    case = CASES["wkv4"]
    state, added = (case.inputs(1, seed=seed)["initial_state"] for seed in (0, 1))
    gamma, zeros = -rand(BATCH, state.shape[2], seed=8).abs(), torch.zeros_like(state)
    forget = torch.full_like(gamma, -float("inf"))
    for found, expected in (
        (wkv4.combine(gamma, zeros, added), added),
        (wkv4.combine(gamma * 0, state, zeros), state),
        (wkv4.combine(forget, state / 0, added), added),
    ):
        torch.testing.assert_close(wkv4_unique(found), wkv4_unique(expected))


def test_states_do_not_add() -> None:
    gamma, state = torch.zeros(BATCH, 3), torch.zeros(BATCH, 3, 3)
    for call in (wkv4.apply, wkv4.transpose, wkv4.outer):
        with pytest.raises(TypeError, match=r"^wkv4: \w+\(\): states of this kind do not add"):
            call(gamma, state)


def test_cost() -> None:
    assert wkv4.cost((1, 64, 4)).model_flops == 64 * 4 * 20
