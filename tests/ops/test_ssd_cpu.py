"""ssd's compiled CPU backend against the fp64 recurrence: outputs, gradients, documents, states, determinism."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmtrain.ops import Documents, library, ssd
from lmtrain.ops.ssd import recurrence

NAMES = ("x", "log_a", "B", "C", "initial_state")
DECAYS = {"weak": 0.01, "middle": 0.7, "strong": 25.0}
BORDERS = {"none": None, "fresh": (0,), "edges": (1, 5, 6, 63, 64, 65, 66, 127, 130, 190)}


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMTRAIN_KERNELS", "cpu")
    assert library.backend("ssd", "cpu", torch.float32) == "cpu", "run `make install`"


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
    *,
    batch: int = 2,
    heads: int = 4,
    groups: int = 2,
    head_dim: int = 32,
    d_state: int = 32,
    decay: float = 0.7,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length + 7 * head_dim + d_state)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = (
        rand(batch, length, heads, head_dim),
        -decay * rand(batch, length, heads).abs(),
        rand(batch, length, groups, d_state) / d_state**0.5,
        rand(batch, length, groups, d_state),
        rand(batch, heads, d_state, head_dim),
    )
    return {name: tensor.to(dtype) for name, tensor in zip(NAMES, tensors, strict=True)}


def documents(borders: tuple[int, ...] | None, length: int, batch: int = 2) -> Documents | None:
    """A document starts at every border; the last row continues one from before its column 0, the others none."""
    if borders is None:
        return None
    ids = torch.zeros(batch, length, dtype=torch.int32)
    for border in borders:
        ids[:, border:] += 1
    return Documents.from_ids(ids, torch.tensor([0] * (batch - 1) + [3]))


def run(tensors: dict[str, Tensor], docs: Documents | None, function: str = "op", chunk: int = 64) -> dict[str, Tensor]:
    """y, state, and the gradients of a random functional of both; ``definition``: by the recurrence in fp64."""
    dtype = tensors["x"].dtype
    exact = function == "definition"
    leaves = {n: (t.detach().double() if exact else t.detach()).requires_grad_() for n, t in tensors.items()}
    arguments, initial = list(leaves.values())[:4], leaves.get("initial_state")
    if exact:
        y, state = recurrence(*arguments, docs, initial)
    else:
        y, state = ssd(*arguments, docs=docs, initial_state=initial, chunk=chunk)
    generator = torch.Generator().manual_seed(9)
    grads = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(dtype).to(o.dtype) for o in (y, state)]
    used = [(out, grad) for out, grad in zip((y, state), grads, strict=True) if out.requires_grad]
    outs, grads = zip(*used, strict=True)
    found = torch.autograd.grad(outs, list(leaves.values()), grads, materialize_grads=True, allow_unused=True)
    gradients = {f"grad_{name}": grad for name, grad in zip(leaves, found, strict=True)}
    return {"y": y.detach(), "state": state.detach()} | gradients


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative RMS below ``tolerance`` for every tensor."""
    for name, want in expected.items():
        assert got[name].shape == want.shape, name
        if want.numel():
            error = (got[name].double() - want).square().mean().sqrt()
            scale = want.square().mean().sqrt().clamp(min=1e-3)
            assert error / scale < tolerance, f"{name}: relative RMS {float(error / scale):.2e}"


def both_precisions(tensors: dict[str, Tensor], docs: Documents | None) -> None:
    """Measured, worst over these tests: fp32 9e-7 (log_a's gradient; all others 3e-7), fp64 9e-15."""
    single = {name: tensor.float() for name, tensor in tensors.items()}
    assert_close(run(single, docs), run(single, docs, "definition"), 2e-6)
    assert_close(run(tensors, docs), run(tensors, docs, "definition"), 1e-13)


@pytest.mark.parametrize("borders", BORDERS.values(), ids=BORDERS)
@pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS)
@pytest.mark.parametrize("length", [1, 63, 65, 200])
def test_matches_definition(length: int, decay: float, borders: tuple[int, ...] | None, poisoned: None) -> None:
    both_precisions(inputs(length, decay=decay), documents(borders, length))


@pytest.mark.parametrize(
    "sizes",
    [
        {"length": 64, "groups": 1},
        {"length": 64, "groups": 4, "head_dim": 5, "d_state": 3},
        {"length": 66, "heads": 3, "groups": 1, "head_dim": 33, "d_state": 17},
        {"length": 40, "heads": 1, "groups": 1, "head_dim": 1, "d_state": 1},
        {"length": 80, "head_dim": 20, "d_state": 48},
        {"length": 70, "heads": 21, "groups": 1, "head_dim": 4, "d_state": 8},
    ],
    ids=str,
)
def test_sizes(sizes: dict[str, int], poisoned: None) -> None:
    tensors = inputs(**sizes)
    both_precisions(tensors, documents(BORDERS["edges"], sizes["length"]))
    del tensors["initial_state"]
    both_precisions(tensors, documents(None, sizes["length"]))


def test_a_long_row(poisoned: None) -> None:
    both_precisions(inputs(1000, batch=1, heads=2, groups=1, decay=0.02), None)


@pytest.mark.parametrize("docs", [None, documents((), 0)])
def test_an_empty_row_hands_its_state_on(docs: Documents | None, poisoned: None) -> None:
    tensors = inputs(0, dtype=torch.float32)
    y, state = ssd(*(tensors[name] for name in NAMES[:4]), docs=docs, initial_state=tensors["initial_state"])
    assert y.shape == (2, 0, 4, 32)
    assert torch.equal(state, tensors["initial_state"])
    assert_close(run(tensors, docs), run(tensors, docs, "definition"), 1e-7)
    y, state = ssd(*(tensors[name] for name in NAMES[:4]), docs=docs)
    assert torch.equal(state, torch.zeros_like(state))


@pytest.mark.parametrize("chunk", [1, 7, 16, 1000])
def test_chunk_does_not_change_the_function(chunk: int) -> None:
    tensors, docs = inputs(90), documents((17, 70), 90)
    assert_close(run(tensors, docs, chunk=chunk), run(tensors, docs, "definition"), 1e-13)


def test_gradcheck() -> None:
    leaves = [tensor.requires_grad_() for tensor in inputs(20, head_dim=3, d_state=2).values()]
    docs = documents((5, 18), 20)
    assert torch.autograd.gradcheck(lambda *t: ssd(*t[:4], docs=docs, initial_state=t[4], chunk=8), leaves)


@pytest.mark.parametrize("optional", [True, False])
def test_opcheck(optional: bool) -> None:
    tensors, docs = inputs(70, dtype=torch.float32), documents((5, 65), 70)
    *leaves, initial = (tensor.requires_grad_() for tensor in tensors.values())
    extra = (docs.starts(), initial) if optional else (None, None)
    torch.library.opcheck(torch.ops.lmtrain.ssd.default, (*leaves, *extra, 64))
    arguments = [None if t is None else t.detach() for t in (*leaves, *extra)]
    states = torch.ops.lmtrain.ssd(*arguments, 64)[2]
    assert states.shape == (2, 2 if optional else 1, 4, 32, 32)
    grads = (torch.randn(2, 70, 4, 32), torch.randn(2, 4, 32, 32))
    torch.library.opcheck(torch.ops.lmtrain.ssd_backward.default, (*grads, *arguments, states, 64))


def test_compiles_whole() -> None:
    tensors, docs = inputs(70, dtype=torch.float32), documents((5, 65), 70)
    compiled = torch.compile(ssd, backend="aot_eager", fullgraph=True)
    arguments, initial = [tensors[name] for name in NAMES[:4]], tensors["initial_state"]
    for got, expected in zip(
        compiled(*arguments, docs=docs, initial_state=initial),
        ssd(*arguments, docs=docs, initial_state=initial),
        strict=True,
    ):
        assert torch.equal(got, expected)


def test_bf16_values_are_computed_in_fp32() -> None:
    tensors, docs = inputs(100, dtype=torch.float32), documents((70,), 100)
    half = {name: tensor if name == "initial_state" else tensor.bfloat16() for name, tensor in tensors.items()}
    got, full = run(half, docs), run({name: tensor.float() for name, tensor in half.items()}, docs)
    assert got["y"].dtype == got["grad_B"].dtype == torch.bfloat16 and got["state"].dtype == torch.float32
    assert torch.equal(got["y"], full["y"].bfloat16()) and torch.equal(got["state"], full["state"])
    assert_close(got, run(half, docs, "definition"), 1e-2)


@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (22, 1)])
def test_same_bits_for_any_thread_count(heads: int, groups: int) -> None:
    tensors = inputs(700, heads=heads, groups=groups, dtype=torch.float32)
    docs = documents((100, 101, 500), 700)
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


UNIT = """
import sys, torch
from lmtrain.ops import Documents, ssd
torch.manual_seed(0)
docs = Documents.from_ids((torch.arange(140) > 90).int().expand(2, 140), torch.tensor([0, 5]))
saved = {}
for dtype in (torch.float32, torch.float64):
    shapes = ((2, 140, 4, 21), (2, 140, 4), (2, 140, 2, 19), (2, 140, 2, 19), (2, 4, 19, 21))
    leaves = [torch.randn(s).to(dtype) for s in shapes]
    leaves[1] = -leaves[1].abs()
    leaves = [leaf.requires_grad_() for leaf in leaves]
    outputs = ssd(*leaves[:4], docs=docs, initial_state=leaves[4])
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


def test_strided_inputs_and_gradients() -> None:
    tensors, docs = inputs(70), documents((30,), 70)
    strided = {n: t.transpose(1, -1).contiguous().transpose(1, -1).requires_grad_() for n, t in tensors.items()}
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    gradients = []
    for layout, expand in ((strided, True), (leaves, False)):
        y, state = ssd(*(layout[n] for n in NAMES[:4]), docs=docs, initial_state=layout["initial_state"])
        outs = (y.sum(), state.sum()) if expand else (y, state)  # the gradients of sums have stride 0
        grads = [torch.ones_like(out) for out in outs]
        gradients.append(torch.autograd.grad(outs, list(layout.values()), grads))
    for got, expected in zip(*gradients, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("before", [0, 3])
def test_a_packed_document_has_the_bits_of_one_alone(before: int) -> None:
    """Documents 0, 1, 2 of 37, 100 and 63 tokens in one row; alone, each without the others and without docs."""
    tensors = inputs(200, batch=1, dtype=torch.float32)
    docs = documents((37, 137), 200, batch=1)
    assert docs is not None
    docs = Documents.from_ids(docs.ids, torch.tensor([before]))
    packed = run(tensors, docs)
    spans = ((0, 37), (37, 137), (137, 200))
    for index, (begin, end) in enumerate(spans):
        part = {name: tensors[name][:, begin:end] for name in NAMES[:4]}
        carried = index == 0 and before > 0
        if carried:
            part["initial_state"] = tensors["initial_state"]
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in part.items()}
        y, state = ssd(*(leaves[n] for n in NAMES[:4]), initial_state=leaves.get("initial_state"))
        generator = torch.Generator().manual_seed(9)
        grad_y, grad_state = (
            torch.randn(shape, generator=generator, dtype=torch.float64).float()
            for shape in (packed["y"].shape, packed["state"].shape)
        )
        last = end == 200
        grads = (grad_y[:, begin:end], grad_state if last else torch.zeros_like(state))
        found = torch.autograd.grad((y, state), list(leaves.values()), grads)
        assert torch.equal(y, packed["y"][:, begin:end])
        assert not last or torch.equal(state, packed["state"])
        for name, grad in zip(leaves, found, strict=True):
            expected = packed[f"grad_{name}"]
            assert torch.equal(grad, expected if name == "initial_state" else expected[:, begin:end]), name


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_another_document_never_leaks(poison: float) -> None:
    """Not even NaN: columns 0-69 and the state belong to others, columns 70-99 are ours."""

    def ours(fill: float) -> list[Tensor]:
        leaves = inputs(100, batch=1, dtype=torch.float32)
        for name in NAMES:
            leaves[name][(slice(None), slice(0, 70)) if name != "initial_state" else ...] = fill
        leaves["log_a"][:, 70] = fill  # acts on nothing
        leaves = {name: tensor.requires_grad_() for name, tensor in leaves.items()}
        docs = Documents.from_ids((torch.arange(100) >= 70)[None], torch.tensor([0]))
        y, state = ssd(*(leaves[n] for n in NAMES[:4]), docs=docs, initial_state=leaves["initial_state"])
        *grads, grad_initial = torch.autograd.grad(y[:, 70:].sum() + state.sum(), list(leaves.values()))
        assert torch.equal(grad_initial, torch.zeros_like(grad_initial))
        return [y[:, 70:], state, *(grad[:, 70:] for grad in grads)]

    for got, expected in zip(ours(poison), ours(0.0), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("log_a", [-float("inf"), -200.0])
def test_a_decay_of_zero_drops_even_infinity(log_a: float) -> None:
    tensors = inputs(70, batch=1, dtype=torch.float32)
    tensors["log_a"][:, 66] = log_a
    arguments, states = [tensors[name] for name in NAMES[:4]], []
    for fill in (0.0, float("inf")):
        y, state = ssd(*arguments, initial_state=torch.full_like(tensors["initial_state"], fill))
        states.append(state)
        assert bool(y[:, :66].isfinite().all()) == (fill == 0)
    assert torch.equal(*states)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data(), first=st.integers(0, 70), second=st.integers(0, 140))
def test_two_calls_with_a_carried_state_are_one(data: st.DataObject, first: int, second: int) -> None:
    length = first + second
    borders = data.draw(st.sets(st.integers(0, max(length - 1, 0)), max_size=4))
    opens = torch.tensor([[int(t in borders) for t in range(length)]], dtype=torch.int32).view(1, length)
    docs = Documents.from_ids(opens.cumsum(1), torch.tensor([data.draw(st.integers(0, 1))]))
    tensors = inputs(length, batch=1, heads=2, head_dim=3, d_state=2)
    arguments, initial = [tensors[name] for name in NAMES[:4]], tensors["initial_state"]
    whole, final = ssd(*arguments, docs=docs, initial_state=initial)
    left = Documents.from_ids(docs.ids[:, :first], docs.before)
    y_left, carried = ssd(*(t[:, :first] for t in arguments), docs=left, initial_state=initial)
    before = docs.positions()[:, first] if second else torch.zeros(1, dtype=torch.int32)
    right = Documents.from_ids(docs.ids[:, first:], before)
    y_right, state = ssd(*(t[:, first:] for t in arguments), docs=right, initial_state=carried)
    torch.testing.assert_close(torch.cat([y_left, y_right], 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("argument", "value", "says"),
    [
        ("x", torch.zeros(2, 7, 4), r"x: expected shape \[\*, \*, \*, \*\], got \[2, 7, 4\]"),
        ("x", torch.zeros(2, 7, 4, 3, dtype=torch.int64), "x: expected a floating dtype, got torch.int64"),
        ("log_a", torch.zeros(2, 7, 3), r"log_a: expected shape \[2, 7, 4\], got \[2, 7, 3\]"),
        ("b", torch.zeros(2, 6, 2, 5), r"B: expected shape \[2, 7, \*, \*\], got \[2, 6, 2, 5\]"),
        ("b", torch.zeros(2, 7, 3, 5), r"C: expected shape \[2, 7, 3, 5\], got \[2, 7, 2, 5\]"),
        ("c", torch.zeros(2, 7, 2, 6), r"C: expected shape \[2, 7, 2, 5\], got \[2, 7, 2, 6\]"),
        ("log_a", torch.zeros(2, 7, 4, device="meta"), "log_a: expected device cpu as x, got meta"),
        ("initial_state", torch.zeros(2, 4, 3, 5), r"initial_state: expected shape \[2, 4, 5, 3\], got \[2, 4, 3, 5\]"),
        ("docs", documents((3,), 6), r"docs.ids: expected shape \[2, 7\], got \[2, 6\]"),
        ("chunk", 0, "chunk: expected at least 1, got 0"),
    ],
)
def test_bad_input_is_one_line(argument: str, value: object, says: str) -> None:
    good = {
        "x": torch.zeros(2, 7, 4, 3),
        "log_a": torch.zeros(2, 7, 4),
        "b": torch.zeros(2, 7, 2, 5),
        "c": torch.zeros(2, 7, 2, 5),
    }
    keywords = good | {argument: value}
    arguments = [keywords.pop(name) for name in good]
    with pytest.raises(ValueError, match=f"^ssd: {says}"):
        ssd(*arguments, **keywords)


def test_no_heads() -> None:
    b = torch.zeros(1, 1, 1, 3)
    with pytest.raises(ValueError, match=r"^ssd: x: expected at least one head, got 0$"):
        ssd(torch.zeros(1, 1, 0, 2), torch.zeros(1, 1, 0), b, b)
    state, states = torch.zeros(1, 0, 3, 2), torch.zeros(1, 0, 0, 3, 16)
    x, log_a = torch.zeros(1, 1, 0, 2), torch.zeros(1, 1, 0)
    with pytest.raises(RuntimeError, match="ssd: x: expected at least one head"):
        torch.ops.lmtrain.ssd_backward(x, state, x, log_a, b, b, None, None, states, 8)


def test_groups_must_divide_the_heads() -> None:
    b = torch.zeros(2, 7, 3, 5)
    with pytest.raises(ValueError, match=r"^ssd: B: expected groups that divide the 4 heads, got 3"):
        ssd(torch.zeros(2, 7, 4, 3), torch.zeros(2, 7, 4), b, b)


@pytest.mark.parametrize(("heads", "groups"), [(64, 1), (57, 1), (128, 8)])
def test_many_heads_share_blocks_of_eight(heads: int, groups: int) -> None:
    """From 57 heads of a group on the backward takes eight together."""
    tensors = inputs(150, batch=1, heads=heads, groups=groups, head_dim=9, d_state=17)
    both_precisions(tensors, documents((70,), 150, batch=1))
