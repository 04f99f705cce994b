"""delta and what it is a case of, by the papers' formulas. See test_op_matrix.py for all that every op owes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from lmtrain.ops.delta import delta
from lmtrain.ops.dplr import dplr
from tests.ops import op_inputs
from tests.ops.op_case import documents
from tests.ops.op_cases import CASES
from tests.ops.op_inputs import Tensors


def inputs(length: int, gate: str, groups: int = 4) -> Tensors:
    """groups: key heads, for 4 value heads. The decay is weak enough for products of many."""
    return replace(CASES["delta"], make=partial(op_inputs.delta, gate=gate, groups=groups)).inputs(length, 0.5)


def test_delta_is_the_householder_form() -> None:
    """S_t = (I - beta k k^T) S_{t-1} + beta k v^T, arXiv 2406.06484."""
    v, q, k, beta, state = inputs(1, "none").values()
    key, value, rate = k[:, 0, ..., None], v[:, 0], beta[:, 0, :, None, None]
    expected = (torch.eye(key.shape[-2]) - rate * key @ key.mT) @ state + rate * key @ value[:, :, None, :]
    torch.testing.assert_close(delta(v, q, k, beta, None, initial_state=state)[1], expected)


@pytest.mark.parametrize("gate", ["none", "scalar", "vector"])
def test_delta_is_a_case_of_dplr(gate: str) -> None:
    tensors = inputs(70, gate)
    v, q, k, beta, g, state = (tensors.get(name) for name in ("v", "q", "k", "beta", "g", "initial_state"))
    logs = (torch.zeros_like(beta) if g is None else g).view(*beta.shape, -1).expand(q.shape)
    written, docs = beta[..., None] * k, documents("edges", 70)
    expected = dplr(v, q, logs, written, -logs.exp() * k, written, docs=docs, initial_state=state)
    torch.testing.assert_close(delta(v, q, k, beta, g, docs=docs, initial_state=state), expected)


def test_key_heads_must_divide_value_heads() -> None:
    v, q, k, beta, _ = inputs(7, "none", groups=3).values()
    with pytest.raises(ValueError, match=r"^delta: q: expected key heads that divide the 4 value heads, got 3$"):
        delta(v, q, k, beta, None)
