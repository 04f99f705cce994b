"""diag_scan: every backend against the fp64 recurrence, documents, and the algebra by which spans compose."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from lmtrain.ops import Documents
from lmtrain.ops.diag_scan import diag_scan, recurrence
from tests.ops.scan_cases import BATCH, DOCUMENTS, LENGTHS, assert_close, documents, layouts, rand, run, shard, use

NAMES = ("x", "log_a", "initial_state")


@pytest.fixture(params=("reference", "cpu"))
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return use(monkeypatch, "diag_scan", request.param)


def inputs(length: int, channels: int = 5, decay: float = 1.0, batch: int = BATCH) -> dict[str, Tensor]:
    return {
        "x": rand(batch, length, channels, seed=1),
        "log_a": -decay * rand(batch, length, channels, seed=2).abs(),
        "initial_state": rand(batch, channels, seed=3),
    }


def call(tensors: dict[str, Tensor], docs: Documents | None) -> tuple[Tensor, Tensor]:
    return diag_scan(tensors["x"], tensors["log_a"], docs=docs, initial_state=tensors.get("initial_state"))


def definition(tensors: dict[str, Tensor], docs: Documents | None) -> tuple[Tensor, Tensor]:
    return recurrence(tensors["x"], tensors["log_a"], docs, tensors.get("initial_state"))


def both_precisions(tensors: dict[str, Tensor], docs: Documents | None) -> None:
    single = {name: tensor.float() for name, tensor in tensors.items()}
    exact = {name: tensor.double() for name, tensor in single.items()}
    assert_close(run(call, single, docs), run(definition, exact, docs), 1e-6)
    assert_close(run(call, tensors, docs), run(definition, tensors, docs), 1e-13)


@pytest.mark.parametrize("docs", DOCUMENTS)
@pytest.mark.parametrize("length", LENGTHS)
def test_matches_recurrence(kernels: str, length: int, docs: str) -> None:
    tensors = inputs(length)
    both_precisions(tensors, documents(docs, length))
    del tensors["initial_state"]
    both_precisions(tensors, documents(docs, length))


@pytest.mark.parametrize("decay", [1e-3, 50.0])
@pytest.mark.parametrize("channels", [1, 16, 300])
def test_decays_and_sizes(kernels: str, decay: float, channels: int) -> None:
    both_precisions(inputs(100, channels, decay), documents("edges", 100))


def test_gradcheck(kernels: str) -> None:
    leaves = [tensor.requires_grad_() for tensor in inputs(7).values()]
    docs = documents("edges", 7, chunk=3)
    assert torch.autograd.gradcheck(lambda x, log_a, s: diag_scan(x, log_a, docs=docs, initial_state=s), leaves)


@pytest.mark.parametrize("optional", [True, False])
def test_opcheck(optional: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "diag_scan", "cpu")
    x, log_a, initial = (tensor.float().requires_grad_() for tensor in inputs(70).values())
    docs = documents("edges", 70)
    assert docs is not None
    extra = (docs.starts(), initial) if optional else (None, None)
    torch.library.opcheck(torch.ops.lmtrain.diag_scan.default, (x, log_a, *extra))
    detached = [None if t is None else t.detach() for t in (x, log_a, *extra)]
    grads = (torch.randn(BATCH, 70, 5), torch.randn(BATCH, 5))
    torch.library.opcheck(torch.ops.lmtrain.diag_scan_backward.default, (*grads, *detached))


def test_bf16_values_are_computed_in_fp32(kernels: str) -> None:
    tensors, docs = inputs(130), documents("edges", 130)
    half = {name: t.bfloat16() if name == "x" else t.float() for name, t in tensors.items()}
    got, full = run(call, half, docs), run(call, {name: t.float() for name, t in half.items()}, docs)
    assert got["y"].dtype == torch.bfloat16 and got["state"].dtype == torch.float32
    assert torch.equal(got["y"], full["y"].bfloat16()) and torch.equal(got["state"], full["state"])


def test_same_bits_for_any_thread_count(kernels: str) -> None:
    tensors, docs = {name: t.float() for name, t in inputs(150, 700).items()}, documents("edges", 150)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(run(call, tensors, docs))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_strided_inputs_and_gradients(kernels: str) -> None:
    tensors, docs = inputs(70), documents("edges", 70)
    strided = {n: t.transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for n, t in tensors.items()}
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    gradients = []
    for layout, expand in ((strided, True), (leaves, False)):
        outs = call(layout, docs)
        outs = tuple(out.sum() for out in outs) if expand else outs  # the gradients of sums have stride 0
        gradients.append(torch.autograd.grad(outs, list(layout.values()), [torch.ones_like(out) for out in outs]))
    for got, expected in zip(*gradients, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("before", [0, 3])
def test_a_packed_document_has_the_bits_of_one_alone(kernels: str, before: int) -> None:
    tensors = {name: t.float() for name, t in inputs(200, batch=1).items()}
    ids = ((torch.arange(200) >= 37).int() + (torch.arange(200) >= 137).int())[None]
    y, state = call(tensors, Documents.from_ids(ids, torch.tensor([before])))
    for first, last in ((0, 37), (37, 137), (137, 200)):
        initial = tensors["initial_state"] if first == 0 and before > 0 else None
        alone, final = diag_scan(tensors["x"][:, first:last], tensors["log_a"][:, first:last], initial_state=initial)
        assert torch.equal(alone, y[:, first:last])
    assert torch.equal(final, state)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_another_document_never_leaks(kernels: str, poison: float) -> None:
    """Not even NaN: columns 0-69, 90-99 and the state belong to others; our first log_a acts on nothing."""
    docs = Documents.from_ids(((torch.arange(100) >= 70).int() + (torch.arange(100) >= 90).int())[None])

    def ours(fill: float) -> list[Tensor]:
        leaves = {name: t.float() for name, t in inputs(100, batch=1).items()}
        for name in ("x", "log_a"):
            leaves[name][:, :70], leaves[name][:, 90:] = fill, fill
        leaves["log_a"][:, 70], leaves["initial_state"][:] = fill, fill
        leaves = {name: tensor.requires_grad_() for name, tensor in leaves.items()}
        y, _ = call(leaves, docs)
        *grads, initial = torch.autograd.grad(y[:, 70:90].sum(), list(leaves.values()))
        assert torch.equal(initial, torch.zeros_like(initial))
        return [y[:, 70:90], *(grad[:, 70:90] for grad in grads)]

    for got, expected in zip(ours(poison), ours(0.0), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("log_a", [-float("inf"), -200.0])
def test_a_decay_of_zero_drops_even_infinity(kernels: str, log_a: float) -> None:
    tensors = {name: t.float() for name, t in inputs(70).items()}
    tensors["log_a"][:, 66] = log_a
    states = [call(tensors | {"initial_state": torch.full((BATCH, 5), f)}, None)[1] for f in (0.0, float("inf"))]
    assert torch.equal(*states)


# --- spans: what ranks and segments rely on ---


@settings(max_examples=25, deadline=None, derandomize=True)
@given(docs=layouts())
def test_spans_fold_to_the_row(docs: Documents) -> None:
    """Carried over cuts, corrected after them, or folded by either grouping: the row in one pass."""
    length = docs.shape[1]
    tensors = inputs(length)
    x, log_a, initial = tensors.values()
    y, final = call(tensors, docs)
    cuts = sorted({0, length // 3, length // 2, length})
    carried = folded = initial
    outs, corrected, spans = [], [], []
    for first, last in pairwise(cuts):
        part, here = (x[:, first:last], log_a[:, first:last]), shard(docs, first, last)
        out, carried = diag_scan(*part, docs=here, initial_state=carried)
        local, state = diag_scan(*part, docs=here)
        gamma = diag_scan.gamma(*part, docs=here)
        outs.append(out)
        corrected.append(diag_scan.correct(local, *part, docs=here, incoming=folded))
        folded = diag_scan.apply(gamma, folded) + state
        spans.append((gamma, state))

    def compose(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return left[0] * right[0], diag_scan.apply(right[0], left[1]) + right[1]

    from_left, from_right = spans[0], spans[-1]
    for span in spans[1:]:
        from_left = compose(from_left, span)
    for span in reversed(spans[:-1]):
        from_right = compose(span, from_right)
    whole = diag_scan.gamma(x, log_a, docs=docs), diag_scan(x, log_a, docs=docs)[1]
    pairs = [(torch.cat(outs, 1), y), (torch.cat(corrected, 1), y), (carried, final), (folded, final)]
    pairs += [*zip(from_left, whole, strict=True), *zip(from_right, whole, strict=True)]
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert ((whole[0] == 0) == docs.starts().any(dim=1)[:, None]).all()


def test_correct_and_gamma_have_the_gradients_of_the_op(kernels: str) -> None:
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs(20).items()}
    x, log_a, initial = leaves.values()
    docs = documents("carried", 20)
    expected = call(leaves, docs)
    y, state = diag_scan(x, log_a, docs=docs)
    corrected = diag_scan.correct(y, x, log_a, docs=docs, incoming=initial)
    final = diag_scan.apply(diag_scan.gamma(x, log_a, docs=docs), initial) + state
    weights = [rand(*out.shape, seed=7) for out in expected]
    got = torch.autograd.grad((corrected, final), list(leaves.values()), weights)
    for one, other in zip(got, torch.autograd.grad(expected, list(leaves.values()), weights), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_reverse_fold_is_the_gradient_of_the_fold() -> None:
    gamma, state, grad = (rand(BATCH, 3, seed=seed).requires_grad_() for seed in range(3))
    by_gamma, by_state = torch.autograd.grad(diag_scan.apply(gamma, state), (gamma, state), grad)
    torch.testing.assert_close(diag_scan.outer(grad, state), by_gamma)
    torch.testing.assert_close(diag_scan.transpose(gamma, grad), by_state)
    infinite = torch.full((1, 2), float("inf"))
    assert diag_scan.apply(torch.tensor([[0.0, 1.0]]), infinite).tolist() == [[0.0, float("inf")]]


def test_steps_are_the_parallel_form(kernels: str) -> None:
    tensors = inputs(9)
    y, final = call(tensors, None)
    state, outs = tensors["initial_state"], []
    for t in range(9):
        out, state = diag_scan.step(tensors["x"][:, t], tensors["log_a"][:, t], state=state)
        outs.append(out)
    torch.testing.assert_close(torch.stack(outs, dim=1), y, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(state, final, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("argument", "value", "says"),
    [
        ("x", torch.zeros(2, 7), r"x: expected shape \[\*, \*, \*\], got \[2, 7\]"),
        ("x", torch.zeros(2, 7, 5, dtype=torch.int64), "x: expected a floating dtype, got torch.int64"),
        ("log_a", torch.zeros(2, 7, 4), r"log_a: expected shape \[2, 7, 5\], got \[2, 7, 4\]"),
        ("initial_state", torch.zeros(2, 4), r"initial_state: expected shape \[2, 5\], got \[2, 4\]"),
        ("log_a", torch.zeros(2, 7, 5, device="meta"), "log_a: expected device cpu as x, got meta"),
    ],
)
def test_bad_input_is_one_line(argument: str, value: Tensor, says: str) -> None:
    tensors = {name: t.float() for name, t in inputs(7).items()}
    with pytest.raises(ValueError, match=f"^diag_scan: {says}$"):
        call(tensors | {argument: value}, None)
    with pytest.raises(ValueError, match=r"^diag_scan: inputs: expected \(x, log_a\)$"):
        diag_scan(tensors["x"])


def test_cost_counts_the_channels() -> None:
    assert diag_scan.cost((2, 7, 5), (2, 7, 5)).model_flops == 3 * 2 * 7 * 5
