"""wkv4: every backend against the recurrence in fp64, documents, and how spans compose."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmtrain.ops import Documents
from lmtrain.ops.wkv4 import recurrence, wkv4
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

WIDTH = 21
NAMES = ("v", "k", "w", "u", "initial_state")
DECAYS = {"weak": 1e-3, "mixed": 1.0, "strong": 50.0}
quick = settings(max_examples=30, deadline=None, derandomize=True)


def inputs(length: int, decay: float = 1.0, keys: float = 1.0) -> dict[str, Tensor]:
    a, b, p = rand(BATCH, WIDTH, seed=5), 1 + rand(BATCH, WIDTH, seed=6).abs(), rand(BATCH, WIDTH, seed=7)
    return {
        "v": rand(BATCH, length, WIDTH, seed=1),
        "k": keys * rand(BATCH, length, WIDTH, seed=2),
        "w": -decay * rand(WIDTH, seed=3).abs(),
        "u": rand(WIDTH, seed=4),
        "initial_state": torch.stack([a, b, p], dim=1),
    }


def unique(state: Tensor) -> Tensor:
    """What the triple stands for: a / b and p + log b; zeros of an empty one."""
    a, b, p = state.unbind(dim=1)
    empty, scale = b == 0, torch.where(b == 0, torch.ones_like(b), b)
    return torch.where(empty[:, None], torch.zeros_like(state[:, :2]), torch.stack([a / scale, p + scale.log()], dim=1))


def op(chunk: int = 16) -> Function:
    def call(tensors: dict[str, Tensor], docs: Documents | None) -> tuple[Tensor, Tensor]:
        *arguments, initial = (tensors.get(name) for name in NAMES)
        y, state = wkv4(*arguments, docs=docs, initial_state=initial, chunk=chunk)
        return y, unique(state)

    return call


def definition(tensors: dict[str, Tensor], docs: Documents | None) -> tuple[Tensor, Tensor]:
    y, state = recurrence(*(tensors[name] for name in NAMES[:4]), docs, tensors.get("initial_state"))
    return y, unique(state)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> str:
    return use(monkeypatch, "wkv4", "cpu")


@pytest.fixture(params=["reference", "cpu"], autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return use(monkeypatch, "wkv4", request.param)


@pytest.mark.parametrize("docs", DOCUMENTS)
@pytest.mark.parametrize("length", LENGTHS)
def test_matches_recurrence(length: int, docs: str) -> None:
    tensors, documented = inputs(length), documents(docs, length)
    single = {name: tensor.float() for name, tensor in tensors.items()}
    expected = run(definition, {name: tensor.double() for name, tensor in single.items()}, documented)
    assert_close(run(op(), tensors, documented), run(definition, tensors, documented), 1e-13)
    assert_close(run(op(), single, documented), expected, 2e-6)
    del tensors["initial_state"]
    assert_close(run(op(), tensors, documented), run(definition, tensors, documented), 1e-13)


@pytest.mark.parametrize("keys", [1.0, 100.0], ids=["keys", "large keys"])
@pytest.mark.parametrize("decay", DECAYS)
def test_decays(decay: str, keys: float) -> None:
    tensors, docs = inputs(100, DECAYS[decay], keys), documents("edges", 100, chunk=16)
    single = {name: tensor.float() for name, tensor in tensors.items()}
    expected = run(definition, {name: tensor.double() for name, tensor in single.items()}, docs)
    assert_close(run(op(), tensors, docs), run(definition, tensors, docs), 1e-12)
    assert_close(run(op(), single, docs), expected, 2e-5)


def test_is_the_formula_of_the_paper() -> None:
    tensors = inputs(9)
    v, k, w, u = (tensors[name] for name in NAMES[:4])
    y, _ = wkv4(v, k, w, u)
    for t in range(9):
        steps = torch.arange(t - 1, -1, -1)[:, None]
        weights = torch.cat([(steps * w + k[:, :t]).exp(), (u + k[:, t : t + 1]).exp()], dim=1)
        expected = (weights * v[:, : t + 1]).sum(dim=1) / weights.sum(dim=1)
        torch.testing.assert_close(y[:, t], expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_chunk_does_not_change_the_function(chunk: int) -> None:
    tensors, docs = inputs(70), documents("edges", 70, chunk=16)
    assert_close(run(op(chunk), tensors, docs), run(definition, tensors, docs), 1e-13)


def test_gradcheck() -> None:
    tensors, docs = inputs(9), documents("edges", 9, chunk=5)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    function = lambda *leaves: op(4)(dict(zip(tensors, leaves, strict=True)), docs)  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_bf16_values_and_fp32_state() -> None:
    tensors, docs = inputs(40), documents("edges", 40)
    half = {name: t.bfloat16() if name in ("v", "k") else t.float() for name, t in tensors.items()}
    y, state = wkv4(*(half[name] for name in NAMES[:4]), docs=docs, initial_state=half["initial_state"])
    full = [half[name].float() for name in NAMES[:4]]
    y_full, state_full = wkv4(*full, docs=docs, initial_state=half["initial_state"])
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert torch.equal(y, y_full.bfloat16()) and torch.equal(state, state_full)


def test_documents_are_independent_to_the_bit() -> None:
    """Columns 17 to 39 are ours; other values beside them change no bit and get no gradient."""
    column = torch.arange(60)
    docs = Documents.from_ids(((column >= 17).int() + (column >= 40).int()).expand(BATCH, 60), torch.tensor([3, 0]))

    def ours(fill: float) -> list[Tensor]:
        leaves = {name: tensor.float() for name, tensor in inputs(60).items()}
        for name in ("v", "k"):
            leaves[name][:, :17], leaves[name][:, 40:] = fill, -fill
        leaves["initial_state"] += abs(fill)
        leaves = {name: tensor.requires_grad_() for name, tensor in leaves.items()}
        mine = op()(leaves, docs)[0][:, 17:40]
        *grads, grad_initial = torch.autograd.grad((mine * rand(*mine.shape, seed=9)).sum(), list(leaves.values()))
        assert not any((grad[:, :17] != 0).any() or (grad[:, 40:] != 0).any() for grad in grads[:2])
        assert not (grad_initial != 0).any()
        return [mine, *(grad[:, 17:40] for grad in grads[:2]), *grads[2:]]

    for one, other in zip(ours(0.0), ours(9.0), strict=True):
        assert torch.equal(one, other)


def test_a_row_that_starts_a_document_drops_any_initial_state() -> None:
    tensors, docs = inputs(20), documents("fresh", 20)
    expected = wkv4(*(tensors[name] for name in NAMES[:4]), docs=docs)
    for fill in (1.0, float("inf"), float("nan")):
        initial = torch.full_like(tensors["initial_state"], fill)
        found = wkv4(*(tensors[name] for name in NAMES[:4]), docs=docs, initial_state=initial)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("optional", [True, False])
def test_opcheck(compiled: str, optional: bool) -> None:
    leaves = {name: tensor.float().requires_grad_() for name, tensor in inputs(20).items()}
    docs = documents("edges", 20)
    assert docs is not None
    extra = (docs.starts(), leaves["initial_state"]) if optional else (None, None)
    arguments = (*(leaves[name] for name in NAMES[:4]), *extra)
    torch.library.opcheck(torch.ops.lmtrain.wkv4.default, arguments)
    grads = (torch.randn(BATCH, 20, WIDTH), torch.randn(BATCH, 3, WIDTH))
    detached = [None if t is None else t.detach() for t in arguments]
    torch.library.opcheck(torch.ops.lmtrain.wkv4_backward.default, (*grads, *detached))


def test_compiles_and_recomputes(compiled: str) -> None:
    tensors, docs = {n: t.float() for n, t in inputs(40).items()}, documents("edges", 40)
    expected = run(op(), tensors, docs)
    whole = torch.compile(op(), backend="aot_eager", fullgraph=True)

    def recomputed(tensors: dict[str, Tensor], docs: Documents | None) -> tuple[Tensor, Tensor]:
        return torch.utils.checkpoint.checkpoint(op(), tensors, docs, use_reentrant=False)

    for function in (whole, recomputed):
        found = run(function, tensors, docs)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_same_bits_for_any_thread_count(compiled: str) -> None:
    tensors, docs = {n: t.float() for n, t in inputs(2000).items()}, documents("edges", 2000)
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
    tensors, docs = inputs(40), documents("edges", 40)
    strided = {name: tensor.transpose(0, -1).contiguous().transpose(0, -1) for name, tensor in tensors.items()}
    found = []
    for layout in (tensors, strided):
        leaves = {name: tensor.requires_grad_() for name, tensor in layout.items()}
        y, state = op()(leaves, docs)
        found.append(torch.autograd.grad(y.sum() + state.sum(), list(leaves.values())))  # gradients of stride 0
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_nan_of_another_document_does_not_reach_ours(compiled: str) -> None:
    docs = Documents.from_ids((torch.arange(30) >= 17).int().expand(BATCH, 30), torch.tensor([3, 0]))
    tensors = {name: tensor.float() for name, tensor in inputs(30).items()}
    expected = run(op(), {n: t[:, 17:] if n in "vk" else t for n, t in tensors.items() if n != "initial_state"}, None)
    leaves = {name: tensor.clone() for name, tensor in tensors.items()}
    leaves["v"][:, :17] = leaves["k"][:, :17] = leaves["initial_state"][:] = float("nan")
    y, state = op()(leaves, docs)
    assert torch.equal(y[:, 17:], expected["y"]) and torch.equal(state, expected["state"])


# --- spans: what ranks and segments rely on ---


@quick
@given(docs=layouts(), data=st.data())
def test_spans_fold_to_the_row(docs: Documents, data: st.DataObject) -> None:
    """Spans combine to the state of the row, grouped either way; each span runs with the state that enters it."""
    length = docs.shape[1]
    borders = sorted({0, length, *data.draw(st.lists(st.integers(0, length), max_size=2))})
    tensors = inputs(length)
    (*row, initial), spans, outputs = tensors.values(), [], []
    y, final = wkv4(*row, docs=docs, initial_state=initial)
    incoming = initial
    for first, last in itertools.pairwise(borders):
        part, documented = [*(t[:, first:last] for t in row[:2]), *row[2:]], shard(docs, first, last)
        outputs.append(wkv4(*part, docs=documented, initial_state=incoming)[0])
        span = wkv4.span(*part, docs=documented)
        spans.append((span.gamma, span.state))
        incoming = wkv4.combine(*spans[-1][:1], incoming, spans[-1][1])
    torch.testing.assert_close(torch.cat(outputs, dim=1), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(unique(incoming), unique(final), rtol=1e-12, atol=1e-12)

    def compose(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return left[0] + right[0], wkv4.combine(right[0], left[1], right[1])

    whole = wkv4.span(*row, docs=docs)
    from_left, from_right = spans[0], spans[-1]
    for one in spans[1:]:
        from_left = compose(from_left, one)
    for one in reversed(spans[:-1]):
        from_right = compose(one, from_right)
    for gamma, state in (from_left, from_right):
        torch.testing.assert_close(gamma, whole.gamma, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(unique(state), unique(whole.state), rtol=1e-12, atol=1e-12)


def test_the_fold_and_its_reverse() -> None:
    """An empty state is neutral, a reset forgets even infinity, and the reverse is the gradient."""
    state, added = inputs(1)["initial_state"], inputs(5)["initial_state"].flip(0)
    gamma, zeros = -rand(BATCH, WIDTH, seed=8).abs(), torch.zeros_like(state)
    torch.testing.assert_close(unique(wkv4.combine(gamma, zeros, added)), unique(added))
    torch.testing.assert_close(unique(wkv4.combine(gamma * 0, state, zeros)), unique(state))
    forget = torch.full_like(gamma, -float("inf"))
    torch.testing.assert_close(unique(wkv4.combine(forget, state / 0, added)), unique(added))
    leaves = [tensor.requires_grad_() for tensor in (gamma, state, added)]
    out = wkv4.combine(*leaves)
    (grad,) = torch.autograd.grad((unique(out) * rand(BATCH, 2, WIDTH, seed=9)).sum(), out, retain_graph=True)
    for got, want in zip(wkv4.combine_backward(grad, *leaves), torch.autograd.grad(out, leaves, grad), strict=True):
        torch.testing.assert_close(got, want)
    assert torch.autograd.gradcheck(lambda *t: unique(wkv4.combine(*t)), leaves, fast_mode=True)
    for call in (wkv4.apply, wkv4.transpose, wkv4.outer):
        with pytest.raises(TypeError, match=r"^wkv4: \w+\(\): states of this kind do not add"):
            call(gamma, state)


def test_steps_are_the_parallel_form() -> None:
    *row, state = inputs(40).values()
    (v, k, w, u), outputs = row, []
    y, final = wkv4(*row, initial_state=state)
    for t in range(40):
        out, state = wkv4.step(v[:, t], k[:, t], w, u, state=state)
        outputs.append(out)
    torch.testing.assert_close(torch.stack(outputs, dim=1), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(unique(state), unique(final), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("argument", "shape", "says"),
    [
        ("v", (2, 7), r"v: expected shape \[\*, \*, \*\], got \[2, 7\]"),
        ("k", (2, 6, 21), r"k: expected shape \[2, 7, 21\], got \[2, 6, 21\]"),
        ("w", (2, 21), r"w: expected shape \[21\], got \[2, 21\]"),
        ("u", (20,), r"u: expected shape \[21\], got \[20\]"),
        ("initial_state", (2, 21, 3), r"initial_state: expected shape \[2, 3, 21\], got \[2, 21, 3\]"),
    ],
)
def test_bad_input_is_one_line(argument: str, shape: tuple[int, ...], says: str) -> None:
    with pytest.raises(ValueError, match=f"^wkv4: {says}$"):
        op()(inputs(7) | {argument: torch.zeros(shape)}, None)


def test_bad_calls_are_one_line() -> None:
    with pytest.raises(ValueError, match=r"^wkv4: chunk: expected at least 1, got 0$"):
        op(0)(inputs(7), None)
    with pytest.raises(ValueError, match=r"^wkv4: inputs: expected \(v, k, w, u\)$"):
        wkv4(torch.zeros(1, 2, 3))
    assert wkv4.cost((1, 64, 4)).model_flops == 64 * 4 * 20
