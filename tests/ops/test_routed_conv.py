"""Routed convolution: each memory's tokens convolved as a row of their own, by hand and by ``causal_conv1d``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmtrain.ops import Documents, causal_conv1d, routed_conv
from tests.ops.scan_cases import BATCH, layouts, rand, run

MEMORIES, CHANNELS, WIDTH = 3, 5, 4


@settings(max_examples=40, deadline=None, derandomize=True)
@given(docs=layouts(), seed=st.integers(0, 1000), share=st.sampled_from([0.0, 0.3, 0.7, 1.0]))
def test_a_memory_is_a_row_of_its_tokens(docs: Documents, seed: int, share: float) -> None:
    """Of every document alone: outputs, states, and nothing where a memory is not used."""
    length = docs.shape[1]
    x = rand(BATCH, length, MEMORIES, CHANNELS, seed=seed)
    weight, carried = rand(CHANNELS, WIDTH, seed=1), rand(BATCH, MEMORIES, WIDTH - 1, CHANNELS, seed=2)
    used = torch.rand(BATCH, length, MEMORIES, generator=torch.Generator().manual_seed(seed)) < share
    y, state = routed_conv(x, used, weight, docs=docs, initial_state=carried)
    assert (y[~used] == 0).all()
    starts = docs.starts()
    for row in range(BATCH):
        for memory in range(MEMORIES):
            tail, first = carried[row, memory], 0
            borders = [t for t in range(length) if starts[row, t]] + [length]
            for border in borders:
                mine = used[row, first:border, memory]
                alone = x[row, first:border, memory][mine][None]
                expected, tail = causal_conv1d(alone, weight, initial_state=tail[None])
                torch.testing.assert_close(y[row, first:border, memory][mine], expected[0], rtol=1e-12, atol=1e-12)
                tail = tail[0]
                if border < length:
                    tail, first = torch.zeros_like(tail), border
            assert torch.equal(state[row, memory], tail)


def test_by_hand() -> None:
    """Two taps 3 and 1; memory 0 is used by tokens 0, 2 and 3, memory 1 by 1 and 3, and its state holds 7."""
    x = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0]]).view(1, 4, 2, 1)
    used = torch.tensor([[True, False], [False, True], [True, False], [True, True]])[None]
    carried = torch.tensor([0.0, 7.0]).view(1, 2, 1, 1)
    y, state = routed_conv(x, used, torch.tensor([[3.0, 1.0]]), initial_state=carried)
    expected = torch.tensor([[1, 0], [0, 20 + 21], [3 + 3, 0], [4 + 9, 40 + 60]]).float()
    torch.testing.assert_close(y.view(4, 2), F.silu(expected))
    assert state.flatten().tolist() == [4, 40]


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_what_is_not_used_does_not_matter(monkeypatch: pytest.MonkeyPatch, kernels: str) -> None:
    """NaN there changes no bit of outputs, state and gradients, and gets none."""
    monkeypatch.setenv("LMTRAIN_KERNELS", kernels)
    used = torch.rand(BATCH, 30, MEMORIES, generator=torch.Generator().manual_seed(0)) < 0.5
    tensors = {"x": rand(BATCH, 30, MEMORIES, CHANNELS, seed=1), "weight": rand(CHANNELS, WIDTH, seed=2)}

    def call(tensors: dict[str, Tensor], docs: Documents | None) -> tuple[Tensor, Tensor]:
        return routed_conv(tensors["x"], used, tensors["weight"], docs=docs)

    expected = run(call, tensors, None)
    assert (expected["grad_x"][~used] == 0).all() and (expected["grad_x"][used] != 0).any()
    tensors["x"] = torch.where(used[..., None], tensors["x"], float("nan"))
    for name, tensor in run(call, tensors, None).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    ("used", "width", "says"),
    [
        (torch.ones(1, 2, 3), 4, "used: expected bools, got torch.float32"),
        (torch.ones(1, 2, 4).bool(), 4, r"used: expected shape \[1, 2, 3\], got \[1, 2, 4\]"),
        (torch.ones(1, 2, 3, device="meta").bool(), 4, "used: expected device cpu as x, got meta"),
        (torch.ones(1, 2, 3).bool(), 17, "weight: expected 1 to 16 taps, got 17"),
    ],
    ids=["floats", "shape", "device", "taps"],
)
def test_bad_inputs_are_refused(used: Tensor, width: int, says: str) -> None:
    with pytest.raises(ValueError, match=f"^routed_conv: {says}$"):
        routed_conv(torch.zeros(1, 2, 3, 5), used, torch.zeros(5, width))
