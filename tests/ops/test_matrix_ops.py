"""delta, dplr, blockdiag_scan: the chunk form against the recurrence in fp64, documents, and how spans compose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmtrain.errors import UsageError
from lmtrain.ops import Documents, library
from lmtrain.ops.blockdiag_scan import blockdiag_scan
from lmtrain.ops.blockdiag_scan import recurrence as blockdiag_recurrence
from lmtrain.ops.delta import delta
from lmtrain.ops.delta import recurrence as delta_recurrence
from lmtrain.ops.dplr import dplr
from lmtrain.ops.dplr import recurrence as dplr_recurrence
from lmtrain.ops.op import AffineOp

BATCH, HEADS, KEYS, WIDTH = 2, 4, 5, 3
LENGTHS = (0, 1, 63, 64, 65, 200)
DECAYS = {"weak": 1e-3, "mixed": 1.0, "strong": 50.0}  # strong: e^-50 a token, a chunk underflows to 0
Tensors = dict[str, Tensor | None]
quick = settings(max_examples=15, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def torch_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMTRAIN_KERNELS", "reference")


def choose(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setenv("LMTRAIN_KERNELS", backend)
    try:
        library.backend("delta", "cpu", torch.float64)
    except UsageError as refused:
        pytest.skip(str(refused))


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def delta_inputs(length: int, decay: float, gate: str, heads: int = 2) -> Tensors:
    return {
        "v": rand(BATCH, length, HEADS, WIDTH, seed=1),
        "q": rand(BATCH, length, heads, KEYS, seed=2),
        "k": F.normalize(rand(BATCH, length, heads, KEYS, seed=3), dim=-1),
        "beta": 2 * rand(BATCH, length, HEADS, seed=4).sigmoid(),
        "g": {
            "none": lambda: None,
            "scalar": lambda: -decay * rand(BATCH, length, HEADS, seed=5).abs(),
            "vector": lambda: -decay * rand(BATCH, length, HEADS, KEYS, seed=5).abs(),
        }[gate](),
    }


def dplr_inputs(length: int, decay: float) -> Tensors:
    kappa = F.normalize(rand(BATCH, length, HEADS, KEYS, seed=5), dim=-1)
    return {
        "v": rand(BATCH, length, HEADS, WIDTH, seed=1),
        "r": rand(BATCH, length, HEADS, KEYS, seed=2),
        "w": -decay * rand(BATCH, length, HEADS, KEYS, seed=3).abs(),
        "k": rand(BATCH, length, HEADS, KEYS, seed=4),
        "a": -kappa * (-decay * rand(BATCH, length, HEADS, 1, seed=7).abs()).exp(),
        "b": kappa * rand(BATCH, length, HEADS, KEYS, seed=6).sigmoid(),
    }


def blockdiag_inputs(length: int, decay: float) -> Tensors:
    matrices = F.normalize(rand(BATCH, length, HEADS, WIDTH, WIDTH, seed=2), dim=-2)
    return {"v": rand(BATCH, length, HEADS, WIDTH, seed=1), "A": matrices * (0.8 / max(decay, 1))}


@dataclass(frozen=True)
class Case:
    op: AffineOp
    recurrence: Callable[..., tuple[Tensor, Tensor]]
    make: Callable[[int, float], Tensors]
    state: tuple[int, ...]

    def inputs(self, length: int, decay: float = 1.0, initial: bool = True) -> tuple[Tensors, Tensor | None]:
        return self.make(length, decay), rand(*self.state, seed=8) if initial else None


MATRIX = (BATCH, HEADS, KEYS, WIDTH)
CASES = {
    "delta": Case(delta, delta_recurrence, lambda t, d: delta_inputs(t, d, "none"), MATRIX),
    "gated": Case(delta, delta_recurrence, lambda t, d: delta_inputs(t, d, "scalar"), MATRIX),
    "kda": Case(delta, delta_recurrence, lambda t, d: delta_inputs(t, d, "vector", HEADS), MATRIX),
    "kda-grouped": Case(delta, delta_recurrence, lambda t, d: delta_inputs(t, d, "vector", 1), MATRIX),
    "dplr": Case(dplr, dplr_recurrence, dplr_inputs, MATRIX),
    "blockdiag": Case(blockdiag_scan, blockdiag_recurrence, blockdiag_inputs, (BATCH, HEADS, WIDTH)),
}


@pytest.fixture(params=[*CASES, *(f"{name}-cpu" for name in CASES if CASES[name].op is delta)])
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    name = request.param.removesuffix("-cpu")
    if name != request.param:
        choose(monkeypatch, "cpu")
    return CASES[name]


def documents(kind: str, length: int) -> Documents | None:
    """none; fresh: one document from column 0; carried: going on; edges: starts at, before and after chunk borders."""
    if kind == "none":
        return None
    ids = torch.zeros(BATCH, length, dtype=torch.int32)
    if kind == "edges":
        for row, columns in enumerate(((16, 17, 64, 80, 128), (1, 5, 15, 63, 65, 66, 127, 190))):
            ids[row, [t for t in columns if t < length]] = 1
    before = torch.tensor([0, 0] if kind == "fresh" else [3, 0] if kind == "edges" else [3, 1])
    return Documents.from_ids(ids.cumsum(1), before)


def run(case: Case, tensors: Tensors, initial: Tensor | None, docs: Documents | None, **static: Any) -> Tensors:
    """y, final state and the gradients of a random functional of both; ``exact``: by the recurrence."""
    leaves = {n: None if t is None else t.detach().requires_grad_() for n, t in tensors.items()}
    first = None if initial is None else initial.detach().requires_grad_()
    if static.pop("exact", False):
        dropped = case.op.drop(first, docs.before) if docs is not None and first is not None else first
        y, state = case.recurrence(*leaves.values(), docs, dropped if tensors["v"].shape[1] else first)
    else:
        y, state = case.op(*leaves.values(), docs=docs, initial_state=first, **static)
    total = sum((out * rand(*out.shape, seed=9 + i).to(out.dtype)).sum() for i, out in enumerate((y, state)))
    wanted = {n: t for n, t in [*leaves.items(), ("initial_state", first)] if t is not None}
    grads = torch.autograd.grad(total, list(wanted.values()), materialize_grads=True, allow_unused=True)
    return {"y": y.detach(), "state": state.detach()} | {f"d {n}": g for n, g in zip(wanted, grads, strict=True)}


def assert_close(got: Tensors, expected: Tensors, tolerance: float) -> None:
    """Relative RMS below ``tolerance`` for every tensor."""
    for name, want in expected.items():
        assert got[name].shape == want.shape, name
        if want.numel():
            error = (got[name].double() - want.double()).square().mean().sqrt()
            scale = want.double().square().mean().sqrt().clamp(min=1e-3)
            assert error / scale < tolerance, f"{name}: relative RMS {float(error / scale):.1e}"


def cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return {name: None if t is None else t.to(dtype) for name, t in tensors.items()}


@pytest.mark.parametrize("docs", ["none", "fresh", "carried", "edges", "none, zero state", "edges, zero state"])
@pytest.mark.parametrize("length", LENGTHS)
def test_matches_recurrence(case: Case, length: int, docs: str) -> None:
    docs, _, zero = docs.partition(", ")
    initial = not zero
    arguments, documented = case.inputs(length, initial=initial), documents(docs, length)
    assert_close(run(case, *arguments, documented), run(case, *arguments, documented, exact=True), 1e-11)


@pytest.mark.parametrize("chunk", [1, 7, 16, 100])
def test_chunk_does_not_change_the_function(case: Case, chunk: int) -> None:
    arguments, docs = case.inputs(70), documents("edges", 70)
    assert_close(run(case, *arguments, docs, chunk=chunk), run(case, *arguments, docs, exact=True), 1e-12)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("docs", ["none", "edges"])
def test_decays_in_fp32(case: Case, decay: str, docs: str) -> None:
    """Measured, worst: 1.2e-6 (the gradient of g under weak decay, torch form); compiled 4e-7."""
    tensors, initial = case.inputs(200, DECAYS[decay])
    documented = documents(docs, 200)
    single = cast(tensors, torch.float32)
    found = run(case, single, initial.float(), documented)
    assert all(tensor.isfinite().all() for tensor in found.values())
    exact = run(case, cast(single, torch.float64), initial.float().double(), documented, exact=True)
    assert_close(found, exact, 3e-6)


def test_gradcheck(case: Case) -> None:
    tensors, initial = case.inputs(7)
    docs = documents("edges", 7)
    names = [name for name, t in tensors.items() if t is not None]
    leaves = [tensors[name].requires_grad_() for name in names]

    def op(first: Tensor, *given_inputs: Tensor) -> tuple[Tensor, Tensor]:
        everything = tensors | dict(zip(names, given_inputs, strict=True))
        return case.op(*everything.values(), docs=docs, initial_state=first, chunk=3)

    assert torch.autograd.gradcheck(op, [initial.requires_grad_(), *leaves], fast_mode=True)


def test_bf16_values_and_fp32_state(case: Case) -> None:
    tensors, initial = case.inputs(130)
    docs, half = documents("edges", 130), cast(tensors, torch.bfloat16)
    found = run(case, half, initial.float(), docs)
    exact = run(case, cast(half, torch.float32), initial.float(), docs)
    assert found["y"].dtype == torch.bfloat16 and found["state"].dtype == torch.float32
    assert torch.equal(found["state"], exact["state"])
    assert torch.equal(found["y"], exact["y"].bfloat16())


def test_strided_inputs_and_gradients(case: Case) -> None:
    tensors, initial = case.inputs(70)
    docs = documents("edges", 70)
    results = []
    for strided in (True, False):
        leaves = [t for t in (*tensors.values(), initial) if t is not None]
        leaves = [t.transpose(1, -1).contiguous().transpose(1, -1) if strided else t.clone() for t in leaves]
        leaves = [t.requires_grad_() for t in leaves]
        given_inputs = dict(zip([n for n, t in tensors.items() if t is not None], leaves, strict=False))
        y, state = case.op(*(tensors | given_inputs).values(), docs=docs, initial_state=leaves[-1])
        outs = (y.sum(), state.sum()) if strided else (y, state)  # the gradients of sums have stride 0
        results.append(torch.autograd.grad(outs, leaves, [torch.ones_like(out) for out in outs]))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [10, 130])
def test_documents_are_independent_to_the_bit(case: Case, length: int) -> None:
    """Other values in the documents before and after, and in the initial state, change no bit of ours."""
    first, last = length // 3, length // 3 + length // 2
    ids = torch.zeros(BATCH, length, dtype=torch.int32)
    ids[:, first], ids[:, last] = 1, 1
    docs = Documents.from_ids(ids.cumsum(1), torch.tensor([3, 0]))
    tensors, initial = case.inputs(length)
    tensors, initial = cast(tensors, torch.float32), initial.float()
    changed = {name: None if t is None else t.clone() for name, t in tensors.items()}
    for tensor in changed.values():
        if tensor is not None:
            tensor[:, :first] *= 1.5
            tensor[:, last:] *= 0.7

    def ours(given_inputs: Tensors, state: Tensor) -> list[Tensor]:
        leaves = {n: None if t is None else t.detach().requires_grad_() for n, t in given_inputs.items()}
        state = state.requires_grad_()
        y, _ = case.op(*leaves.values(), docs=docs, initial_state=state)
        mine = y[:, first:last]
        wanted = [t for t in leaves.values() if t is not None]
        *grads, by_state = torch.autograd.grad(
            (mine * rand(*mine.shape, seed=9).float()).sum(), [*wanted, state], materialize_grads=True
        )
        assert (by_state == 0).all()
        for grad in grads:
            assert (grad[:, :first] == 0).all() and (grad[:, last:] == 0).all()
        return [mine.detach(), *(grad[:, first:last] for grad in grads)]

    for one, other in zip(ours(tensors, initial), ours(changed, initial * -7), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("docs", ["none", "edges"])
def test_later_tokens_have_no_gradient_at_all(case: Case, docs: str) -> None:
    tensors, initial = case.inputs(40)
    leaves = {n: None if t is None else t.requires_grad_() for n, t in tensors.items()}
    y, _ = case.op(*leaves.values(), docs=documents(docs, 40), initial_state=initial, chunk=16)
    wanted = [t for t in leaves.values() if t is not None]
    for column in (0, 14, 15, 16, 17, 38):
        for grad in torch.autograd.grad(y[:, column].sum(), wanted, retain_graph=True):
            assert (grad[:, column + 1 :] == 0).all(), column


def test_a_row_that_starts_a_document_drops_any_initial_state(case: Case) -> None:
    tensors, initial = case.inputs(20)
    docs = documents("fresh", 20)
    expected = run(case, tensors, None, docs)
    for fill in (1.0, float("inf"), float("nan")):
        found = run(case, tensors, torch.full_like(initial, fill), docs)
        assert (found.pop("d initial_state") == 0).all()
        assert all(torch.equal(found[name], expected[name]) for name in found)
        gamma, state = case.op.gamma(*tensors.values(), docs=docs), torch.full_like(initial, fill)
        assert (gamma == 0).all()
        assert (case.op.apply(gamma, state) == 0).all() and (case.op.transpose(gamma, state) == 0).all()


# --- spans: what ranks and segments rely on ---


def segment(tensors: Tensors, docs: Documents, first: int, last: int) -> tuple[list[Tensor | None], Documents]:
    """The inputs and documents of ``[first, last)``."""
    part = [None if t is None else t[:, first:last] for t in tensors.values()]
    before = docs.positions()[:, first] if first < docs.shape[1] else torch.ones(BATCH, dtype=torch.int32)
    return part, Documents.from_ids(docs.ids[:, first:last], before)


@st.composite
def layouts(draw: st.DrawFn) -> Documents:
    length = draw(st.integers(1, 24))
    starts = draw(st.lists(st.sets(st.integers(0, length - 1), max_size=3), min_size=BATCH, max_size=BATCH))
    ids = torch.zeros(BATCH, length, dtype=torch.int32)
    for row, columns in enumerate(starts):
        ids[row, sorted(columns)] = 1
    return Documents.from_ids(ids.cumsum(1), torch.tensor(draw(st.lists(st.integers(0, 2), min_size=2, max_size=2))))


@pytest.mark.parametrize("name", CASES)
@quick
@given(docs=layouts(), data=st.data())
def test_spans_fold_to_one_pass(name: str, docs: Documents, data: st.DataObject) -> None:
    """Outputs and final state of three spans, each from its folded state; spans compose grouped either way."""
    case, length = CASES[name], docs.shape[1]
    borders = sorted(data.draw(st.lists(st.integers(0, length), min_size=2, max_size=2)))
    tensors, state = case.inputs(length)
    y, final = case.op(*tensors.values(), docs=docs, initial_state=state)
    parts, spans = [], []
    for first, last in zip((0, *borders), (*borders, length), strict=True):
        if first == last:
            continue
        part, documented = segment(tensors, docs, first, last)
        out, after = case.op(*part, docs=documented, initial_state=state)
        span = case.op.span(*part, docs=documented)
        state = case.op.apply(span.gamma, state) + span.state
        torch.testing.assert_close(state, after, rtol=1e-11, atol=1e-11)
        parts.append(out)
        spans.append((span.gamma, span.state))
    torch.testing.assert_close(torch.cat(parts, dim=1), y, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state, final, rtol=1e-11, atol=1e-11)

    def compose(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return right[0] @ left[0], case.op.apply(right[0], left[1]) + right[1]

    whole = case.op.span(*tensors.values(), docs=docs)
    from_left, from_right = spans[0], spans[-1]
    for span in spans[1:]:
        from_left = compose(from_left, span)
    for span in reversed(spans[:-1]):
        from_right = compose(span, from_right)
    for found in (from_left, from_right):
        torch.testing.assert_close(found, (whole.gamma, whole.state), rtol=1e-11, atol=1e-11)
    opened = docs.starts().any(dim=1)
    assert (whole.gamma[opened] == 0).all()


def test_span_has_the_gradients_of_the_op(case: Case) -> None:
    tensors, initial = case.inputs(40)
    leaves = {n: None if t is None else t.requires_grad_() for n, t in tensors.items()}
    wanted = [t for t in (*leaves.values(), initial.requires_grad_()) if t is not None]
    span = case.op.span(*leaves.values(), docs=documents("carried", 40))
    by_span = case.op.apply(span.gamma, initial) + span.state
    _, by_op = case.op(*leaves.values(), docs=documents("carried", 40), initial_state=initial)
    weight = rand(*by_op.shape, seed=9)
    pairs = [
        torch.autograd.grad(s, wanted, weight, materialize_grads=True, allow_unused=True) for s in (by_span, by_op)
    ]
    for got, expected in zip(*pairs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_an_empty_span_changes_nothing(case: Case) -> None:
    tensors, initial = case.inputs(0)
    span = case.op.span(*tensors.values())
    assert torch.equal(case.op.apply(span.gamma, initial) + span.state, initial)
    y, state = case.op(*tensors.values(), initial_state=initial)
    assert y.shape == tensors["v"].shape and torch.equal(state, initial)


def test_reverse_fold_is_the_gradient_of_the_fold(case: Case) -> None:
    size = case.state[2]
    gamma = rand(BATCH, HEADS, size, size, seed=1).requires_grad_()
    state, grad = rand(*case.state, seed=2).requires_grad_(), rand(*case.state, seed=3)
    by_gamma, by_state = torch.autograd.grad(case.op.apply(gamma, state), (gamma, state), grad)
    torch.testing.assert_close(case.op.outer(grad, state), by_gamma)
    torch.testing.assert_close(case.op.transpose(gamma, grad), by_state)


def test_steps_are_the_parallel_form(case: Case) -> None:
    tensors, state = case.inputs(9)
    y, final = case.op(*tensors.values(), initial_state=state, chunk=4)
    outputs = []
    for t in range(9):
        out, state = case.op.step(*(None if x is None else x[:, t] for x in tensors.values()), state=state)
        outputs.append(out)
    torch.testing.assert_close(torch.stack(outputs, dim=1), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


# --- what each op says of itself ---


def test_delta_is_the_householder_form() -> None:
    """S_t = (I - beta k k^T) S_{t-1} + beta k v^T, arXiv 2406.06484."""
    v, q, k, beta, _ = delta_inputs(1, 1.0, "none", HEADS).values()
    state, (key, value, rate) = rand(*MATRIX, seed=8), (k[:, 0, ..., None], v[:, 0], beta[:, 0, :, None, None])
    expected = (torch.eye(KEYS) - rate * key @ key.mT) @ state + rate * key @ value[:, :, None, :]
    torch.testing.assert_close(delta(v, q, k, beta, None, initial_state=state)[1], expected)


@pytest.mark.parametrize("gate", ["none", "scalar", "vector"])
def test_delta_is_a_case_of_dplr(gate: str) -> None:
    v, q, k, beta, g = delta_inputs(70, 0.5, gate, HEADS).values()
    g = (torch.zeros_like(beta) if g is None else g).view(BATCH, 70, HEADS, -1).expand(q.shape)
    written = beta[..., None] * k
    docs, initial = documents("edges", 70), rand(*MATRIX, seed=8)
    expected = dplr(v, q, g, written, -g.exp() * k, written, docs=docs, initial_state=initial)
    gated = None if gate == "none" else g[..., 0] if gate == "scalar" else g
    torch.testing.assert_close(delta(v, q, k, beta, gated, docs=docs, initial_state=initial), expected)


@pytest.mark.parametrize(
    ("op", "argument", "shape", "says"),
    [
        ("gated", "v", (2, 7, 4), r"delta: v: expected shape \[\*, \*, \*, \*\], got \[2, 7, 4\]"),
        ("gated", "k", (2, 7, 4, 5), r"delta: k: expected shape \[2, 7, 2, 5\], got \[2, 7, 4, 5\]"),
        ("gated", "beta", (2, 7, 2), r"delta: beta: expected shape \[2, 7, 4\], got \[2, 7, 2\]"),
        ("gated", "g", (2, 7, 2), r"delta: g: expected shape \[2, 7, 4\], got \[2, 7, 2\]"),
        ("gated", "g", (2, 7, 4, 3), r"delta: g: expected shape \[2, 7, 4, 5\], got \[2, 7, 4, 3\]"),
        ("dplr", "b", (2, 7, 4, 3), r"dplr: b: expected shape \[2, 7, 4, 5\], got \[2, 7, 4, 3\]"),
        ("blockdiag", "A", (2, 7, 4, 3), r"blockdiag_scan: A: expected shape \[2, 7, 4, 3, 3\], got \[2, 7, 4, 3\]"),
    ],
)
def test_bad_shape_is_one_line(op: str, argument: str, shape: tuple[int, ...], says: str) -> None:
    tensors, _ = CASES[op].inputs(7)
    with pytest.raises(ValueError, match=f"^{says}$"):
        CASES[op].op(*(tensors | {argument: torch.zeros(shape)}).values())


def test_bad_calls_are_one_line(case: Case) -> None:
    tensors, initial = case.inputs(7)
    name = case.op.name
    with pytest.raises(ValueError, match=f"^{name}: inputs: expected "):
        case.op(tensors["v"])
    with pytest.raises(ValueError, match=f"^{name}: chunk: expected at least 1, got 0$"):
        case.op(*tensors.values(), chunk=0)
    with pytest.raises(ValueError, match=f"^{name}: initial_state: expected shape "):
        case.op(*tensors.values(), initial_state=initial[:1])
    with pytest.raises(ValueError, match=rf"^{name}: docs.ids: expected shape \[2, 7\], got \[2, 6\]$"):
        case.op(*tensors.values(), docs=documents("fresh", 6))
    with pytest.raises(ValueError, match=f"^{name}: v: expected a floating dtype, got torch.int64$"):
        case.op(*(tensors | {"v": torch.zeros(2, 7, 4, 3, dtype=torch.int64)}).values())
    with pytest.raises(ValueError, match=f"^{name}: .*: expected device meta as v, got cpu$"):
        case.op(*(tensors | {"v": tensors["v"].to("meta")}).values())


def test_key_heads_must_divide_value_heads() -> None:
    tensors = delta_inputs(7, 1.0, "scalar", heads=3)
    with pytest.raises(ValueError, match=r"^delta: q: expected key heads that divide the 4 value heads, got 3$"):
        delta(*tensors.values())


def test_cost_grows_with_the_chunk_only_where_executed(case: Case) -> None:
    tensors, _ = case.inputs(64)
    shapes = [tuple(t.shape) for t in tensors.values() if t is not None]
    cost = case.op.cost(*shapes)
    assert cost.model_flops > 0 and cost.executed_flops > 0
    assert cost.bytes == 4 * sum(t.numel() for t in (tensors["v"], *tensors.values()) if t is not None)
