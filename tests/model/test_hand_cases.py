"""Longhorn, RG-LRU, LRNN and MoM on rows of two or three tokens, worked out by hand, in fractions.

40 is a number so large that silu and gelu leave it as it is: gates and convolutions then pass whole numbers on. Most
cases are also cut by a document's start. Which memory a token of MoM reaches: ``test_mom.py``.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from lmtrain.model.branch import Branch, Place, branch_class
from lmtrain.model.context import LocalContext
from lmtrain.model.mixers.longhorn import LonghornConfig
from lmtrain.model.mixers.lrnn import LRNNConfig
from lmtrain.model.mixers.mom_settings import MoMConfig
from lmtrain.model.mixers.rg_lru import RGLRUConfig
from lmtrain.ops.documents import Documents

LARGE = 40.0
ROWS = pytest.mark.parametrize("ids", [[0, 0, 0], [0, 0, 1]], ids=["one document", "two documents"])


def build(settings: Any, d_model: int, **values: Any) -> Branch:
    """In fp64; parameters by their names, __ for a dot, the others 0."""
    branch = branch_class(settings.kind)(settings, d_model, Place(0, 1)).double()
    with torch.no_grad():
        for name, parameter in branch.named_parameters():
            value = torch.as_tensor(values.pop(name.replace(".", "__"), 0.0), dtype=torch.float64)
            parameter.copy_(value.expand_as(parameter))
    assert not values, f"no such parameters: {list(values)}"
    return branch


def read(branch: Branch, x: list[Any], ids: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """Of one row: outputs ``[T, d_model]`` and the state after it."""
    rows = torch.tensor(x, dtype=torch.float64).view(1, len(ids), -1)
    ctx = LocalContext(Documents.from_ids(torch.tensor([ids])), carries=True)
    with torch.no_grad():
        y, state, _ = branch(rows, ctx, {}, {})
    return y[0], state


def assert_numbers(got: Tensor, expected: list[Any]) -> None:
    numbers = torch.tensor(expected, dtype=torch.float64).view_as(got)
    torch.testing.assert_close(got, numbers, rtol=1e-11, atol=1e-11)  # LRNN adds 1e-12 to its norm


@ROWS
def test_longhorn(ids: list[int]) -> None:
    """x = 1, 2, 1 is u, k = (u, 2 u), q = (u, u), beta = 1/2; the gate is x again, D = 1/4.

    Delta = (1/2) / (1 + |k|^2 / 2), |k|^2 = 5 u^2: 1/7 for u = 1, 1/22 for u = 2.
    h: (1/7, 2/7); (9/11 * 1/7 + 2/11, 3/11 * 2/7 + 4/11) = (23/77, 34/77); (6/7 * 23/77 + 1/7, 3/7 * 34/77 + 2/7).
    """
    unit = 1 / LARGE
    branch = build(
        LonghornConfig(d_state=2, expand=1, dt_rank=1, conv_width=2),
        1,
        x__weight=LARGE,
        z__weight=LARGE,
        conv__weight=[0.0, 1.0],
        B__weight=[[unit], [2 * unit]],
        C__weight=[[unit], [unit]],
        skip__D=0.25,
        o__weight=unit**2,
    )
    y, state = read(branch, [1, 2, 1], ids)
    first = Fraction(3, 7) + Fraction(1, 4)  # q h + D u, times the gate 1
    second = 2 * (2 * Fraction(57, 77) + Fraction(1, 2))
    last = [Fraction(215, 539), Fraction(256, 539)] if ids[2] == 0 else [Fraction(1, 7), Fraction(2, 7)]
    assert_numbers(y, [first, second, sum(last) + Fraction(1, 4)])
    assert_numbers(state["ssm"] * unit, last)


def test_longhorn_learns_faster_by_its_bias() -> None:
    """beta = sigmoid(log 3) = 3/4: Delta = (3/4) / (1 + 3/4) = 3/7 for a key of 1; u = x_t + x_{t-1} / 2 + 1."""
    settings = LonghornConfig(d_state=1, expand=1, dt_rank=1, conv_width=2)
    unit, fixed = 1 / LARGE, {"step__bias": math.log(3), "z__weight": 1000.0}
    branch = build(
        settings,
        1,
        x__weight=LARGE,
        conv__weight=[0.5, 1.0],
        conv__bias=LARGE,
        B__weight=unit / 2,
        C__weight=unit,
        o__weight=1.0,
        **fixed,
    )
    _, state = read(branch, [1.0], [0])  # u = 2, k = 1
    assert_numbers(state["ssm"] * unit, [Fraction(3, 7) * 2])
    _, state = read(branch, [1.0, 0.5], [0, 0])  # u = 2 again: 4/7 of 6/7 and 6/7
    assert_numbers(state["ssm"] * unit, [Fraction(24, 49) + Fraction(6, 7)])


@ROWS
def test_rg_lru(ids: list[int]) -> None:
    """Two channels of one block. u = (x_t + x_{t-1} / 2, 8); the second opens the recurrent gate of the first.

    r = (sigmoid(log 3), 1/2) = (3/4, 1/2), i = (3/4, 1/2). log a = -8 r softplus(Lambda): a = (3/5, 4/5), whose roots
    sqrt(1 - a^2) are (4/5, 3/5). x = 8, 4, 4 in the first channel: u = 8, 8, 6. h = i u at a document's start:
    (6, 4); (3/5 * 6 + 4/5 * 6, 4/5 * 4 + 3/5 * 4) = (42/5, 28/5); (3/5 * 42/5 + 4/5 * 9/2, 4/5 * 28/5 + 12/5).
    """

    def softplus_inverse(y: float) -> float:
        return math.log(math.expm1(y))

    branch = build(
        RGLRUConfig(num_heads=1, conv_width=2),
        2,
        x__weight=[[1.0, 0.0], [0.0, 1.0]],
        conv__weight=[[0.5, 1.0], [0.0, 1.0]],
        gates__recurrent__weight=[[[0.0, 0.0], [math.log(3) / 8, 0.0]]],  # in by out
        gates__exact__input_bias=[math.log(3), 0.0],
        gates__exact__Lambda=[softplus_inverse(math.log(5 / 3) / 6), softplus_inverse(math.log(5 / 4) / 4)],
        gate__bias=LARGE,
        o__weight=[[1 / LARGE, 0.0], [0.0, 1 / LARGE]],
    )
    y, state = read(branch, [[8, 8], [4, 8], [4, 8]], ids)
    last = [Fraction(216, 25), Fraction(172, 25)] if ids[2] == 0 else [3, 4]  # u = 4 after a start: 3/4 of it
    assert_numbers(y, [6, 4, Fraction(42, 5), Fraction(28, 5), *last])
    assert_numbers(state["lru"], last)


@ROWS
def test_lrnn(ids: list[int]) -> None:
    """The matrix is [[3, 2], [1, 1]] for every token: less the means of its columns [[1, 1/2], [-1, -1/2]].

    The first column is the longer: (1 + 1)^(1 / 1.2) = 2^(5/6) = 1 / c. From a_0 = (2, 4), with values relu(x):
    c (4, -4) + (1, 3); c (1 + 4 c + (3 - 4 c) / 2) (1, -1) + (0, 2) and so on.
    """
    branch = build(
        LRNNConfig(block_size=2),
        2,
        matrices__out__bias=[3.0, 2.0, 1.0, 1.0],
        values__up__weight=[[1.0, 0.0], [0.0, 1.0]],
        values__out__weight=[[1.0, 0.0], [0.0, 1.0]],
        start__state=[[2.0, 4.0]],
    )
    c = 2 ** (-5 / 6)
    first = [1 + 4 * c, 3 - 4 * c]
    second = [2.5 * c + 2 * c**2, 2 - 2.5 * c - 2 * c**2]
    moved = c * (second[0] + second[1] / 2) if ids[2] == 0 else 4 * c
    y, state = read(branch, [[1, 3], [-1, 2], [5, 0]], ids)
    assert_numbers(y, [*first, *second, 5 + moved, -moved])
    assert_numbers(state["a"], [5 + moved, -moved])


def test_mom_weighs_what_it_reads() -> None:
    """Two memories, both used: weights 2/3 and 1/3 for the first token, 1/3 and 2/3 for the second.

    Keys and queries are 1, beta 1/2, the decay exp(-softplus(0)) = 1/2; values are (3, 0) of one and (0, 8) of the
    other. States: 1/2 v, then 1/4 v + (1/2) (3/4) v = 5/8 v. Reads: 1/2 (2, 8/3), 5/8 (1, 16/3), whose directions
    (3, 4) and (3, 16) the norm makes of mean square 1.
    """
    value = [[[0.0, 0.0, 3 * LARGE], [0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0], [0.0, 0.0, 8 * LARGE]]]
    key = [[0.0, 0.0, LARGE]]  # the third channel of x is 1
    each = {f"memories__{e}__{name}__weight": w for e in (0, 1) for name, w in (("k", key), ("v", value[e]))}
    branch = build(
        MoMConfig(
            num_memories=2,
            top_k=2,
            shared_memory=False,
            num_heads=1,
            head_dim=1,
            value_dim=2,
            conv_width=2,
            aux_weight=0.0,
        ),
        3,
        router__weight=[[math.log(2), 0.0, 0.0], [0.0, math.log(2), 0.0]],
        q__weight=key,
        **{f"{name}_conv__weight": [0.0, 1.0] for name in "qkv"},
        out__norm__weight=1.0,
        out__gate__0__weight=[[0.0, 0.0, LARGE]] * 2,
        out__o__weight=[[1 / LARGE, 0.0], [0.0, 1 / LARGE], [0.0, 0.0]],
        **each,
    )
    y, state = read(branch, [[1, 0, 1], [0, 1, 1]], [0, 0])
    expected = torch.tensor([[3.0, 4.0, 0.0], [3.0, 16.0, 0.0]]).double()
    expected = expected / torch.tensor([[25 / 2], [265 / 2]]).double().sqrt()
    torch.testing.assert_close(y, expected, rtol=1e-7, atol=0)  # the epsilons of the unit keys and of the norm
    kept = torch.tensor([[3 * 5 / 8, 0], [0, 8 * 5 / 8]]).double().view_as(state["delta"])
    torch.testing.assert_close(state["delta"] / LARGE, kept, rtol=1e-7, atol=0)
