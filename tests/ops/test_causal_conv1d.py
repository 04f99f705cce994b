"""causal_conv1d alone: its reference is the equation, sizes, extremes, its own arguments. See test_op_matrix.py."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from lmtrain.ops import Documents, causal_conv1d
from tests.ops import op_inputs
from tests.ops.conftest import RUNNING
from tests.ops.op_case import Outputs, Running, Tensors, documents
from tests.ops.op_cases import CASES, conv
from tests.ops.scan_cases import assert_close, run

both = pytest.mark.parametrize("op", [name for name, op in RUNNING.items() if op.name == "conv"], indirect=True)


def equation(tensors: Tensors, docs: Documents | None, activation: str) -> Outputs:
    """Token by token; what ``run`` makes of it has gradients by autograd."""
    x, weight = tensors["x"], tensors["weight"]
    (batch, length, channels), width = x.shape, weight.shape[1]
    tail = tensors.get("initial_state", x.new_zeros(batch, width - 1, channels))
    positions = None if docs is None else docs.positions().tolist()
    row = torch.cat([tail, x], dim=1)
    columns = []
    for b in range(batch):
        for t in range(length):
            z = tensors.get("bias", x.new_zeros(channels))
            for distance in range(width):
                if positions is None or distance <= positions[b][t]:
                    z = z + weight[:, width - 1 - distance] * row[b, width - 1 + t - distance]
            columns.append(z * torch.sigmoid(z) if activation == "silu" else z)
    return torch.stack(columns).view(x.shape), row[:, length:]


@both
@pytest.mark.parametrize("missing", ["nothing", "bias", "initial_state"])
@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("width", [1, 2, 4, 5, 16])
def test_is_the_equation(op: Running, width: int, activation: str, missing: str) -> None:
    case = conv(width, activation)
    tensors = case.inputs(9)
    tensors.pop(missing, None)
    for docs in (None, Documents.from_ids(torch.tensor([[0, 0, 1, 2, 2, 2, 2, 3, 3]] * 2), torch.tensor([2, 0]))):
        expected = run(partial(equation, activation=activation), tensors, docs)
        assert_close(run(case.call, tensors, docs), expected, 1e-14)


@both
@pytest.mark.parametrize("channels", [0, 1, 515])
def test_channel_tiles(op: Running, channels: int) -> None:
    tensors = op_inputs.conv(partial(torch.randn, dtype=torch.float64), 1, 5, 1.0, width=4, channels=channels)
    op.assert_matches({name: t.float().double() for name, t in tensors.items()}, documents("carried", 5, batch=1))


@both
def test_bf16_extremes(op: Running) -> None:
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 3.4e38, 1e-40]).bfloat16()[:, None, None]
    y, _ = causal_conv1d(special, torch.ones(1, 1, dtype=torch.bfloat16), activation="none")
    assert torch.equal(y.nan_to_num(7.0), special.nan_to_num(7.0))


@both
def test_large_inputs_saturate(op: Running) -> None:
    x = torch.tensor([-1e4, -90.0, -88.0, -20.0, 0.0, 20.0, 88.0, 1e4])[:, None, None]
    y, _ = causal_conv1d(x, torch.ones(1, 1))
    torch.testing.assert_close(y, torch.nn.functional.silu(x.double()).float(), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize(
    ("argument", "value", "says"),
    [
        ("weight", torch.zeros(21, 17), "weight: expected 1 to 16 taps, got 17"),
        ("initial_state", torch.zeros(2, 3, 21), "initial_state: expected dtype torch.float64 as x, got torch.float32"),
        ("activation", "gelu", "activation: expected one of none, silu, got 'gelu'"),
    ],
)
def test_bad_input_is_one_line(argument: str, value: object, says: str) -> None:
    with pytest.raises(ValueError, match=f"^causal_conv1d: {says}$"):
        causal_conv1d(**(CASES["conv"].inputs(7) | {argument: value}))


def test_cost_counts_two_flops_a_tap() -> None:
    cost = causal_conv1d.cost((2, 7, 5), (5, 4))
    assert (cost.model_flops, cost.bytes) == (2 * 4 * 70, 4 * (2 * 70 + 20))
