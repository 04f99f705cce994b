"""What the tests of affine ops share: cases, runs with all gradients, and how close is close."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from lmtrain.errors import UsageError
from lmtrain.ops import Documents, library

BATCH = 2
LENGTHS = (0, 1, 63, 64, 65, 200)
DOCUMENTS = ("none", "fresh", "carried", "edges")
Function = Callable[[dict[str, Tensor], Documents | None], tuple[Tensor, Tensor]]


def rand(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def use(monkeypatch: pytest.MonkeyPatch, op: str, backend: str) -> str:
    """Choose a backend by name; skips the test where it is not built."""
    monkeypatch.setenv("LMTRAIN_KERNELS", backend)
    try:
        return library.backend(op, "cpu", torch.float32)
    except UsageError as refused:
        pytest.skip(str(refused))


def documents(kind: str, length: int, chunk: int = 64) -> Documents | None:
    """none; fresh: one document from column 0; carried: going on; edges: starts at, before and after chunk borders."""
    if kind == "none":
        return None
    ids = torch.zeros(BATCH, length, dtype=torch.int32)
    if kind == "edges":
        for row, shift in enumerate((0, -1)):  # row 1: starts before the borders and right after them
            starts = [t for border in range(0, length, chunk) for t in (border + shift, border + 2 * shift + 1)]
            ids[row, [t for t in starts if 0 <= t < length]] = 1
    before = torch.tensor([0, 0] if kind == "fresh" else [3, 0] if kind == "edges" else [3, 1])
    return Documents.from_ids(ids.cumsum(1), before)


@st.composite
def layouts(draw: st.DrawFn) -> Documents:
    """Rows of up to 20 columns with documents anywhere, carried or not."""
    length = draw(st.integers(1, 20))
    starts = draw(st.lists(st.sets(st.integers(0, length - 1), max_size=3), min_size=BATCH, max_size=BATCH))
    ids = torch.zeros(BATCH, length, dtype=torch.int32)
    for row, columns in enumerate(starts):
        ids[row, sorted(columns)] = 1
    return Documents.from_ids(ids.cumsum(1), torch.tensor(draw(st.lists(st.integers(0, 2), min_size=2, max_size=2))))


def shard(docs: Documents, first: int, last: int) -> Documents:
    """The documents of columns ``[first, last)``."""
    before = docs.positions()[:, first] if first < docs.shape[1] else torch.ones(BATCH, dtype=torch.int32)
    return Documents.from_ids(docs.ids[:, first:last], before)


def run(
    function: Callable[..., tuple[Tensor, ...]],
    tensors: dict[str, Tensor],
    docs: Documents | None,
    names: tuple[str, ...] = ("y", "state"),
) -> dict[str, Tensor]:
    """The outputs, and the gradients of a random functional of them with respect to every tensor.

    Its weights are numbers that bf16 has: the same functional in every precision.
    """
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    outputs = dict(zip(names, function(leaves, docs), strict=True))
    weights = [rand(*out.shape, seed=9 + i).bfloat16().to(out) for i, out in enumerate(outputs.values())]
    reached = [i for i, out in enumerate(outputs.values()) if out.requires_grad]
    ends, weights = ([several[i] for i in reached] for several in (list(outputs.values()), weights))
    grads = torch.autograd.grad(ends, list(leaves.values()), weights, materialize_grads=True)
    found = {name: out.detach() for name, out in outputs.items()}
    return found | {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def relative_rms(got: Tensor, want: Tensor) -> float:
    """Of the difference, in terms of ``want``; an error of something tiny counts as one of 1e-3."""
    if not want.numel():
        return 0.0
    scale = want.double().square().mean().sqrt().clamp(min=1e-3)
    return float((got.double() - want.double()).square().mean().sqrt() / scale)


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative RMS below ``tolerance`` for every tensor."""
    for name, want in expected.items():
        assert got[name].shape == want.shape, name
        error = relative_rms(got[name], want)
        assert error < tolerance, f"{name}: relative RMS {error:.1e}"
