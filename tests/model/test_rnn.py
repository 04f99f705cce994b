"""Recurrent networks against transformers, torch or their equations token by token; initial values; traps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import RecurrentGemmaConfig
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

from lmtrain.errors import UsageError
from lmtrain.model.branch import Place
from lmtrain.model.context import LocalContext
from lmtrain.model.mixers.lrnn import LRNNConfig
from lmtrain.model.mixers.lstm import LSTMConfig
from lmtrain.model.mixers.rg_lru import RGLRUConfig
from lmtrain.model.mixers.rg_lru_gates import STEEPEST, BoundedRoot
from lmtrain.ops.documents import Documents
from tests.model.parity import (
    LENGTH,
    Named,
    assert_normal,
    assert_peer,
    assert_recurrence,
    assert_uniform,
    forward,
    initial,
    perturbed,
    random,
)

D_MODEL = 12


def test_rg_lru_is_the_one_of_recurrent_gemma() -> None:
    width, heads = 18, 3
    peer_cfg = RecurrentGemmaConfig(
        hidden_size=D_MODEL, lru_width=width, num_attention_heads=heads, conv1d_width=4, num_hidden_layers=1
    )
    peer = RecurrentGemmaRecurrentBlock(peer_cfg, 0)

    def packed(p: Named) -> Named:
        gates = {"recurrent": "rg_lru.recurrent_gate", "input": "rg_lru.input_gate"}
        return {
            "linear_x.weight": p["x.weight"],
            "linear_x.bias": p["x.bias"],
            "linear_y.weight": p["gate.weight"],
            "linear_y.bias": p["gate.bias"],
            "linear_out.weight": p["o.weight"],
            "linear_out.bias": p["o.bias"],
            "conv_1d.weight": p["conv.weight"][:, None],
            "conv_1d.bias": p["conv.bias"],
            "rg_lru.recurrent_param": p["gates.exact.Lambda"],
            **{f"{theirs}_weight": p[f"gates.{ours}.weight"] for ours, theirs in gates.items()},
            **{f"{theirs}_bias": p[f"gates.exact.{ours}_bias"].view(heads, -1) for ours, theirs in gates.items()},
        }

    def run(x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1]).expand(x.shape[:2])
        return peer(x, positions, None, use_cache=False)[0]

    branch = perturbed(RGLRUConfig(width=width, num_heads=heads), D_MODEL, torch.float32)
    assert_peer(branch, peer, run, packed, D_MODEL)


def test_the_root_is_bounded_in_its_gradient_alone() -> None:
    x = torch.tensor([0.0, 1e-12, 0.25, 4.0], requires_grad=True)
    y = BoundedRoot.apply(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, x.sqrt())
    torch.testing.assert_close(grad, torch.tensor([STEEPEST, STEEPEST, 1.0, 0.25]))


def lrnn(p: Named, x: Tensor) -> Tensor:
    def perceptron(name: str) -> Tensor:
        inner = F.relu(x @ p[f"{name}.up.weight"].T + p[f"{name}.up.bias"])
        return inner @ p[f"{name}.out.weight"].T + p[f"{name}.out.bias"]

    blocks, size = p["start.state"].shape
    matrices = perceptron("matrices").view(*x.shape[:2], blocks, size, size)
    matrices = matrices - matrices.mean(dim=-2, keepdim=True)
    norms = (matrices.abs() ** 1.2).sum(dim=-2) ** (1 / 1.2)
    matrices = matrices / norms.max(dim=-1).values[..., None, None]
    values = perceptron("values").view(*x.shape[:2], blocks, size)
    state, outputs = p["start.state"].expand(x.shape[0], blocks, size), []
    for t in range(x.shape[1]):
        state = torch.einsum("bhij,bhj->bhi", matrices[:, t], state) + values[:, t]
        outputs.append(state.flatten(1))
    return torch.stack(outputs, dim=1)


def test_lrnn_is_its_recurrence() -> None:
    assert_recurrence(LRNNConfig(block_size=4), D_MODEL, lrnn)


def test_lrnn_survives_a_block_of_equal_elements() -> None:
    """Nothing is left of it after its mean: the matrix is 0, the gradients are finite."""
    branch = perturbed(LRNNConfig(block_size=4), D_MODEL, torch.float64)
    with torch.no_grad():
        branch.get_parameter("matrices.out.weight").zero_()
        branch.get_parameter("matrices.out.bias").fill_(0.3)
    x = random(2, 5, D_MODEL, dtype=torch.float64, seed=1)
    y = forward(branch, x)
    torch.testing.assert_close(y, branch.values(x), rtol=0, atol=1e-9)
    grads = torch.autograd.grad(y.square().sum(), list(branch.parameters()))
    assert all(grad.isfinite().all() for grad in grads)


def lstm(p: Named, x: Tensor) -> Tensor:
    """torch's whole-row LSTM."""
    hidden = p["recurrence.cell.weight_hh"].shape[1]
    peer = nn.LSTM(x.shape[-1], hidden, batch_first=True, dtype=x.dtype)
    named = {f"{name}_l0": p[f"recurrence.cell.{name}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    y, _ = torch.func.functional_call(peer, named, (x,))
    return y @ p["o.weight"].T


def test_lstm_is_the_one_of_torch() -> None:
    assert_recurrence(LSTMConfig(d_hidden=7), D_MODEL, lstm)


@pytest.mark.parametrize(
    "settings",
    [RGLRUConfig(width=18, num_heads=3), LRNNConfig(block_size=4), LSTMConfig(d_hidden=7)],
    ids=lambda s: s.kind,
)
def test_packed_documents_are_separate_ones(settings: Any) -> None:
    """Each begins as a row does: with the whole input (RG-LRU), with a_0 (LRNN), with a state of 0 (LSTM)."""
    branch, cut = perturbed(settings, D_MODEL, torch.float64), 16
    x = random(2, LENGTH, D_MODEL, dtype=torch.float64, seed=5)
    ids = (torch.arange(LENGTH) >= cut).int().expand(2, LENGTH)
    packed, _, _ = branch(x, LocalContext(Documents.from_ids(ids)), {}, {})
    separate = torch.cat([forward(branch, x[:, :cut]), forward(branch, x[:, cut:])], dim=1)
    torch.testing.assert_close(packed, separate, rtol=1e-11, atol=1e-11)


def test_initial_values_of_rg_lru() -> None:
    """DeepMind's, with 2 / L of L blocks of two branches each. At r = 1/8 a is uniform in its square."""
    d_model, heads = 64, 4
    drawn = initial(RGLRUConfig(num_heads=heads), d_model, Place(0, 18))
    stds = {
        "x.weight": 1 / 8,
        "gate.weight": 1 / 8,
        "conv.weight": 0.05,
        "gates.recurrent.weight": 1 / 4,
        "gates.input.weight": 1 / 4,
        "o.weight": math.sqrt(2 / 9 / d_model),
    }
    for name, std in stds.items():
        assert_normal(drawn.pop(name), std)
    square = (-2 * F.softplus(drawn.pop("gates.exact.Lambda"))).exp()
    low, high = 0.9**2, 0.999**2
    assert_uniform(square - (low + high) / 2, (high - low) / 2)
    assert len(drawn) == 6 and all((value == 0).all() for value in drawn.values())  # biases


def test_initial_values_of_lrnn_and_lstm() -> None:
    """Torch's default for every layer; a_0 is normal."""
    drawn = initial(LRNNConfig(), 64)
    assert_normal(drawn.pop("start.state"), 1.0)
    for name, value in drawn.items():
        inner = 512 if name.startswith("matrices.out") else 64
        assert_uniform(value, 1 / math.sqrt(inner))
    for value in initial(LSTMConfig(d_hidden=49), 64).values():
        assert_uniform(value, 1 / 7)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: RGLRUConfig(num_heads=0), "rg_lru: num_heads: expected at least 1, got 0"),
        (lambda: RGLRUConfig(num_heads=5).channels(8), "rg_lru: num_heads 5 does not divide the 8 channels; use 4"),
        (lambda: LRNNConfig(block_size=1), "lrnn: block_size: expected at least 2 (a block of 1 is 0), got 1"),
        (lambda: LRNNConfig(block_size=8).blocks(12), "lrnn: block_size 8 does not divide d_model 12; use 6"),
        (lambda: LSTMConfig(d_hidden=0), "lstm: d_hidden: expected at least 1, got 0"),
    ],
)
def test_settings_that_cannot_work(make, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError) as caught:
        make()
    assert str(caught.value) == says
