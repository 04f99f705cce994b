"""Every branch in fp32, by the kernels that training uses, beside the same branch by its definitions in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lmtrain.model.branch import Branch, Place
from lmtrain.model.context import LocalContext
from tests.model.parity import Named, perturbed, random
from tests.model.row_checks import BRANCHES, D_MODEL, documents, leaves_of

TOLERANCE, SMALLEST = 1e-4, 0.05
"""Of the largest value of each tensor, which counts as ``SMALLEST`` at least: some gradients are 0, as that of a router
whose only weight is 1."""


def branch_of(name: str, dtype: torch.dtype) -> Branch:
    """The same numbers in either dtype."""
    return perturbed(BRANCHES[name], D_MODEL, torch.float32, Place(1, 4)).to(dtype)


def run(branch: Branch, dtype: torch.dtype) -> Named:
    """y and the state after two segments of one row, the first carried into the second, and every gradient of them."""
    docs = documents()
    x = random(*docs.shape, D_MODEL, dtype=torch.float32, seed=0).to(dtype).requires_grad_()
    first, before, _ = branch(x.flip(1), LocalContext(docs, carries=True), {}, {})
    y, after, _ = branch(x, LocalContext(docs, carries=True), before, {})
    outputs: list[Tensor] = [first, y, *leaves_of(after)]
    weights = [random(*t.shape, dtype=torch.float32, seed=i).to(t.dtype) for i, t in enumerate(outputs)]
    named = {"x": x, **dict(branch.named_parameters())}
    grads = torch.autograd.grad(outputs, list(named.values()), weights, materialize_grads=True)
    told = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    return {name: value.double() for name, value in {**told, **dict(zip(named, grads, strict=True))}.items()}


@pytest.mark.parametrize("name", BRANCHES)
def test_kernels_compute_the_definition(name: str) -> None:
    expected, got = (run(branch_of(name, dtype), dtype) for dtype in (torch.float64, torch.float32))
    assert got.keys() == expected.keys()
    for found, value in expected.items():
        error, scale = (got[found] - value).abs().max(), value.abs().max().clamp(min=SMALLEST)
        assert error <= TOLERANCE * scale, f"{found}: {error:.1e} off, of {scale:.1e}"
