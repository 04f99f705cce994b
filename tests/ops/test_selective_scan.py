"""selective_scan: every backend against the fp64 recurrence, documents, and the algebra by which spans compose."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmtrain.errors import UsageError
from lmtrain.ops import Documents, library
from lmtrain.ops.selective_scan import recurrence, selective_scan
from tests.ops.scan_cases import rand

NAMES = ("x", "dt", "A", "B", "C", "initial_state")
BORDERS = {"none": None, "carried": (), "edges": (0, 1, 5, 6, 63, 64, 65, 127, 130, 190)}
RATES = {"weak": 0.01, "middle": 1.0, "strong": 100.0}
quick = settings(max_examples=20, deadline=None, derandomize=True)


@pytest.fixture(params=("reference", "cpu"))
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("LMTRAIN_KERNELS", request.param)
    try:
        library.backend("selective_scan", "cpu", torch.float64)
    except UsageError as refused:
        pytest.skip(str(refused))
    return str(request.param)


@pytest.fixture(params=("exp", "longhorn"))
def decay(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def inputs(
    length: int,
    decay: str = "exp",
    *,
    batch: int = 2,
    channels: int = 6,
    groups: int = 2,
    d_state: int = 3,
    rate: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Longhorn's Delta as in the paper: Delta k^2 lies below 1."""
    generator = torch.Generator().manual_seed(length + 7 * channels + d_state)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    b = rand(batch, length, groups, d_state)
    dt = rand(batch, length, channels).sigmoid()
    if decay == "longhorn":
        dt = dt * rate
        dt = dt / (1 + dt * b.square().sum(dim=-1).repeat_interleave(channels // groups, dim=2))
    tensors = {"x": rand(batch, length, channels), "dt": dt}
    if decay == "exp":
        tensors["A"] = -rate * rand(channels, d_state).abs()
    c, initial = rand(batch, length, groups, d_state), rand(batch, channels, d_state)
    tensors |= {"B": b, "C": c, "initial_state": initial}
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def documents(borders: tuple[int, ...] | None, length: int, batch: int = 2) -> Documents | None:
    """A document starts at every border; the last row continues one from before its column 0, with (), all rows."""
    if borders is None:
        return None
    ids = torch.zeros(batch, length, dtype=torch.int32)
    for border in borders:
        ids[:, border:] += 1
    return Documents.from_ids(ids, torch.tensor([0 if borders else 2] * (batch - 1) + [3]))


def call(tensors: dict[str, Tensor], docs: Documents | None, exact: bool = False) -> tuple[Tensor, Tensor]:
    x, dt, a, b, c, initial = (tensors.get(name) for name in NAMES)
    if exact:
        assert x is not None and dt is not None and b is not None and c is not None
        return recurrence(x, dt, a, b, c, docs, initial)
    return selective_scan(x, dt, a, b, c, docs=docs, initial_state=initial)


def run(tensors: dict[str, Tensor], docs: Documents | None, exact: bool = False) -> dict[str, Tensor]:
    """y, state, and the gradients of a random functional of both; exact: by the recurrence in fp64."""
    dtype = tensors["x"].dtype
    leaves = {n: (t.detach().double() if exact else t.detach()).requires_grad_() for n, t in tensors.items()}
    outs = call(leaves, docs, exact)
    generator = torch.Generator().manual_seed(9)
    grads = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(dtype).to(o.dtype) for o in outs]
    total = sum((out * grad).sum() for out, grad in zip(outs, grads, strict=True))
    found = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True, allow_unused=True)
    gradients = {f"grad_{name}": grad for name, grad in zip(leaves, found, strict=True)}
    return {"y": outs[0].detach(), "state": outs[1].detach()} | gradients


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative RMS below ``tolerance`` for every tensor."""
    for name, want in expected.items():
        assert got[name].shape == want.shape, name
        if want.numel():
            error = (got[name].double() - want.double()).square().mean().sqrt()
            scale = want.double().square().mean().sqrt().clamp(min=1e-3)
            assert error / scale < tolerance, f"{name}: relative RMS {float(error / scale):.2e}"


def both_precisions(tensors: dict[str, Tensor], docs: Documents | None) -> None:
    single = {name: tensor.float() for name, tensor in tensors.items()}
    assert_close(run(single, docs), run(single, docs, True), 3e-6)
    assert_close(run(tensors, docs), run(tensors, docs, True), 1e-13)


@pytest.mark.parametrize("borders", BORDERS.values(), ids=BORDERS)
@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 200])
def test_matches_recurrence(kernels: str, decay: str, length: int, borders: tuple[int, ...] | None) -> None:
    tensors, docs = inputs(length, decay), documents(borders, length)
    both_precisions(tensors, docs)
    del tensors["initial_state"]
    both_precisions(tensors, docs)


@pytest.mark.parametrize("rate", RATES.values(), ids=RATES)
def test_decays(kernels: str, decay: str, rate: float) -> None:
    both_precisions(inputs(130, decay, rate=rate), documents(BORDERS["edges"], 130))


@pytest.mark.parametrize(
    "sizes",
    [
        {"channels": 1, "groups": 1, "d_state": 1},
        {"channels": 16, "groups": 1, "d_state": 16},
        {"channels": 148, "groups": 1, "d_state": 5},
        {"channels": 280, "groups": 2, "d_state": 8, "batch": 3},
    ],
    ids=str,
)
def test_sizes(decay: str, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMTRAIN_KERNELS", "cpu")
    both_precisions(inputs(70, decay, **sizes), documents((0, 30), 70, sizes.get("batch", 2)))


def test_gradcheck(kernels: str, decay: str) -> None:
    tensors, docs = inputs(7, decay, channels=2), documents((3, 4), 7)
    names = list(tensors)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    assert torch.autograd.gradcheck(lambda *t: call(dict(zip(names, t, strict=True)), docs), leaves)


@pytest.mark.parametrize("optional", [True, False])
def test_opcheck(decay: str, optional: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMTRAIN_KERNELS", "cpu")
    assert library.backend("selective_scan", "cpu", torch.float32) == "cpu", "run `make install`"
    tensors, docs = inputs(70, decay, dtype=torch.float32), documents((5, 65), 70)
    leaves = [t if t is None else t.requires_grad_() for t in (tensors.get(name) for name in NAMES)]
    assert docs is not None
    arguments = (*leaves[:5], docs.starts() if optional else None, leaves[5] if optional else None)
    torch.library.opcheck(torch.ops.lmtrain.selective_scan.default, arguments)
    detached = [None if t is None else t.detach() for t in arguments]
    y, state, checkpoints = torch.ops.lmtrain.selective_scan(*detached)
    torch.library.opcheck(torch.ops.lmtrain.selective_scan_backward.default, (y, state, *detached, checkpoints))


def test_bf16_values_are_computed_in_fp32(kernels: str, decay: str) -> None:
    tensors, docs = inputs(100, decay, dtype=torch.float32), documents((70,), 100)
    half = tensors | {name: tensors[name].bfloat16() for name in ("x", "B", "C")}
    got, full = run(half, docs), run({name: tensor.float() for name, tensor in half.items()}, docs)
    assert got["y"].dtype == got["grad_B"].dtype == torch.bfloat16 and got["state"].dtype == torch.float32
    assert torch.equal(got["y"], full["y"].bfloat16()) and torch.equal(got["state"], full["state"])
    assert_close(got, run(half, docs, True), 1e-2)


def test_same_bits_for_any_thread_count(kernels: str, decay: str) -> None:
    tensors, docs = inputs(150, decay, channels=600, d_state=8, dtype=torch.float32), documents((20, 100), 150)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(run(tensors, docs))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_strided_inputs_and_gradients(kernels: str, decay: str) -> None:
    tensors, docs = inputs(70, decay), documents((30,), 70)
    strided = {n: t.transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for n, t in tensors.items()}
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    gradients = []
    for layout, expand in ((strided, True), (leaves, False)):
        outs = call(layout, docs)
        outs = tuple(out.sum() for out in outs) if expand else outs  # the gradients of sums have stride 0
        gradients.append(torch.autograd.grad(outs, list(layout.values()), [torch.ones_like(out) for out in outs]))
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


def part_of(tensors: dict[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
    return {name: t if name in ("A", "initial_state") else t[:, first:last] for name, t in tensors.items()}


def given_inputs(tensors: dict[str, Tensor]) -> list[Tensor | None]:
    return [tensors.get(name) for name in NAMES[:5]]


@pytest.mark.parametrize("before", [0, 3])
def test_a_packed_document_has_the_bits_of_one_alone(kernels: str, decay: str, before: int) -> None:
    tensors = inputs(200, decay, batch=1, dtype=torch.float32)
    packed = documents((37, 137), 200, batch=1)
    assert packed is not None
    y, state = call(tensors, Documents.from_ids(packed.ids, torch.tensor([before])))
    for first, last in ((0, 37), (37, 137), (137, 200)):
        part = part_of(tensors, first, last)
        if first > 0 or before == 0:
            del part["initial_state"]
        alone, final = call(part, None)
        assert torch.equal(alone, y[:, first:last])
    assert torch.equal(final, state)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_another_document_never_leaks(kernels: str, decay: str, poison: float) -> None:
    """Not even NaN: columns 0-69, 90-99 and the state belong to others. A is everyone's: so is its gradient."""

    def ours(fill: float) -> list[Tensor]:
        leaves = inputs(100, decay, batch=1, dtype=torch.float32)
        for name in set(leaves) - {"A"}:
            for outside in (slice(0, 70), slice(90, 100)):
                leaves[name][(slice(None), outside) if name != "initial_state" else ...] = fill
        leaves = {name: tensor.requires_grad_() for name, tensor in leaves.items()}
        docs = documents((0, 70, 90), 100, batch=1)
        assert docs is not None
        y, _ = call(leaves, Documents.from_ids(docs.ids))
        wanted = [leaf for name, leaf in leaves.items() if name != "A"]
        *grads, initial = torch.autograd.grad(y[:, 70:90].sum(), wanted)
        assert torch.equal(initial, torch.zeros_like(initial))
        return [y[:, 70:90], *(grad[:, 70:90] for grad in grads)]

    for got, expected in zip(ours(poison), ours(0.0), strict=True):
        assert torch.equal(got, expected)


def test_a_decay_of_zero_drops_even_infinity(kernels: str) -> None:
    tensors = inputs(70, batch=1, dtype=torch.float32)
    tensors["A"] = -torch.ones_like(tensors["A"])
    tensors["dt"][:, 66] = 200.0
    states = [
        call(tensors | {"initial_state": torch.full_like(tensors["initial_state"], f)}, None)[1]
        for f in (0.0, float("inf"))
    ]
    assert torch.equal(*states)


# --- spans: what ranks and segments rely on ---


def compose(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return left[0] * right[0], selective_scan.apply(right[0], left[1]) + right[1]


@quick
@given(data=st.data(), length=st.integers(1, 70), kind=st.sampled_from(["exp", "longhorn"]))
def test_spans_fold_to_the_row(data: st.DataObject, length: int, kind: str) -> None:
    """Carried over a cut, corrected after it, or folded by either grouping: the row in one pass."""
    opens = data.draw(st.sets(st.integers(0, length - 1), max_size=3))
    borders = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=2))) if length > 1 else []
    ids = torch.tensor([[int(t in opens) for t in range(length)]]).cumsum(1)
    docs = Documents.from_ids(ids, torch.tensor([data.draw(st.integers(0, 1))]))
    tensors = inputs(length, kind, batch=1, channels=4)
    y, final = call(tensors, docs)
    none = {name: t for name, t in tensors.items() if name != "initial_state"}
    carried = folded = tensors["initial_state"]
    outs, corrected, spans = [], [], []
    for first, last in zip([0, *borders], [*borders, length], strict=True):
        part, here = part_of(none, first, last), Documents.from_ids(ids[:, first:last], docs.positions()[:, first])
        out, carried = call(part | {"initial_state": carried}, here)
        local, state = call(part, here)
        gamma = selective_scan.gamma(*given_inputs(part), docs=here)
        outs.append(out)
        corrected.append(selective_scan.correct(local, *given_inputs(part), docs=here, incoming=folded))
        folded = selective_scan.apply(gamma, folded) + state
        spans.append((gamma, state))
    from_left, from_right = spans[0], spans[-1]
    for span in spans[1:]:
        from_left = compose(from_left, span)
    for span in reversed(spans[:-1]):
        from_right = compose(span, from_right)
    whole = selective_scan.gamma(*given_inputs(tensors), docs=docs), call(none, docs)[1]
    pairs = [(torch.cat(outs, 1), y), (torch.cat(corrected, 1), y), (carried, final), (folded, final)]
    pairs += [*zip(from_left, whole, strict=True), *zip(from_right, whole, strict=True)]
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    assert not docs.starts().any() or (whole[0] == 0).all()


def test_correct_and_gamma_have_the_gradients_of_the_op(kernels: str, decay: str) -> None:
    tensors, docs = inputs(20, decay), documents((), 20)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    none = {name: t for name, t in leaves.items() if name != "initial_state"}
    expected = call(leaves, docs)
    y, state = call(none, docs)
    arguments, initial = given_inputs(leaves), leaves["initial_state"]
    corrected = selective_scan.correct(y, *arguments, docs=docs, incoming=initial)
    final = selective_scan.apply(selective_scan.gamma(*arguments, docs=docs), initial) + state
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in expected]
    got = torch.autograd.grad((corrected, final), list(leaves.values()), weights)
    for one, other in zip(got, torch.autograd.grad(expected, list(leaves.values()), weights), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_reverse_fold_is_the_gradient_of_the_fold() -> None:
    gamma, state, grad = (torch.randn(2, 3, 4, dtype=torch.float64).requires_grad_() for _ in range(3))
    by_gamma, by_state = torch.autograd.grad(selective_scan.apply(gamma, state), (gamma, state), grad)
    torch.testing.assert_close(selective_scan.outer(grad, state), by_gamma)
    torch.testing.assert_close(selective_scan.transpose(gamma, grad), by_state)
    infinite = torch.full((1, 2, 1), float("inf"))
    assert selective_scan.apply(torch.tensor([[[0.0], [1.0]]]), infinite).flatten().tolist() == [0.0, float("inf")]


def test_steps_are_the_parallel_form(kernels: str, decay: str) -> None:
    tensors = inputs(9, decay)
    y, final = call(tensors, None)
    state, outs = tensors["initial_state"], []
    for t in range(9):
        arguments = [v if i == 2 or v is None else v[:, t] for i, v in enumerate(given_inputs(tensors))]
        out, state = selective_scan.step(*arguments, state=state)
        outs.append(out)
    torch.testing.assert_close(torch.stack(outs, dim=1), y, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(state, final, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("argument", "value", "says"),
    [
        ("x", torch.zeros(2, 7), r"x: expected shape \[\*, \*, \*\], got \[2, 7\]"),
        ("x", torch.zeros(2, 7, 6, dtype=torch.int64), "x: expected a floating dtype, got torch.int64"),
        ("dt", torch.zeros(2, 7, 5), r"dt: expected shape \[2, 7, 6\], got \[2, 7, 5\]"),
        ("A", torch.zeros(6, 4), r"A: expected shape \[6, 3\], got \[6, 4\]"),
        ("B", torch.zeros(2, 7, 4, 3), r"C: expected shape \[2, 7, 4, 3\], got \[2, 7, 2, 3\]"),
        ("initial_state", torch.zeros(2, 3, 6), r"initial_state: expected shape \[2, 6, 3\], got \[2, 3, 6\]"),
        ("dt", torch.zeros(2, 7, 6, device="meta"), "dt: expected device cpu as x, got meta"),
    ],
)
def test_bad_input_is_one_line(argument: str, value: Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=f"^selective_scan: {says}$"):
        call(inputs(7, dtype=torch.float32) | {argument: value}, None)


def test_the_decay_must_fit_a() -> None:
    arguments = given_inputs(inputs(7))
    with pytest.raises(ValueError, match=r"^selective_scan: A: expected None with decay=longhorn, got a tensor$"):
        selective_scan(*arguments, decay="longhorn")
    arguments[2] = None
    with pytest.raises(ValueError, match=r"^selective_scan: A: expected \[D, N\] with decay=exp, got None$"):
        selective_scan(*arguments, decay="exp")
    with pytest.raises(ValueError, match=r"^selective_scan: decay: expected one of exp, longhorn, got 'cosh'$"):
        selective_scan(*arguments, decay="cosh")
    three = torch.zeros(2, 7, 3, 4)
    with pytest.raises(ValueError, match=r"^selective_scan: B: expected groups that divide the 7 channels, got 3$"):
        selective_scan(torch.zeros(2, 7, 7), torch.zeros(2, 7, 7), None, three, three)


def test_cost_counts_the_states() -> None:
    shapes = ((1, 64, 6), (1, 64, 6), (6, 3), (1, 64, 2, 3), (1, 64, 2, 3))
    assert selective_scan.cost(*shapes).model_flops == 64 * 6 * (7 * 3 + 1)


def test_longhorns_decay_of_exactly_0_has_a_gradient(kernels: str) -> None:
    """1 - dt B^2 passes through 0: what the state would have added to the gradients of dt and B is still there."""
    x, dt, b = rand(1, 3, 2, seed=1), torch.ones(1, 3, 2).double(), torch.ones(1, 3, 1, 1).double()
    c, state = rand(1, 3, 1, 1, seed=2), rand(1, 2, 1, seed=3)
    leaves = [tensor.requires_grad_() for tensor in (x, dt, b, c, state)]
    assert torch.autograd.gradcheck(lambda x, dt, b, c, h: selective_scan(x, dt, None, b, c, initial_state=h), leaves)
