"""gla: every backend against the recurrence in fp64, documents, and the algebra by which spans compose."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmtrain.ops import Documents, library
from lmtrain.ops.gla import gla, recurrence
from tests.ops.scan_cases import (
    BATCH,
    DOCUMENTS,
    LENGTHS,
    Function,
    assert_close,
    documents,
    layouts,
    rand,
    run,
    shard,
    use,
)

HEADS, KEYS, VALUES = 3, 5, 7
TOKENS = ("v", "q", "k", "g")
DECAYS = {"weak": 1e-3, "mixed": 1.0, "strong": 50.0}
quick = settings(max_examples=30, deadline=None, derandomize=True)
reads = pytest.mark.parametrize("exclusive", [False, True], ids=["inclusive", "exclusive"])


def inputs(
    length: int, exclusive: bool, decay: float = 1.0, keys: int = KEYS, values: int = VALUES
) -> dict[str, Tensor]:
    tensors = {
        "v": rand(BATCH, length, HEADS, values, seed=1),
        "q": rand(BATCH, length, HEADS, keys, seed=2),
        "k": rand(BATCH, length, HEADS, keys, seed=3),
        "g": -decay * rand(BATCH, length, HEADS, keys, seed=4).abs(),
        "initial_state": rand(BATCH, HEADS, keys, values, seed=5),
    }
    return tensors | ({"u": rand(HEADS, keys, seed=6)} if exclusive else {})


def op(**static: Any) -> Function:
    def call(tensors: dict[str, Tensor], docs: Documents | None) -> tuple[Tensor, Tensor]:
        arguments = [tensors.get(name) for name in (*TOKENS, "u")]
        return gla(*arguments, docs=docs, initial_state=tensors.get("initial_state"), **static)

    return call


def definition(tensors: dict[str, Tensor], docs: Documents | None) -> tuple[Tensor, Tensor]:
    return recurrence(*(tensors[n] for n in TOKENS), tensors.get("u"), docs, tensors.get("initial_state"))


@pytest.fixture(params=["reference", "cpu"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return use(monkeypatch, "gla", request.param)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> str:
    return use(monkeypatch, "gla", "cpu")


def both_precisions(tensors: dict[str, Tensor], docs: Documents | None, function: Function) -> None:
    """Measured, worst over these tests: fp64 1e-15, fp32 4e-7 (the gradient of g; all others 3e-7)."""
    single = {name: tensor.float() for name, tensor in tensors.items()}
    expected = run(definition, tensors, docs)
    assert_close(run(function, tensors, docs), expected, 1e-14)
    assert_close(run(function, single, docs), run(definition, {n: t.double() for n, t in single.items()}, docs), 1e-6)


@reads
@pytest.mark.parametrize("docs", DOCUMENTS)
@pytest.mark.parametrize("length", LENGTHS)
def test_matches_recurrence(kernels: str, length: int, docs: str, exclusive: bool) -> None:
    tensors, documented = inputs(length, exclusive), documents(docs, length)
    both_precisions(tensors, documented, op())
    del tensors["initial_state"]
    assert_close(run(op(), tensors, documented), run(definition, tensors, documented), 1e-14)


@reads
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("docs", ["none", "edges"])
def test_decays(kernels: str, decay: str, docs: str, exclusive: bool) -> None:
    both_precisions(inputs(200, exclusive, DECAYS[decay]), documents(docs, 200, chunk=16), op())


@reads
@pytest.mark.parametrize(("keys", "values"), [(1, 1), (4, 33), (17, 16), (64, 20)])
def test_sizes(kernels: str, keys: int, values: int, exclusive: bool) -> None:
    both_precisions(inputs(70, exclusive, keys=keys, values=values), documents("edges", 70), op())


@pytest.mark.parametrize("chunk", [1, 7, 63, 100])
def test_chunk_does_not_change_the_function(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "gla", "reference")
    tensors, docs = inputs(70, exclusive=True), documents("edges", 70, chunk=16)
    assert_close(run(op(chunk=chunk), tensors, docs), run(definition, tensors, docs), 1e-14)


@reads
def test_a_decay_of_zero_drops_even_infinity(kernels: str, exclusive: bool) -> None:
    tensors = inputs(40, exclusive)
    tensors["g"][:, 20] = -float("inf")
    _, expected = definition(tensors, None)
    tensors["initial_state"].fill_(float("inf"))
    torch.testing.assert_close(op()(tensors, None)[1], expected)


@reads
def test_gradcheck(kernels: str, exclusive: bool) -> None:
    tensors, docs = inputs(19, exclusive, keys=2, values=3), documents("edges", 19, chunk=5)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]

    def function(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return op(chunk=4)(dict(zip(tensors, leaves, strict=True)), docs)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@reads
def test_opcheck(compiled: str, exclusive: bool) -> None:
    tensors, docs = {n: t.float() for n, t in inputs(20, exclusive).items()}, documents("edges", 20)
    assert docs is not None
    leaves = [tensors[name].requires_grad_() for name in TOKENS]
    arguments = (*leaves, None, None, None)
    if exclusive:
        arguments = (*leaves, tensors["u"].requires_grad_(), docs.starts(), tensors["initial_state"].requires_grad_())
    torch.library.opcheck(torch.ops.lmtrain.gla.default, arguments)
    grads = (torch.randn(BATCH, 20, HEADS, VALUES), torch.randn(BATCH, HEADS, KEYS, VALUES))
    detached = [None if t is None else t.detach() for t in arguments]
    torch.library.opcheck(torch.ops.lmtrain.gla_backward.default, (*grads, *detached))


def test_compiles_and_recomputes(compiled: str) -> None:
    tensors, docs = {n: t.float() for n, t in inputs(40, exclusive=True).items()}, documents("edges", 40)
    expected = run(op(), tensors, docs)
    whole = torch.compile(op(), backend="aot_eager", fullgraph=True)

    def recomputed(tensors: dict[str, Tensor], docs: Documents | None) -> tuple[Tensor, Tensor]:
        return torch.utils.checkpoint.checkpoint(op(), tensors, docs, use_reentrant=False)

    for function in (whole, recomputed):
        found = run(function, tensors, docs)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_bf16_values_and_fp32_state(kernels: str) -> None:
    tensors, docs = inputs(130, exclusive=True), documents("edges", 130)
    full = ("g", "u", "initial_state")
    half = {name: t.float() if name in full else t.bfloat16() for name, t in tensors.items()}
    found, exact = run(op(), half, docs), run(op(), {name: t.float() for name, t in half.items()}, docs)
    assert found["y"].dtype == torch.bfloat16 and found["state"].dtype == torch.float32
    assert torch.equal(found["state"], exact["state"]) and torch.equal(found["y"], exact["y"].bfloat16())
    assert_close(found, run(definition, {name: t.double() for name, t in half.items()}, docs), 2e-2)


def test_same_bits_for_any_thread_count(compiled: str) -> None:
    sizes = {"keys": 32, "values": 32}  # enough work for several threads
    tensors, docs = {n: t.float() for n, t in inputs(500, True, **sizes).items()}, documents("edges", 500)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(op(), tensors, docs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_strided_inputs_and_gradients(compiled: str) -> None:
    tensors, docs = inputs(40, exclusive=True), documents("edges", 40)
    strided = {name: tensor.transpose(0, -1).contiguous().transpose(0, -1) for name, tensor in tensors.items()}
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    found = []
    for layout in (tensors, strided):
        leaves = {name: tensor.requires_grad_() for name, tensor in layout.items()}
        y, state = op()(leaves, docs)
        found.append(torch.autograd.grad(y.sum() + state.sum(), list(leaves.values())))  # gradients of stride 0
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@reads
def test_documents_are_independent_to_the_bit(kernels: str, exclusive: bool) -> None:
    """Columns 37 to 99 are ours; what lies beside them, NaN included if compiled, changes no bit and no gradient."""
    docs = Documents.from_ids(
        (torch.arange(130) >= 37).int().add((torch.arange(130) >= 100).int()).expand(BATCH, 130), torch.tensor([3, 0])
    )

    def ours(fill: float) -> list[Tensor]:
        leaves = {name: tensor.float() for name, tensor in inputs(130, exclusive).items()}
        for name in TOKENS:
            leaves[name][:, :37], leaves[name][:, 100:] = fill, fill
        leaves["g"][:, 37] = fill  # acts on nothing
        leaves["initial_state"].fill_(fill)
        leaves = {name: tensor.requires_grad_() for name, tensor in leaves.items()}
        mine = op()(leaves, docs)[0][:, 37:100]
        total = (mine * rand(*mine.shape, seed=9).float()).sum()
        grads = torch.autograd.grad(total, [leaves[name] for name in TOKENS])
        if fill == fill:  # a NaN's own gradient may be NaN
            assert not any((grad[:, :37] != 0).any() or (grad[:, 100:] != 0).any() for grad in grads)
        return [mine, *(grad[:, 37:100] for grad in grads)]

    expected = ours(0.0)
    for fill in (-3.0, float("nan")) if kernels == "cpu" else (-3.0,):
        found = ours(fill)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@reads
def test_a_packed_document_has_the_bits_of_one_alone(compiled: str, exclusive: bool) -> None:
    tensors = {name: tensor.float() for name, tensor in inputs(120, exclusive).items()}
    ids = torch.zeros(BATCH, 120, dtype=torch.int32)
    ids[:, 37:] = 1
    y, state = op()(tensors, Documents.from_ids(ids, torch.tensor([0, 5])))
    alone = {n: t[:, 37:] if n in TOKENS else t for n, t in tensors.items() if n != "initial_state"}
    y_alone, state_alone = op()(alone, None)
    assert torch.equal(y[:, 37:], y_alone) and torch.equal(state, state_alone)


@reads
def test_later_tokens_have_no_gradient_at_all(kernels: str, exclusive: bool) -> None:
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs(50, exclusive).items()}
    y, _ = op()(leaves, documents("edges", 50, chunk=40))
    for column in (0, 15, 16, 30, 48):
        grads = torch.autograd.grad(y[:, column].sum(), [leaves[n] for n in TOKENS], retain_graph=True)
        assert not any((grad[:, column + 1 :] != 0).any() for grad in grads)


# --- spans: what ranks and segments rely on ---


@reads
@quick
@given(docs=layouts(), data=st.data())
def test_spans_fold_to_the_row(exclusive: bool, docs: Documents, data: st.DataObject) -> None:
    """(gamma, state) of spans compose to those of the row, grouped either way; ``correct`` adds what came in."""
    length = docs.shape[1]
    borders = sorted({0, length, *data.draw(st.lists(st.integers(0, length), max_size=2))})
    tensors = inputs(length, exclusive)
    row = [tensors.get(name) for name in (*TOKENS, "u")]
    y, final = gla(*row, docs=docs, initial_state=tensors["initial_state"])
    incoming = carried = tensors["initial_state"]
    corrected, split, spans = [], [], []
    for first, last in itertools.pairwise(borders):
        part, documented = [t[:, first:last] for t in row[:4] if t is not None] + row[4:], shard(docs, first, last)
        out, carried = gla(*part, docs=documented, initial_state=carried)
        split.append(out)
        local, state = gla(*part, docs=documented)
        spans.append((gla.gamma(*part, docs=documented), state))
        corrected.append(gla.correct(local, *part, docs=documented, incoming=incoming))
        incoming = gla.apply(spans[-1][0], incoming) + state
    for parts in (split, corrected):
        torch.testing.assert_close(torch.cat(parts, dim=1), y, rtol=1e-12, atol=1e-12)
    for state in (carried, incoming):
        torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)

    def compose(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return left[0] * right[0], gla.apply(right[0], left[1]) + right[1]

    expected = gla.gamma(*row, docs=docs), gla(*row, docs=docs)[1]
    from_left, from_right = spans[0], spans[-1]
    for span in spans[1:]:
        from_left = compose(from_left, span)
    for span in reversed(spans[:-1]):
        from_right = compose(span, from_right)
    for found in (from_left, from_right):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@reads
def test_correct_has_the_gradients_of_the_op(exclusive: bool) -> None:
    def corrected(tensors: dict[str, Tensor], docs: Documents | None) -> tuple[Tensor, Tensor]:
        assert docs is not None
        y, state = op()({name: t for name, t in tensors.items() if name != "initial_state"}, docs)
        row = [tensors.get(name) for name in (*TOKENS, "u")]
        state = gla.apply(gla.gamma(*row, docs=docs), gla.drop(tensors["initial_state"], docs.before)) + state
        return gla.correct(y, *row, docs=docs, incoming=tensors["initial_state"]), state

    for kind in ("carried", "edges"):
        tensors, docs = inputs(30, exclusive), documents(kind, 30, chunk=20)
        assert_close(run(corrected, tensors, docs), run(definition, tensors, docs), 1e-14)


def test_reverse_fold_is_the_gradient_of_the_fold() -> None:
    gamma = rand(BATCH, HEADS, KEYS, seed=1).requires_grad_()
    state = rand(BATCH, HEADS, KEYS, VALUES, seed=2).requires_grad_()
    grad = rand(BATCH, HEADS, KEYS, VALUES, seed=3)
    by_gamma, by_state = torch.autograd.grad(gla.apply(gamma, state), (gamma, state), grad)
    torch.testing.assert_close(gla.outer(grad, state), by_gamma)
    torch.testing.assert_close(gla.transpose(gamma, grad), by_state)
    assert (gla.apply(torch.zeros_like(gamma), state / 0) == 0).all()


@reads
def test_steps_are_the_parallel_form(exclusive: bool) -> None:
    tensors = inputs(40, exclusive)
    y, final = op()(tensors, None)
    state, outputs = tensors["initial_state"], []
    for t in range(40):
        out, state = gla.step(*(tensors[name][:, t] for name in TOKENS), tensors.get("u"), state=state)
        outputs.append(out)
    torch.testing.assert_close(torch.stack(outputs, dim=1), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("argument", "value", "says"),
    [
        ("v", torch.zeros(2, 7, 4), r"v: expected shape \[\*, \*, \*, \*\], got \[2, 7, 4\]"),
        ("v", torch.zeros(2, 7, 3, 7, dtype=torch.int64), "v: expected a floating dtype, got torch.int64"),
        ("q", torch.zeros(2, 6, 3, 5), r"q: expected shape \[2, 7, 3, \*\], got \[2, 6, 3, 5\]"),
        ("k", torch.zeros(2, 7, 3, 4), r"k: expected shape \[2, 7, 3, 5\], got \[2, 7, 3, 4\]"),
        ("g", torch.zeros(2, 7, 3), r"g: expected shape \[2, 7, 3, 5\], got \[2, 7, 3\]"),
        ("u", torch.zeros(3, 4), r"u: expected shape \[3, 5\], got \[3, 4\]"),
        ("g", torch.zeros(2, 7, 3, 5, device="meta"), "g: expected device cpu as v, got meta"),
        ("initial_state", torch.zeros(2, 3, 7, 5), r"initial_state: expected shape \[2, 3, 5, 7\], got \[2, 3, 7, 5\]"),
    ],
)
def test_bad_input_is_one_line(argument: str, value: Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=f"^gla: {says}$"):
        op()(inputs(7, exclusive=True) | {argument: value}, documents("fresh", 7))


def test_bad_static_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^gla: chunk: expected at least 1, got 0$"):
        op(chunk=0)(inputs(7, exclusive=True), None)
    with pytest.raises(ValueError, match=r"^gla: exclusive: expected False, as u says, got True$"):
        op(exclusive=True)(inputs(7, exclusive=False), None)
    with pytest.raises(ValueError, match=r"^gla: inputs: expected \(v, q, k, g, u\), of which u may be None$"):
        gla(torch.zeros(1, 2, 3, 4))


def test_cost_is_of_the_definition() -> None:
    shapes = ((1, 64, 4, 3), (1, 64, 4, 5))
    assert gla.cost(*shapes).model_flops == 64 * 4 * 5 * 3 * 5
    assert gla.cost(*shapes, chunk=8).executed_flops < gla.cost(*shapes).executed_flops
    assert library.backend("gla", "cpu", torch.float32) in ("cpu", "reference")
