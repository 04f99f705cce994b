"""rmsnorm alone: its reference is the formula; any dims, extreme rows, mixed dtypes. See test_op_matrix.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lmtrain.ops.rmsnorm import rmsnorm
from tests.ops.conftest import RUNNING
from tests.ops.op_case import Outputs, Running, Tensors
from tests.ops.op_cases import norm
from tests.ops.scan_cases import assert_close, rand, run

EPS = 1e-5
both = pytest.mark.parametrize("op", [name for name, op in RUNNING.items() if op.name == "rmsnorm"], indirect=True)


def inputs(*shape: int, gated: bool, dtype: torch.dtype = torch.float64) -> Tensors:
    tensors = {"x": rand(*shape, seed=1), "weight": rand(shape[-1], seed=2)}
    tensors |= {"gate": 2 * rand(*shape, seed=3)} if gated else {}
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def results(tensors: Tensors, num_groups: int = 1) -> Tensors:
    return run(norm("gate" in tensors, num_groups).call, tensors, None, ("y",))


def formula(tensors: Tensors, num_groups: int = 1) -> Tensors:
    """What ``results`` must be, in fp64, group by group."""

    def call(leaves: Tensors, docs: None) -> Outputs:
        u = leaves["x"]
        if "gate" in leaves:
            u = u * leaves["gate"] * torch.sigmoid(leaves["gate"])
        normed = [part / (part.pow(2).mean(-1, keepdim=True) + EPS).sqrt() for part in u.chunk(num_groups, dim=-1)]
        return (torch.cat(normed, dim=-1) * leaves["weight"],)

    return run(call, {name: tensor.double() for name, tensor in tensors.items()}, None, ("y",))


@both
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("shape", "num_groups"),
    [((2, 0, 5), 1), ((7,), 1), ((9, 4), 2), ((2, 40, 21), 3), ((1, 33, 48), 3), ((65, 64), 1), ((2, 3, 5, 515), 1)],
)
def test_is_the_formula(op: Running, shape: tuple[int, ...], num_groups: int, gated: bool) -> None:
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 2e-6)):
        tensors = inputs(*shape, gated=gated, dtype=dtype)
        assert_close(results(tensors, num_groups), formula(tensors, num_groups), tolerance)


@both
def test_gate_and_weight_of_other_dtypes(op: Running) -> None:
    tensors = inputs(5, 70, gated=True, dtype=torch.float32)
    tensors |= {name: tensors[name].bfloat16() for name in ("gate", "weight")}
    found, expected = results(tensors, 2), formula(tensors, 2)
    assert found["y"].dtype == found["grad_x"].dtype == torch.float32 and found["grad_gate"].dtype == torch.bfloat16
    assert_close({"y": found["y"]}, {"y": expected["y"]}, 2e-6)
    assert_close(found, expected, 5e-3)


@both
def test_small_and_large_rows(op: Running) -> None:
    """Where eps rules, where it does not, and rows of zeros."""
    tensors = inputs(4, 64, gated=False, dtype=torch.float32)
    tensors["x"] *= torch.tensor([1e-6, 1.0, 1e6, 0.0])[:, None]
    found, expected = results(tensors), formula(tensors)
    for row in range(4):
        for name in ("y", "grad_x"):
            assert_close({name: found[name][row]}, {name: expected[name][row]}, 2e-6)
    assert found["y"][3].count_nonzero() == 0


@both
def test_groups_are_independent_to_the_bit(op: Running) -> None:
    """Not even NaN reaches another group of the same row."""
    clean = inputs(6, 40, gated=True, dtype=torch.float32)
    nan = clean | {"x": clean["x"].clone()}
    nan["x"][2, 20:] = float("nan")
    found, expected = results(nan, 2), results(clean, 2)
    others = torch.ones(6, 40, dtype=torch.bool)
    others[2, 20:] = False
    for name in ("y", "grad_x", "grad_gate"):
        assert torch.equal(found[name][others], expected[name][others])
        assert found[name][2, 20:].isnan().all()


@pytest.mark.parametrize(
    ("argument", "value", "says"),
    [
        ("x", torch.zeros(2, 0), r"x: expected shape \[..., D\] with D at least 1, got \[2, 0\]"),
        ("weight", torch.zeros(5), r"weight: expected shape \[6\], got \[5\]"),
        ("num_groups", 4, "num_groups: expected a divisor of the last dim 6, got 4"),
        ("num_groups", 0, "num_groups: expected a divisor of the last dim 6, got 0"),
    ],
)
def test_bad_input_is_named(argument: str, value: Tensor | int, says: str) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(2, 6), "weight": torch.zeros(6)} | {argument: value}
    with pytest.raises(ValueError, match=f"^rmsnorm: {says}$"):
        rmsnorm(**arguments, eps=EPS)


def test_cost_counts_every_value_once() -> None:
    plain, gated = (rmsnorm.cost((2, 3, 8), (8,), gated=gated) for gated in (False, True))
    assert plain.bytes == 4 * (2 * 48 + 8) and gated.bytes == 4 * (3 * 48 + 8)
    assert gated.model_flops > plain.model_flops > 0
