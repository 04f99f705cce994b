"""causal_conv1d: every backend against the fp64 definition, documents, carried tails, determinism."""

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

from lmtrain.ops import Documents, causal_conv1d, library

BACKENDS = ("reference", "cpu")
LENGTHS = (0, 1, 2, 3, 63, 64, 257)
CHANNELS = 21  # not a multiple of any vector width, wider than the widest


@pytest.fixture(params=BACKENDS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("LMTRAIN_KERNELS", request.param)
    return request.param


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that torch hands out uninitialised holds NaN."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)


def rand(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(
    batch: int, length: int, width: int, dtype: torch.dtype = torch.float64, channels: int = CHANNELS
) -> dict[str, Tensor]:
    return {
        "x": rand(batch, length, channels, seed=1, dtype=dtype),
        "weight": rand(channels, width, seed=2, dtype=dtype),
        "bias": rand(channels, seed=3, dtype=dtype),
        "initial_state": rand(batch, width - 1, channels, seed=4, dtype=dtype),
    }


def documents(kind: str, batch: int, length: int) -> Documents | None:
    """none; fresh: one document per row; edges: a border at every early and late column; carried: tail over two."""
    if kind == "none":
        return None
    column = torch.arange(length, dtype=torch.int32).expand(batch, length)
    if kind == "fresh":
        return Documents.from_ids(torch.zeros_like(column))
    if kind == "edges":
        return Documents.from_ids(column.clamp(max=3) + (column - length + 3).clamp(min=0), torch.full((batch,), 2))
    # row b has b + 1 columns of its document to the left: its tail spans two documents as long as W - 1 > b + 1
    return Documents.from_ids((column > 70).int(), torch.arange(batch) + 1)


def run(
    tensors: dict[str, Tensor], docs: Documents | None, activation: str = "silu", seed: int = 9
) -> dict[str, Tensor]:
    """y, tail, and the gradients of a random functional of both."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    y, tail = causal_conv1d(docs=docs, activation=activation, **leaves)
    outputs = {"y": y.detach(), "tail": tail.detach()}
    grads = [rand(*out.shape, seed=seed + i, dtype=out.dtype) for i, out in enumerate((y, tail))]
    found = torch.autograd.grad((y, tail), list(leaves.values()), grads, materialize_grads=True)
    return outputs | {f"grad_{name}": grad for name, grad in zip(leaves, found, strict=True)}


def definition(tensors: dict[str, Tensor], docs: Documents | None, activation: str = "silu") -> dict[str, Tensor]:
    """What ``run`` must give: the equation in fp64, token by token, with gradients by autograd."""
    leaves = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    x, weight = leaves["x"], leaves["weight"]
    (batch, length, channels), width = x.shape, weight.shape[1]
    tail = leaves.get("initial_state", x.new_zeros(batch, width - 1, channels))
    positions = None if docs is None else docs.positions().tolist()
    row = [[*tail[b], *x[b]] for b in range(batch)]
    columns = []
    for b in range(batch):
        for t in range(length):
            z = leaves["bias"] if "bias" in leaves else x.new_zeros(channels)
            for distance in range(width):
                if positions is None or distance <= positions[b][t]:
                    z = z + weight[:, width - 1 - distance] * row[b][width - 1 + t - distance]
            columns.append(z * torch.sigmoid(z) if activation == "silu" else z)
    y = torch.stack(columns).view(x.shape) if columns else x * weight.sum()
    final = torch.cat([tail, x], dim=1)[:, length:]
    dtype = tensors["x"].dtype
    grads = [rand(*out.shape, seed=9 + i, dtype=dtype).double() for i, out in enumerate((y, final))]
    found = torch.autograd.grad((y, final), list(leaves.values()), grads, materialize_grads=True, allow_unused=True)
    outputs = {"y": y.detach(), "tail": final.detach()}
    return outputs | {f"grad_{name}": grad for name, grad in zip(leaves, found, strict=True)}


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative RMS below ``tolerance`` for every tensor."""
    for name, want in expected.items():
        assert got[name].shape == want.shape, name
        if want.numel():
            error = (got[name].double() - want).square().mean().sqrt()
            scale = want.square().mean().sqrt().clamp(min=1e-3)
            assert error / scale < tolerance, f"{name}: relative RMS {float(error / scale):.2e}"


@pytest.mark.parametrize("docs", ["none", "fresh", "edges", "carried"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("width", [2, 3, 4])
def test_matches_definition(kernels: str, width: int, length: int, docs: str, poisoned: None) -> None:
    tensors, documented = inputs(2, length, width), documents(docs, 2, length)
    expected = definition(tensors, documented)
    assert_close(run(tensors, documented), expected, 1e-13)
    single = {name: tensor.float() for name, tensor in tensors.items()}
    assert_close(run(single, documented), definition(single, documented), 2e-6)


@pytest.mark.parametrize("missing", ["bias", "initial_state"])
@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("width", [1, 5, 16])
def test_optional_inputs(kernels: str, width: int, activation: str, missing: str, poisoned: None) -> None:
    tensors, docs = inputs(2, 9, width), documents("edges", 2, 9)
    del tensors[missing]
    assert_close(run(tensors, docs, activation), definition(tensors, docs, activation), 1e-13)


@pytest.mark.parametrize("channels", [0, 1, 515])
def test_channel_tiles(kernels: str, channels: int, poisoned: None) -> None:
    tensors, docs = inputs(1, 5, 4, torch.float32, channels), documents("carried", 1, 5)
    assert_close(run(tensors, docs), definition(tensors, docs), 2e-6)


def test_bf16_is_fp32_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMTRAIN_KERNELS", "cpu")
    tensors, docs = inputs(2, 150, 4, torch.bfloat16), documents("carried", 2, 150)
    half = run(tensors, docs)
    full = run({name: tensor.float() for name, tensor in tensors.items()}, docs)
    assert torch.equal(half["y"], full["y"].bfloat16())
    assert half["y"].dtype == half["tail"].dtype == torch.bfloat16
    assert_close(half, definition(tensors, docs), 5e-3)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 3.4e38, 1e-40]).bfloat16()[:, None, None]
    identity = {"x": special, "weight": torch.ones(1, 1, dtype=torch.bfloat16)}
    y, _ = causal_conv1d(**identity, activation="none")
    assert torch.equal(y.nan_to_num(7.0), special.nan_to_num(7.0))


def test_large_inputs_saturate(kernels: str) -> None:
    x = torch.tensor([-1e4, -90.0, -88.0, -20.0, 0.0, 20.0, 88.0, 1e4])[:, None, None]
    y, _ = causal_conv1d(x, torch.ones(1, 1))
    torch.testing.assert_close(y, torch.nn.functional.silu(x.double()).float(), rtol=1e-6, atol=1e-30)


def test_gradcheck_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMTRAIN_KERNELS", "reference")
    leaves = [tensor.requires_grad_() for tensor in inputs(2, 6, 3, channels=2).values()]
    docs = documents("edges", 2, 6)
    assert torch.autograd.gradcheck(lambda x, w, b, s: causal_conv1d(x, w, b, docs=docs, initial_state=s), leaves)


@pytest.mark.parametrize("optional", [True, False])
def test_opcheck(optional: bool) -> None:
    assert library.load() is None
    tensors, docs = inputs(2, 7, 4, torch.float32), documents("carried", 2, 7)
    x, weight, bias, tail = (tensor.requires_grad_() for tensor in tensors.values())
    extra = (bias, docs.positions(), tail) if optional else (None, None, None)
    library.backend("causal_conv1d", "cpu", torch.float32)  # registers fake and autograd
    torch.library.opcheck(torch.ops.lmtrain.causal_conv1d.default, (x, weight, *extra, "silu"))
    detached = [None if e is None else e.detach() for e in extra]
    grads = (torch.randn(2, 7, CHANNELS), torch.randn(2, 3, CHANNELS))
    arguments = (*grads, x.detach(), weight.detach(), *detached, "silu")
    torch.library.opcheck(torch.ops.lmtrain.causal_conv1d_backward.default, arguments)


def test_compiles_whole(kernels: str) -> None:
    tensors, docs = inputs(2, 7, 4, torch.float32), documents("carried", 2, 7)
    compiled = torch.compile(causal_conv1d, backend="aot_eager", fullgraph=True)
    y, tail = compiled(**tensors, docs=docs)
    expected_y, expected_tail = causal_conv1d(**tensors, docs=docs)
    assert torch.equal(tail, expected_tail)
    torch.testing.assert_close(y, expected_y)


def test_same_bits_for_any_thread_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMTRAIN_KERNELS", "cpu")
    tensors, docs = inputs(3, 300, 4, torch.float32, channels=600), documents("carried", 3, 300)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            results.append(run(tensors, docs))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


UNIT = """
import sys, torch
from lmtrain.ops import Documents, causal_conv1d
torch.manual_seed(0)
docs = Documents.from_ids((torch.arange(140) > 90).int().expand(2, 140), torch.tensor([1, 5]))
saved = {"unit": torch.ops.lmtrain.cpu_unit() if causal_conv1d(torch.zeros(1, 1, 1), torch.zeros(1, 1)) else None}
for dtype in (torch.float32, torch.float64):
    leaves = [torch.randn(s).to(dtype).requires_grad_() for s in ((2, 140, 37), (37, 4), (37,), (2, 3, 37))]
    outputs = causal_conv1d(*leaves[:3], docs=docs, initial_state=leaves[3])
    grads = torch.autograd.grad(outputs, leaves, [torch.randn(o.shape).to(dtype) for o in outputs])
    saved[str(dtype)] = [t.detach() for t in (*outputs, *grads)]
torch.save(saved, sys.argv[1])
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
        assert results[unit]["unit"] == unit
    generic = results.pop("generic")
    for other in results.values():
        for dtype, tolerance in (("torch.float32", 2e-6), ("torch.float64", 1e-14)):
            named = dict(enumerate(generic[dtype]))
            assert_close(dict(enumerate(other[dtype])), {i: t.double() for i, t in named.items()}, tolerance)


def test_strided_inputs_and_gradients(kernels: str) -> None:
    tensors, docs = inputs(2, 70, 4), documents("carried", 2, 70)
    strided = {
        "x": tensors["x"].transpose(1, 2).contiguous().transpose(1, 2),
        "weight": tensors["weight"].t().contiguous().t(),
        "bias": tensors["bias"].repeat_interleave(2)[::2],
        "initial_state": tensors["initial_state"].flip(1).flip(1).transpose(0, 1).contiguous().transpose(0, 1),
    }
    assert_close(run(strided, docs), definition(tensors, docs), 1e-13)
    x = tensors["x"].requires_grad_()
    y, tail = causal_conv1d(x, tensors["weight"], docs=docs)
    (expanded,) = torch.autograd.grad(y.sum() + tail.sum(), x, retain_graph=True)  # stride-0 gradients
    (dense,) = torch.autograd.grad((y, tail), x, (torch.ones_like(y), torch.ones_like(tail)))
    assert torch.equal(expanded, dense)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_another_document_never_leaks(kernels: str, poison: float) -> None:
    """Not even NaN: columns 0-4 and the tail belong to others, columns 5-9 are ours."""
    ids = torch.tensor([[0] * 5 + [1] * 5])
    docs = Documents.from_ids(ids)

    def ours(fill: float) -> list[Tensor]:
        leaves = inputs(1, 10, 4, torch.float32)
        leaves["x"][:, :5] = fill
        leaves["initial_state"][:] = fill
        leaves = {name: tensor.requires_grad_() for name, tensor in leaves.items()}
        y, _ = causal_conv1d(**leaves, docs=docs)
        grad_x, grad_tail = torch.autograd.grad(y[:, 5:].sum(), (leaves["x"], leaves["initial_state"]))
        assert torch.equal(grad_tail, torch.zeros_like(grad_tail))
        return [y[:, 5:], grad_x[:, 5:]]

    for got, expected in zip(ours(poison), ours(0.0), strict=True):
        assert torch.equal(got, expected)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), first=st.integers(0, 6), second=st.integers(0, 140), width=st.integers(1, 5))
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_calls_with_a_carried_tail_are_one(
    backend: str, data: st.DataObject, first: int, second: int, width: int
) -> None:
    length = first + second
    borders = data.draw(st.sets(st.integers(0, max(length - 1, 0)), max_size=4))
    opens = torch.tensor([[int(t in borders) for t in range(length)]], dtype=torch.int32).view(1, length)
    docs = Documents.from_ids(opens.cumsum(1), torch.tensor([data.draw(st.integers(0, 5))]))
    tensors = inputs(1, length, width, channels=3)
    x, tail = tensors.pop("x"), tensors.pop("initial_state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMTRAIN_KERNELS", backend)
        whole, final = causal_conv1d(x, **tensors, docs=docs, initial_state=tail)
        left = Documents.from_ids(docs.ids[:, :first], docs.before)
        y_left, carried = causal_conv1d(x[:, :first], **tensors, docs=left, initial_state=tail)
        before = docs.positions()[:, first] if second else torch.zeros(1, dtype=torch.int32)
        right = Documents.from_ids(docs.ids[:, first:], before)
        y_right, tail_right = causal_conv1d(x[:, first:], **tensors, docs=right, initial_state=carried)
    assert torch.equal(tail_right, final)
    torch.testing.assert_close(torch.cat([y_left, y_right], 1), whole, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("argument", "value", "says"),
    [
        ("x", torch.zeros(2, 7), r"x: expected shape \[\*, \*, \*\], got \[2, 7\]"),
        ("x", torch.zeros(2, 7, 4, dtype=torch.int64), "x: expected a floating dtype, got torch.int64"),
        ("weight", torch.zeros(5, 4), r"weight: expected shape \[4, \*\], got \[5, 4\]"),
        ("weight", torch.zeros(4, 17), "weight: expected 1 to 16 taps, got 17"),
        ("bias", torch.zeros(3), r"bias: expected shape \[4\], got \[3\]"),
        ("initial_state", torch.zeros(2, 2, 4), r"initial_state: expected shape \[2, 3, 4\], got \[2, 2, 4\]"),
        ("initial_state", torch.zeros(2, 3, 4).double(), "initial_state: expected dtype torch.float32"),
        ("weight", torch.zeros(4, 4, device="meta"), "weight: expected device cpu as x, got meta"),
        ("docs", documents("fresh", 2, 6), r"docs.ids: expected shape \[2, 7\], got \[2, 6\]"),
        ("activation", "gelu", "activation: expected one of none, silu, got 'gelu'"),
    ],
)
def test_bad_input_is_one_line(argument: str, value: object, says: str) -> None:
    good = {"x": torch.zeros(2, 7, 4), "weight": torch.zeros(4, 4)}
    with pytest.raises(ValueError, match=f"^causal_conv1d: {says}"):
        causal_conv1d(**(good | {argument: value}))


def test_cost_counts_two_flops_a_tap() -> None:
    cost = causal_conv1d.cost((2, 7, 5), (5, 4))
    assert (cost.model_flops, cost.bytes) == (2 * 4 * 70, 4 * (2 * 70 + 20))
