"""Every op on every backend against its definition in fp64, with all gradients; documents, bits, torch's checks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lmtrain import ops
from lmtrain.ops import Documents, library
from tests.ops.conftest import RUNNING
from tests.ops.op_case import DECAYS, Case, Outputs, Running, Tensors, documents
from tests.ops.op_cases import AFFINE, CASES
from tests.ops.scan_cases import BATCH, assert_close, rand, run

pytestmark = pytest.mark.usefixtures("poisoned")
compiled = pytest.mark.parametrize("op", [name for name, op in RUNNING.items() if op.compiled], indirect=True)


@dataclass(frozen=True)
class Scene:
    """A row: its length and documents, how strong the decay is, whether a state comes in."""

    length: int
    docs: str
    decay: str = "mixed"
    initial: bool = True

    def inputs(self, name: str) -> tuple[Tensors, Documents | None]:
        tensors = CASES[name].inputs(self.length, DECAYS[self.decay])
        if not self.initial:
            tensors.pop("initial_state", None)
        return tensors, documents(self.docs, self.length)


SCENES = (
    Scene(0, "none"),
    Scene(0, "fresh"),
    Scene(1, "none"),
    Scene(1, "carried"),
    Scene(63, "fresh"),
    Scene(64, "edges"),
    Scene(65, "none"),
    Scene(65, "none", initial=False),
    Scene(130, "edges", initial=False),
    Scene(130, "carried", "weak"),
    Scene(130, "edges", "weak"),
    Scene(130, "none", "strong"),
    Scene(200, "edges", "strong"),
)
LONG = Scene(1000, "edges")
FIRST_CASES = {case.op: name for name, case in reversed(CASES.items())}.values()  # one of each op


@cache
def exact(name: str, scene: Scene) -> Tensors:
    """What the definition gives, in fp64."""
    return run(CASES[name].definition, *scene.inputs(name), CASES[name].outputs)


def same_bits(one: Tensors, other: Tensors) -> None:
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_every_op_has_a_case() -> None:
    affine = {name for name in ops.__all__ if isinstance(getattr(ops, name), ops.AffineOp)}
    assert {case.op for case in CASES.values()} >= library.registered().keys() | affine


@pytest.mark.parametrize("scene", SCENES, ids=lambda s: f"{s.length}-{s.docs}-{s.decay}" + "-zero" * (not s.initial))
def test_matches_definition(op: Running, scene: Scene) -> None:
    op.assert_matches(*scene.inputs(op.name), exact(op.name, scene))


@pytest.mark.parametrize("op", [name for name, op in RUNNING.items() if op.name in FIRST_CASES], indirect=True)
def test_a_long_row_matches_definition(op: Running) -> None:
    op.assert_matches(*LONG.inputs(op.name), exact(op.name, LONG))


def test_bf16_is_computed_in_fp32(op: Running) -> None:
    """Outputs are those of fp32, rounded once. Measured, worst: outputs 1.7e-3; gradients, some sums, 3.6e-3."""
    half, docs = op.case.in_bf16(op.case.inputs(70)), documents("edges", 70)
    found, whole = op.run(half, docs), op.run({name: tensor.float() for name, tensor in half.items()}, docs)
    for name in op.case.outputs if op.case.once else ():
        assert torch.equal(found[name], whole[name].to(found[name].dtype)), name
    assert all(found[f"grad_{name}"].dtype == tensor.dtype for name, tensor in half.items())
    expected = run(op.case.definition, {name: t.double() for name, t in half.items()}, docs, op.case.outputs)
    assert_close(found, {name: expected[name] for name in op.case.outputs}, 5e-3)
    assert_close(found, expected, 1.1e-2)


def test_strided_inputs_and_gradients(op: Running) -> None:
    """Other strides, and gradients of stride 0, give the bits of the contiguous ones."""
    tensors, docs = op.case.inputs(40), documents("edges", 40)
    found = []
    for strided in (False, True):
        leaves = {name: tensor.to(op.device, op.widest) for name, tensor in tensors.items()}
        if strided:
            leaves = {name: t.transpose(0, -1).contiguous().transpose(0, -1) for name, t in leaves.items()}
        leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
        outputs = op.case.call(leaves, docs and docs.to(op.device))
        ones = [torch.ones((), dtype=out.dtype, device=out.device).expand_as(out) for out in outputs]
        ones = ones if strided else [one.contiguous() for one in ones]
        grads = torch.autograd.grad(outputs, list(leaves.values()), ones)
        results = (*(out.detach() for out in outputs), *grads)
        found.append(dict(zip((*op.case.outputs, *leaves), results, strict=True)))
    if op.compiled:
        same_bits(*found)
    else:
        assert_close(found[1], found[0], 1e-14 if op.widest == torch.float64 else op.case.tolerance)


@pytest.mark.parametrize("op", [name for name, op in RUNNING.items() if op.case.chunks], indirect=True)
def test_chunk_does_not_change_the_function(op: Running) -> None:
    scene = Scene(70, "edges")
    tensors, docs = scene.inputs(op.name)
    for chunk in op.case.chunks:
        found = run(partial(op.case.call, chunk=chunk), tensors, docs, op.case.outputs)
        assert_close(found, exact(op.name, scene), 1e-14)


@pytest.mark.parametrize("op", [name for name, op in RUNNING.items() if op.takes(torch.float64)], indirect=True)
def test_gradcheck(op: Running) -> None:
    tensors, docs = op.case.inputs(19), documents("edges", 19)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]

    def call(*leaves: Tensor) -> Outputs:
        return op.case.call(dict(zip(tensors, leaves, strict=True)), docs)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


# --- documents ---

LENGTH, FIRST, LAST = 130, 37, 100  # the columns of our document, beside others


def ours(op: Running, tensors: Tensors, docs: Documents | None, columns: slice) -> tuple[Tensors, Tensors]:
    """Our columns of the outputs and of the gradients of a functional of theirs; all gradients."""
    leaves = {name: tensor.to(op.device).requires_grad_() for name, tensor in tensors.items()}
    outputs = dict(zip(op.case.outputs, op.case.call(leaves, docs and docs.to(op.device)), strict=True))
    mine = {name: out[:, columns] for name, out in outputs.items() if name != "state"}
    weights = [rand(*out.shape, seed=9 + i).to(out) for i, out in enumerate(mine.values())]
    found = torch.autograd.grad(list(mine.values()), list(leaves.values()), weights, materialize_grads=True)
    grads = dict(zip(leaves, found, strict=True))
    return mine | {f"grad_{n}": g[:, columns] for n, g in grads.items() if n not in op.case.whole}, grads


def test_documents_are_independent_to_the_bit(op: Running) -> None:
    """Other values beside our document and in the state, NaN included, change no bit of ours and get no gradient."""
    column = torch.arange(LENGTH)
    ids = ((column >= FIRST).int() + (column >= LAST).int()).expand(BATCH, LENGTH)
    docs, inside = Documents.from_ids(ids, torch.tensor([3, 0])), (column >= FIRST) & (column < LAST)
    tensors, others = ({n: t.float() for n, t in op.case.inputs(LENGTH, seed=seed).items()} for seed in (0, 1))

    def beside(others: Tensors) -> Tensors:
        def one(name: str) -> Tensor:
            if name in op.case.whole:
                return others[name] if name == "initial_state" else tensors[name]
            return torch.where(inside.view(-1, *[1] * (tensors[name].dim() - 2)), tensors[name], others[name])

        return {name: one(name) for name in tensors}

    columns = slice(FIRST, LAST)
    expected, grads = ours(op, tensors, docs, columns)
    for name, grad in grads.items():
        if name not in op.case.whole - {"initial_state"}:
            outside = grad if name == "initial_state" else grad[:, ~inside]
            assert (outside == 0).all(), name
    same_bits(expected, ours(op, beside(others), docs, columns)[0])
    if op.compiled or op.case.skips:
        nothing = {name: torch.full_like(tensor, float("nan")) for name, tensor in tensors.items()}
        same_bits(expected, ours(op, beside(nothing), docs, columns)[0])
    if op.compiled:
        alone = {n: t if n in op.case.whole else t[:, columns] for n, t in tensors.items() if n != "initial_state"}
        same_bits(expected, ours(op, alone, None, slice(None))[0])


def test_a_column_sees_its_document_up_to_itself(op: Running) -> None:
    """Column t has a gradient to column j iff ``0 <= t - j <= positions[t]``, and elsewhere exactly none."""
    length, docs = 40, documents("edges", 40)
    assert docs is not None
    tensors = op.case.inputs(length, 0.1)
    sees = None if op.case.sees is None else op.case.sees(tensors)
    leaves = {name: t.to(op.device, op.widest).requires_grad_() for name, t in tensors.items()}
    y = op.case.call(leaves, docs.to(op.device))[0]
    scored = (y * rand(*y.shape, seed=9).to(y)).flatten(2).sum(dim=2) if y.dim() > 2 else y
    for t in (0, 1, 4, 5, 14, 15, 16, 17, 31, 32, 39):
        grads = torch.autograd.grad(scored[:, t].sum(), list(leaves.values()), retain_graph=True, allow_unused=True)
        named = {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}
        reached = sum((g != 0).flatten(2).any(2) for n, g in named.items() if n not in op.case.whole).bool().cpu()
        distance = t - torch.arange(length)
        seen = (
            docs.positions()[:, t, None]
            if op.case.reach is None
            else docs.positions()[:, t, None].clamp(max=op.case.reach)
        )
        expected = (distance >= 0) & (distance <= seen)
        expected = expected if sees is None else expected & sees[:, t]
        assert torch.equal(reached, expected), f"column {t}"


# --- bits, and what torch asks of an op ---


@compiled
def test_same_bits_for_any_thread_count_and_again(op: Running) -> None:
    tensors = {name: tensor.float() for name, tensor in op.case.inputs(2000, batch=3).items()}
    docs, threads, results = documents("edges", 2000, batch=3), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append(op.run(tensors, docs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        same_bits(results[0], other)


class Kernels(TorchDispatchMode):
    """The calls of compiled kernels: name, function, arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "lmtrain":
            copies = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args)
            self.calls[func._opname] = func, copies
        return func(*args, **(kwargs or {}))


@compiled
@pytest.mark.parametrize("optional", [True, False], ids=["all", "least"])
def test_opcheck(op: Running, optional: bool) -> None:
    tensors = {name: tensor.float() for name, tensor in op.case.inputs(20).items()}
    if not optional:
        tensors.pop("initial_state", None)
    with Kernels() as kernels:
        op.run(tensors, documents("edges", 20) if optional else None)
    names = {name.removesuffix("_backward") for name in kernels.calls}
    assert len(kernels.calls) == 2 * len(names) > 0, "a forward and its backward"
    for name, (function, arguments) in kernels.calls.items():
        if not name.endswith("_backward"):
            arguments = tuple(
                a.requires_grad_(a.is_floating_point()) if isinstance(a, Tensor) else a for a in arguments
            )
        torch.library.opcheck(function, arguments)


@compiled
def test_compiles_whole_and_recomputes(op: Running) -> None:
    tensors, docs = {name: tensor.float() for name, tensor in op.case.inputs(40).items()}, documents("edges", 40)
    expected = op.run(tensors, docs)
    torch.compiler.reset()  # the cases share a function, which is compiled a few times only

    def recomputed(tensors: Tensors, docs: Documents | None) -> Outputs:
        return checkpoint(op.case.call, tensors, docs, use_reentrant=False)

    for call in (torch.compile(op.case.call, backend="aot_eager", fullgraph=True), recomputed):
        same_bits(expected, run(call, tensors, docs, op.case.outputs))


@pytest.mark.parametrize("case", AFFINE.values(), ids=AFFINE)
def test_cost_grows_with_the_row(case: Case) -> None:
    """And its bytes are those of the tokens' inputs and of y, in fp32, read and written once."""
    costs = []
    for length in (64, 128):
        tensors = case.inputs(length)
        shapes = [() if t is None else tuple(t.shape) for t in case.affine.arguments(tensors)]
        costs.append(case.affine.op.cost(*shapes if shapes[-1] else shapes[:-1]))
    short, long = costs
    tokens = [t for name, t in tensors.items() if name not in case.whole]
    assert long.bytes == 2 * short.bytes == 4 * sum(t.numel() for t in (*tokens, tokens[0]))
    assert 0 < long.model_flops == 2 * short.model_flops and 0 < long.executed_flops == 2 * short.executed_flops
