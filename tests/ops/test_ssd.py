"""ssd: every backend against the recurrence in fp64, documents, and the algebra by which spans compose."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmtrain.errors import UsageError
from lmtrain.ops import Documents, library, ssd
from lmtrain.ops.ssd import recurrence

BACKENDS = ("reference", "cpu")
BATCH, HEADS, WIDTH, STATE = 2, 4, 3, 5
NAMES = ("x", "log_a", "b", "c", "initial_state")
LENGTHS = (0, 1, 63, 64, 65, 200)
DECAYS = {"weak": 1e-3, "mixed": 1.0, "strong": 50.0}  # strong: e^-50 a token, a chunk underflows to 0
quick = settings(max_examples=40, deadline=None, derandomize=True)


def rand(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(length: int, groups: int = 2, decay: float = 1.0, initial: bool = True) -> dict[str, Tensor]:
    tensors = {
        "x": rand(BATCH, length, HEADS, WIDTH, seed=1),
        "log_a": -decay * rand(BATCH, length, HEADS, seed=2).abs(),
        "b": rand(BATCH, length, groups, STATE, seed=3),
        "c": rand(BATCH, length, groups, STATE, seed=4),
    }
    return tensors | ({"initial_state": rand(BATCH, HEADS, STATE, WIDTH, seed=5)} if initial else {})


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


def call(tensors: dict[str, Tensor], docs: Documents | None, chunk: int | None) -> tuple[Tensor, Tensor]:
    """The op; chunk None: the recurrence."""
    *given_inputs, initial = (tensors.get(name) for name in NAMES)
    if chunk is None:
        x, log_a, b, c = (t for t in given_inputs if t is not None)
        return recurrence(x, log_a, b, c, docs, initial)
    return ssd(*given_inputs, docs=docs, initial_state=initial, chunk=chunk)


def run(tensors: dict[str, Tensor], docs: Documents | None, chunk: int | None) -> dict[str, Tensor]:
    """y, final state and the gradients of a random functional of both."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    y, state = call(leaves, docs, chunk)
    weights = [rand(*out.shape, seed=9 + i, dtype=out.dtype) for i, out in enumerate((y, state))]
    total = sum((out * weight).sum() for out, weight in zip((y, state), weights, strict=True))
    grads = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True, allow_unused=True)
    return {"y": y.detach(), "state": state.detach()} | {
        f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)
    }


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Within ``tolerance`` of the largest element of each tensor."""
    for name, want in expected.items():
        assert got[name].shape == want.shape, name
        if want.numel():
            error = (got[name].double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1)
            assert error < tolerance, f"{name}: relative error {float(error):.1e}"


@pytest.fixture(params=BACKENDS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("LMTRAIN_KERNELS", request.param)
    try:
        library.backend("ssd", "cpu", torch.float64)
    except UsageError as refused:
        pytest.skip(str(refused))
    return str(request.param)


@pytest.mark.parametrize("docs", ["none", "fresh", "carried", "edges"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("initial", [True, False], ids=["initial", "none"])
def test_matches_recurrence(kernels: str, length: int, docs: str, initial: bool) -> None:
    tensors, documented = inputs(length, initial=initial), documents(docs, length)
    assert_close(run(tensors, documented, 64), run(tensors, documented, None), 1e-12)


@pytest.mark.parametrize("chunk", [1, 2, 16, 63, 100, 256])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_chunk_does_not_change_the_function(kernels: str, chunk: int, groups: int) -> None:
    tensors, docs = inputs(100, groups), documents("edges", 100, chunk=max(chunk, 16))
    assert_close(run(tensors, docs, chunk), run(tensors, docs, None), 1e-12)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("docs", ["none", "edges"])
def test_decays(kernels: str, decay: str, docs: str) -> None:
    tensors, documented = inputs(200, decay=DECAYS[decay]), documents(docs, 200)
    found = run(tensors, documented, 64)
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert_close(found, run(tensors, documented, None), 1e-11)
    single = {name: tensor.float() for name, tensor in tensors.items()}
    assert_close(run(single, documented, 64), run({n: t.double() for n, t in single.items()}, documented, None), 2e-4)


def test_gradcheck(kernels: str) -> None:
    tensors = [tensor.requires_grad_() for tensor in inputs(7).values()]
    docs = documents("edges", 7, chunk=3)

    def op(x: Tensor, log_a: Tensor, b: Tensor, c: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
        return ssd(x, log_a, b, c, docs=docs, initial_state=initial, chunk=3)

    assert torch.autograd.gradcheck(op, tensors)


def test_bf16_values_and_fp32_state(kernels: str) -> None:
    """The values and keys in bf16, decays in fp32: computed in fp32 and rounded once."""
    tensors, docs = inputs(130), documents("edges", 130)
    half = {name: t.float() if name in ("log_a", "initial_state") else t.bfloat16() for name, t in tensors.items()}
    found = run(half, docs, 64)
    assert found["y"].dtype == torch.bfloat16 and found["state"].dtype == torch.float32
    exact = run({name: t.float() for name, t in half.items()}, docs, 64)
    assert torch.equal(found["state"], exact["state"])
    assert torch.equal(found["y"], exact["y"].bfloat16())
    assert_close(found, run({name: t.double() for name, t in half.items()}, docs, None), 2e-2)


@pytest.mark.parametrize("length", [10, 130])
def test_documents_are_independent_to_the_bit(kernels: str, length: int) -> None:
    """Other values in the documents before and after, and in the initial state, change no bit of ours."""
    first, last = length // 3, length // 3 + length // 2
    ids = torch.zeros(BATCH, length, dtype=torch.int32)
    ids[:, first], ids[:, last] = 1, 1
    docs = Documents.from_ids(ids.cumsum(1), torch.tensor([3, 0]))
    tensors = {name: tensor.float() for name, tensor in inputs(length).items()}
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, tensor in changed.items():
        if name == "initial_state":
            tensor.mul_(-7)
        else:
            tensor[:, :first] = tensor[:, :first] * 3 - (1 if name == "log_a" else -1)
            tensor[:, last:] = tensor[:, last:] * 5 - (1 if name == "log_a" else -1)

    def ours(given_tensors: dict[str, Tensor]) -> list[Tensor]:
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in given_tensors.items()}
        y, _ = call(leaves, docs, 64)
        mine = y[:, first:last]
        grads = torch.autograd.grad((mine * rand(*mine.shape, seed=9).float()).sum(), list(leaves.values()))
        for name, grad in zip(leaves, grads, strict=True):
            outside = grad if name == "initial_state" else torch.cat([grad[:, :first], grad[:, last:]], dim=1)
            assert (outside == 0).all(), name
        return [mine.detach(), *(grad[:, first:last] for grad in grads[:-1])]

    for one, other in zip(ours(tensors), ours(changed), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("docs", ["none", "edges"])
def test_later_tokens_have_no_gradient_at_all(kernels: str, docs: str) -> None:
    """Exactly 0, where sums of differences would leave a rounding error."""
    tensors, documented = inputs(70), documents(docs, 70, chunk=16)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    y, _ = call(leaves, documented, 16)
    for column in (0, 14, 15, 16, 17, 40, 63, 64, 68):
        grads = torch.autograd.grad(y[:, column].sum(), list(leaves.values()), retain_graph=True)
        for name, grad in zip(NAMES[:4], grads, strict=False):
            assert (grad[:, column + 1 :] == 0).all(), f"{name} after column {column}"


def test_a_row_that_starts_a_document_drops_any_initial_state(kernels: str) -> None:
    tensors, docs = inputs(20), documents("fresh", 20)
    expected = run({name: t for name, t in tensors.items() if name != "initial_state"}, docs, 8)
    for fill in (1.0, float("inf"), float("nan")):
        filled = tensors | {"initial_state": torch.full_like(tensors["initial_state"], fill)}
        found = run(filled, docs, 8)
        assert (found.pop("grad_initial_state") == 0).all()
        assert all(torch.equal(found[name], expected[name]) for name in found)
        part = [filled[name] for name in NAMES[:4]]
        corrected = ssd.correct(expected["y"], *part, docs=docs, incoming=filled["initial_state"])
        assert torch.equal(corrected, expected["y"])


# --- spans: what ranks and segments rely on ---


def segment(tensors: dict[str, Tensor], docs: Documents, first: int, last: int) -> tuple[list[Tensor], Documents]:
    """The inputs and documents of ``[first, last)``."""
    part = [tensors[name][:, first:last] for name in NAMES[:4]]
    before = docs.positions()[:, first] if first < docs.shape[1] else torch.ones(BATCH, dtype=torch.int32)
    return part, Documents.from_ids(docs.ids[:, first:last], before)


@st.composite
def layouts(draw: st.DrawFn) -> Documents:
    length = draw(st.integers(1, 20))
    starts = draw(st.lists(st.sets(st.integers(0, length - 1), max_size=3), min_size=BATCH, max_size=BATCH))
    ids = torch.zeros(BATCH, length, dtype=torch.int32)
    for row, columns in enumerate(starts):
        ids[row, sorted(columns)] = 1
    return Documents.from_ids(ids.cumsum(1), torch.tensor(draw(st.lists(st.integers(0, 2), min_size=2, max_size=2))))


@quick
@given(docs=layouts(), data=st.data())
def test_split_anywhere_is_one_pass(docs: Documents, data: st.DataObject) -> None:
    length = docs.shape[1]
    cut = data.draw(st.integers(0, length))
    tensors = inputs(length)
    y, final = ssd(*(tensors[n] for n in NAMES[:4]), docs=docs, initial_state=tensors["initial_state"], chunk=4)
    state, parts = tensors["initial_state"], []
    for first, last in ((0, cut), (cut, length)):
        part, documented = segment(tensors, docs, first, last)
        if first < last:
            out, state = ssd(*part, docs=documented, initial_state=state, chunk=4)
            parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=1), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


@quick
@given(docs=layouts(), data=st.data())
def test_spans_fold_to_the_final_state(docs: Documents, data: st.DataObject) -> None:
    """(gamma, state) of spans compose to those of the row, grouped either way; ``correct`` adds what came in."""
    length = docs.shape[1]
    borders = sorted(data.draw(st.lists(st.integers(0, length), min_size=2, max_size=2)))
    tensors = inputs(length)
    incoming = tensors["initial_state"]
    spans, corrected = [], []
    for first, last in zip((0, *borders), (*borders, length), strict=True):
        if first == last:
            continue
        part, documented = segment(tensors, docs, first, last)
        y, state = ssd(*part, docs=documented, chunk=4)
        gamma = ssd.gamma(*part, docs=documented)
        corrected.append(ssd.correct(y, *part, docs=documented, incoming=incoming))
        spans.append((gamma, state))
        incoming = ssd.apply(gamma, incoming) + state
    whole = [tensors[name] for name in NAMES[:4]]
    y, final = ssd(*whole, docs=docs, initial_state=tensors["initial_state"], chunk=4)
    torch.testing.assert_close(incoming, final, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat(corrected, dim=1), y, rtol=1e-12, atol=1e-12)

    def compose(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return left[0] * right[0], ssd.apply(right[0], left[1]) + right[1]

    expected = ssd.gamma(*whole, docs=docs), ssd(*whole, docs=docs, chunk=4)[1]
    from_left, from_right = spans[0], spans[-1]
    for span in spans[1:]:
        from_left = compose(from_left, span)
    for span in reversed(spans[:-1]):
        from_right = compose(span, from_right)
    for found in (from_left, from_right):
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_correct_has_the_gradients_of_the_op() -> None:
    tensors, docs = inputs(20), documents("carried", 20)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    *given_inputs, initial = leaves.values()
    expected, _ = ssd(*given_inputs, docs=docs, initial_state=initial, chunk=8)
    y, _ = ssd(*given_inputs, docs=docs, chunk=8)
    found = ssd.correct(y, *given_inputs, docs=docs, incoming=initial)
    weight = rand(*found.shape, seed=9)
    for got, want in zip(
        torch.autograd.grad(found, list(leaves.values()), weight),
        torch.autograd.grad(expected, list(leaves.values()), weight),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_reverse_fold_is_the_gradient_of_the_fold() -> None:
    gamma = rand(BATCH, HEADS, seed=1).requires_grad_()
    state = rand(BATCH, HEADS, STATE, WIDTH, seed=2).requires_grad_()
    grad = rand(BATCH, HEADS, STATE, WIDTH, seed=3)
    by_gamma, by_state = torch.autograd.grad(ssd.apply(gamma, state), (gamma, state), grad)
    torch.testing.assert_close(ssd.outer(grad, state), by_gamma)
    torch.testing.assert_close(ssd.transpose(gamma, grad), by_state)


def test_a_zero_transition_forgets_even_infinity() -> None:
    gamma = torch.tensor([[0.0, 1.0]])
    state = torch.full((1, 2, 1, 1), float("inf"))
    assert ssd.apply(gamma, state).flatten().tolist() == [0.0, float("inf")]
    assert ssd.drop(state.nan_to_num(1), torch.tensor([0])).sum() == 0


def test_steps_are_the_parallel_form() -> None:
    tensors = inputs(9)
    y, final = call(tensors, None, 4)
    state, outputs = tensors["initial_state"], []
    for t in range(9):
        out, state = ssd.step(*(tensors[name][:, t] for name in NAMES[:4]), state=state)
        outputs.append(out)
    torch.testing.assert_close(torch.stack(outputs, dim=1), y, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(state, final, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("argument", "shape", "says"),
    [
        ("x", (2, 7, 4), r"x: expected shape \[\*, \*, \*, \*\], got \[2, 7, 4\]"),
        ("log_a", (2, 7, 3), r"log_a: expected shape \[2, 7, 4\], got \[2, 7, 3\]"),
        ("b", (2, 6, 2, 5), r"B: expected shape \[2, 7, \*, \*\], got \[2, 6, 2, 5\]"),
        ("c", (2, 7, 2, 6), r"C: expected shape \[2, 7, 2, 5\], got \[2, 7, 2, 6\]"),
        ("initial_state", (2, 4, 3, 5), r"initial_state: expected shape \[2, 4, 5, 3\], got \[2, 4, 3, 5\]"),
    ],
)
def test_bad_shape_is_one_line(argument: str, shape: tuple[int, ...], says: str) -> None:
    with pytest.raises(ValueError, match=f"^ssd: {says}$"):
        call(inputs(7) | {argument: torch.zeros(shape, dtype=torch.float64)}, None, 64)


def test_groups_must_divide_heads() -> None:
    with pytest.raises(ValueError, match=r"^ssd: B: expected groups that divide the 4 heads, got 3$"):
        call(inputs(7, groups=3), None, 64)


def test_inputs_must_be_four() -> None:
    with pytest.raises(ValueError, match=r"^ssd: inputs: expected \(x, log_a, B, C\)$"):
        ssd(torch.zeros(1, 2, 3, 4))


def test_cost_grows_with_the_chunk_only_where_executed() -> None:
    shapes = ((1, 64, 4, 3), (1, 64, 4), (1, 64, 2, 5), (1, 64, 2, 5))
    small, large = ssd.cost(*shapes, chunk=16), ssd.cost(*shapes, chunk=64)
    assert small.model_flops == large.model_flops == 64 * 4 * 5 * 3 * 5
    assert small.executed_flops < large.executed_flops
