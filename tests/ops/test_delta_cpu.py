"""delta's compiled backend: sizes, documents that hold NaN, thread counts, vector units, what torch asks of an op."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lmtrain.ops import Documents, library
from lmtrain.ops.delta import delta, recurrence

GATES = ("none", "scalar", "vector")
Tensors = dict[str, Tensor | None]


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMTRAIN_KERNELS", "cpu")
    assert library.backend("delta", "cpu", torch.float32) == "cpu", "run `make install`"


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that torch hands out uninitialised holds NaN."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)


def inputs(
    length: int,
    gate: str = "scalar",
    *,
    batch: int = 2,
    heads: int = 4,
    groups: int = 2,
    keys: int = 16,
    width: int = 32,
    dtype: torch.dtype = torch.float32,
) -> Tensors:
    generator = torch.Generator().manual_seed(length + 7 * keys + width)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = {
        "v": rand(batch, length, heads, width),
        "q": rand(batch, length, groups, keys),
        "k": F.normalize(rand(batch, length, groups, keys), dim=-1),
        "beta": 2 * rand(batch, length, heads).sigmoid(),
        "g": -0.1 * rand(batch, length, heads, keys).abs(),
        "initial_state": rand(batch, heads, keys, width),
    }
    tensors["g"] = {"none": None, "scalar": tensors["g"][..., 0], "vector": tensors["g"]}[gate]
    return {name: None if t is None else t.to(dtype) for name, t in tensors.items()}


def documents(borders: tuple[int, ...], length: int, batch: int = 2) -> Documents:
    """A document starts at every border; the last row continues one from before its column 0, the others none."""
    ids = torch.zeros(batch, length, dtype=torch.int32)
    for border in borders:
        ids[:, border:] += 1
    return Documents.from_ids(ids, torch.tensor([0] * (batch - 1) + [3]))


def run(tensors: Tensors, docs: Documents | None, exact: bool = False) -> dict[str, Tensor]:
    """y, state, and the gradients of a random functional of both; ``exact``: by the recurrence in fp64."""
    leaves = {
        n: None if t is None else (t.detach().double() if exact else t.detach()).requires_grad_()
        for n, t in tensors.items()
    }
    *given, initial = leaves.values()
    if exact:
        y, state = recurrence(*given, docs, initial if docs is None else delta.drop(initial, docs.before))
    else:
        y, state = delta(*given, docs=docs, initial_state=initial)
    generator = torch.Generator().manual_seed(9)
    grads = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in (y, state)]
    wanted = {name: t for name, t in leaves.items() if t is not None}
    found = torch.autograd.grad((y, state), list(wanted.values()), grads)
    return {"y": y.detach(), "state": state.detach()} | {f"d {n}": g for n, g in zip(wanted, found, strict=True)}


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative RMS below ``tolerance`` for every tensor."""
    for name, want in expected.items():
        error = (got[name].double() - want).square().mean().sqrt() / want.square().mean().sqrt().clamp(min=1e-3)
        assert error < tolerance, f"{name}: relative RMS {float(error):.2e}"


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    "sizes",
    [
        {"length": 70},
        {"length": 33, "keys": 1, "width": 1},
        {"length": 65, "keys": 17, "width": 33, "heads": 3, "groups": 1},
        {"length": 40, "keys": 5, "width": 64, "groups": 4},
        {"length": 100, "keys": 32, "width": 80, "heads": 2, "batch": 1},
    ],
    ids=str,
)
def test_sizes(gate: str, sizes: dict[str, int], poisoned: None) -> None:
    docs = documents((1, 5, 31, 32, 33), sizes["length"], sizes.get("batch", 2))
    for documented in (None, docs):
        tensors = inputs(gate=gate, **sizes)
        assert_close(run(tensors, documented), run(tensors, documented, exact=True), 2e-6)
        tensors = inputs(gate=gate, dtype=torch.float64, **sizes)
        assert_close(run(tensors, documented), run(tensors, documented, exact=True), 1e-13)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("optional", [True, False])
def test_opcheck(gate: str, optional: bool) -> None:
    tensors, docs = inputs(40, gate, groups=4), documents((5, 33), 40)
    v, q, k, beta, g, initial = (None if t is None else t.requires_grad_() for t in tensors.values())
    decay = None if g is None else g.detach().view(2, 40, 4, -1).exp().requires_grad_()
    extra = (docs.starts(), initial) if optional else (None, None)
    torch.library.opcheck(torch.ops.lmtrain.delta.default, (v, q, k, beta, decay, *extra))
    arguments = [None if t is None else t.detach() for t in (v, q, k, beta, decay, *extra)]
    grads = (torch.randn(2, 40, 4, 32), torch.randn(2, 4, 16, 32))
    torch.library.opcheck(torch.ops.lmtrain.delta_backward.default, (*grads, *arguments))


@pytest.mark.parametrize("gate", GATES)
def test_compiles_whole_and_checkpoints(gate: str) -> None:
    tensors, docs = inputs(40, gate), documents((5, 33), 40)
    *given, initial = (None if t is None else t.requires_grad_() for t in tensors.values())

    def op(*arguments: Tensor | None) -> tuple[Tensor, Tensor]:
        return delta(*arguments, docs=docs, initial_state=initial)

    y, state = op(*given)
    compiled_op = torch.compile(op, backend="aot_eager", fullgraph=True)
    for other in (compiled_op(*given), checkpoint(op, *given, use_reentrant=False)):
        assert torch.equal(other[0], y) and torch.equal(other[1], state)
        wanted = [t for t in given if t is not None]
        pairs = (torch.autograd.grad(out.sum(), wanted, retain_graph=True) for out in (other[0], y))
        assert all(torch.equal(one, two) for one, two in zip(*pairs, strict=True))


@pytest.mark.parametrize("gate", GATES)
def test_same_bits_for_any_thread_count(gate: str) -> None:
    tensors, docs = inputs(300, gate, heads=6), documents((100, 101), 300)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append(run(tensors, docs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_another_document_never_leaks(gate: str, poison: float) -> None:
    """Not even NaN: columns 0-39 and the state belong to others, columns 40-69 are ours."""

    def ours(fill: float) -> list[Tensor]:
        tensors = inputs(70, gate, batch=1)
        for name, tensor in tensors.items():
            if tensor is not None:
                tensor[(slice(None), slice(0, 40)) if name != "initial_state" else ...] = fill
        leaves = {n: None if t is None else t.requires_grad_() for n, t in tensors.items()}
        docs = Documents.from_ids((torch.arange(70) >= 40)[None], torch.tensor([0]))
        *given, initial = leaves.values()
        y, state = delta(*given, docs=docs, initial_state=initial)
        wanted = [t for t in leaves.values() if t is not None]
        *grads, grad_initial = torch.autograd.grad(y[:, 40:].sum() + state.sum(), wanted)
        assert torch.equal(grad_initial, torch.zeros_like(grad_initial))
        return [y[:, 40:], state, *(grad[:, 40:] for grad in grads)]

    for got, expected in zip(ours(poison), ours(0.0), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("gate", GATES)
def test_a_packed_document_has_the_bits_of_one_alone(gate: str) -> None:
    tensors, docs = inputs(100, gate, batch=1), documents((37, 70), 100, batch=1)
    packed, _ = delta(*list(tensors.values())[:5], docs=docs, initial_state=tensors["initial_state"])
    for index, (begin, end) in enumerate(((0, 37), (37, 70), (70, 100))):
        part = [None if t is None else t[:, begin:end] for t in list(tensors.values())[:5]]
        alone, _ = delta(*part, initial_state=tensors["initial_state"] if index == 0 else None)
        assert torch.equal(alone, packed[:, begin:end])


UNIT = """
import sys, torch
import torch.nn.functional as F
from lmtrain.ops import Documents
from lmtrain.ops.delta import delta
torch.manual_seed(0)
docs = Documents.from_ids((torch.arange(80) > 50).int().expand(2, 80), torch.tensor([0, 5]))
saved = {}
for dtype in (torch.float32, torch.float64):
    shapes = ((2, 80, 4, 70), (2, 80, 2, 19), (2, 80, 2, 19), (2, 80, 4), (2, 80, 4, 19), (2, 4, 19, 70))
    leaves = [torch.randn(s).to(dtype) for s in shapes]
    leaves[2], leaves[3], leaves[4] = F.normalize(leaves[2], dim=-1), leaves[3].sigmoid(), -leaves[4].abs()
    leaves = [leaf.requires_grad_() for leaf in leaves]
    outputs = delta(*leaves[:5], docs=docs, initial_state=leaves[5])
    grads = torch.autograd.grad(outputs, leaves, [torch.randn(o.shape).to(dtype) for o in outputs])
    saved[str(dtype)] = [t.detach() for t in (*outputs, *grads)]
torch.save(saved | {"unit": torch.ops.lmtrain.cpu_unit()}, sys.argv[1])
"""


def test_vector_units_agree(tmp_path: Path) -> None:
    results = {}
    for unit in ("generic", "avx2", "avx512"):
        environment = os.environ | {"LMTRAIN_CPU_UNIT": unit, "LMTRAIN_KERNELS": "cpu"}
        command = [sys.executable, "-c", UNIT, str(tmp_path / unit)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode and "this CPU lacks it" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        results[unit] = torch.load(tmp_path / unit)
        assert results[unit].pop("unit") == unit
    generic = results.pop("generic")
    for other in results.values():
        for dtype, tolerance in (("torch.float32", 2e-6), ("torch.float64", 1e-14)):
            expected = {str(i): tensor.double() for i, tensor in enumerate(generic[dtype])}
            assert_close({str(i): tensor for i, tensor in enumerate(other[dtype])}, expected, tolerance)
