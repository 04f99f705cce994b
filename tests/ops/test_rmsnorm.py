"""rmsnorm: every backend against the fp64 definition with all gradients, groups, gates, determinism."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lmtrain.ops import library
from lmtrain.ops.rmsnorm import rmsnorm

BACKENDS = ("reference", "cpu")
EPS = 1e-5
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 5e-3}


@pytest.fixture(params=BACKENDS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("LMTRAIN_KERNELS", request.param)
    return request.param


def rand(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(*shape: int, gated: bool, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    tensors = {"x": rand(*shape, seed=1, dtype=dtype), "weight": rand(shape[-1], seed=2, dtype=dtype)}
    return tensors | ({"gate": 2 * rand(*shape, seed=3, dtype=dtype)} if gated else {})


def run(tensors: dict[str, Tensor], num_groups: int = 1, **grad: Any) -> dict[str, Tensor]:
    """y, and the gradients of a random functional of it."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    y = rmsnorm(eps=EPS, num_groups=num_groups, **leaves)
    found = torch.autograd.grad(y, list(leaves.values()), grad.get("grad", rand(*y.shape, seed=9, dtype=y.dtype)))
    return {"y": y.detach()} | {f"grad_{name}": value for name, value in zip(leaves, found, strict=True)}


def definition(tensors: dict[str, Tensor], num_groups: int = 1) -> dict[str, Tensor]:
    """What ``run`` must give: the equation in fp64, group by group, with gradients by autograd."""
    leaves = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    u = leaves["x"]
    if "gate" in leaves:
        u = u * leaves["gate"] * torch.sigmoid(leaves["gate"])
    normed = [part / (part.pow(2).mean(-1, keepdim=True) + EPS).sqrt() for part in u.chunk(num_groups, dim=-1)]
    y = torch.cat(normed, dim=-1) * leaves["weight"]
    grad = rand(*y.shape, seed=9, dtype=tensors["x"].dtype).double()
    found = torch.autograd.grad(y, list(leaves.values()), grad)
    return {"y": y.detach()} | {f"grad_{name}": value for name, value in zip(leaves, found, strict=True)}


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative RMS below ``tolerance`` for every tensor."""
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        assert got[name].shape == want.shape, name
        if want.numel():
            error = (got[name].double() - want).square().mean().sqrt()
            scale = want.square().mean().sqrt().clamp(min=1e-3)
            assert error / scale < tolerance, f"{name}: relative RMS {float(error / scale):.2e}"


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("shape", "num_groups"),
    [((2, 0, 5), 1), ((7,), 1), ((9, 4), 2), ((2, 40, 21), 3), ((1, 33, 48), 3), ((65, 64), 1), ((2, 3, 5, 515), 1)],
)
def test_matches_definition(
    kernels: str, shape: tuple[int, ...], num_groups: int, gated: bool, dtype: torch.dtype
) -> None:
    tensors = inputs(*shape, gated=gated, dtype=dtype)
    got = run(tensors, num_groups)
    assert all(value.dtype == dtype for value in got.values())
    assert_close(got, definition(tensors, num_groups), TOLERANCE[dtype])


def test_bf16_is_fp32_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMTRAIN_KERNELS", "cpu")
    half = inputs(5, 70, gated=True, dtype=torch.bfloat16)
    full = {name: tensor.float() for name, tensor in half.items()}
    assert torch.equal(run(half, 2)["y"], run(full, 2)["y"].bfloat16())


def test_gate_and_weight_of_other_dtypes(kernels: str) -> None:
    tensors = inputs(5, 70, gated=True, dtype=torch.float32)
    tensors |= {name: tensors[name].bfloat16() for name in ("gate", "weight")}
    got = run(tensors, 2)
    assert got["y"].dtype == got["grad_x"].dtype == torch.float32 and got["grad_gate"].dtype == torch.bfloat16
    expected = definition(tensors, 2)
    assert_close({"y": got["y"]}, {"y": expected["y"]}, TOLERANCE[torch.float32])
    assert_close(got, expected, TOLERANCE[torch.bfloat16])


def test_small_and_large_rows(kernels: str) -> None:
    """Where eps rules, where it does not, and rows of zeros."""
    tensors = inputs(4, 64, gated=False, dtype=torch.float32)
    tensors["x"] *= torch.tensor([1e-6, 1.0, 1e6, 0.0])[:, None]
    got, expected = run(tensors), definition(tensors)
    for row in range(4):
        pick = ("y", "grad_x")
        assert_close({n: got[n][row] for n in pick}, {n: expected[n][row] for n in pick}, TOLERANCE[torch.float32])
    assert got["y"][3].count_nonzero() == 0


def test_rows_and_groups_are_independent_to_the_bit(kernels: str) -> None:
    """Not even NaN reaches another row or group."""
    clean = inputs(6, 40, gated=True, dtype=torch.float32)
    poisoned = clean | {"x": clean["x"].clone()}
    poisoned["x"][2, 20:] = float("nan")
    got, expected = run(poisoned, 2), run(clean, 2)
    for name in ("y", "grad_x", "grad_gate"):
        others = torch.ones(6, 40, dtype=torch.bool)
        others[2, 20:] = False
        assert torch.equal(got[name][others], expected[name][others])
        assert got[name][2, 20:].isnan().all()


@pytest.mark.parametrize("gated", [False, True])
def test_gradcheck(kernels: str, gated: bool) -> None:
    leaves = [tensor.requires_grad_() for tensor in inputs(3, 6, gated=gated).values()]

    def apply(x: Tensor, weight: Tensor, gate: Tensor | None = None) -> Tensor:
        return rmsnorm(x, weight, eps=EPS, gate=gate, num_groups=2)

    assert torch.autograd.gradcheck(apply, leaves)


@pytest.mark.parametrize("gated", [False, True])
def test_opcheck(gated: bool) -> None:
    assert library.load() is None
    assert library.backend("rmsnorm", "cpu", torch.float32) == "cpu"  # registers fake and autograd
    x, weight, *gate = (
        tensor.requires_grad_() for tensor in inputs(2, 7, 6, gated=gated, dtype=torch.float32).values()
    )
    torch.library.opcheck(torch.ops.lmtrain.rmsnorm.default, (x, weight, *(gate or [None]), EPS, 2))
    x, weight, *gate = (tensor.detach() for tensor in (x, weight, *gate))
    arguments = (torch.randn(2, 7, 6), x, weight, *(gate or [None]), torch.rand(14, 2), 2)
    torch.library.opcheck(torch.ops.lmtrain.rmsnorm_backward.default, arguments)


def test_compiles_whole(kernels: str) -> None:
    tensors = inputs(2, 7, 6, gated=True, dtype=torch.float32)
    compiled = torch.compile(rmsnorm, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**tensors, eps=EPS, num_groups=2), rmsnorm(**tensors, eps=EPS, num_groups=2))


def test_recomputed_in_the_backward_pass(kernels: str) -> None:
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs(4, 6, gated=True).items()}
    grads = []
    for recompute in (False, True):
        run_it = (lambda f: checkpoint(f, use_reentrant=False)) if recompute else (lambda f: f())
        y = run_it(lambda: rmsnorm(**leaves, eps=EPS))
        grads.append(torch.autograd.grad(y.square().sum(), list(leaves.values())))
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*grads, strict=True))


def test_same_bits_for_any_thread_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMTRAIN_KERNELS", "cpu")
    tensors = inputs(3, 300, 240, gated=True, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append(run(tensors, 4))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_strided_inputs_and_gradients(kernels: str) -> None:
    tensors = inputs(4, 30, 12, gated=True)
    wide = torch.cat([tensors["gate"], tensors["x"]], dim=-1)
    strided = {
        "x": wide[..., 12:],
        "weight": tensors["weight"].repeat_interleave(2)[::2],
        "gate": tensors["gate"].transpose(0, 1).contiguous().transpose(0, 1),
    }
    assert_close(run(strided, 3), definition(tensors, 3), TOLERANCE[torch.float64])
    broadcast = torch.ones(()).double().expand(4, 30, 12)
    expanded, dense = run(tensors, 3, grad=broadcast), run(tensors, 3, grad=broadcast.contiguous())
    assert all(torch.equal(expanded[name], dense[name]) for name in dense)


UNIT = """
import sys, torch
from lmtrain.ops.rmsnorm import rmsnorm
torch.manual_seed(0)
saved = {}
for dtype in (torch.float32, torch.float64):
    leaves = [torch.randn(s).to(dtype).requires_grad_() for s in ((40, 75), (75,), (40, 75))]
    y = rmsnorm(*leaves[:2], eps=1e-5, gate=leaves[2], num_groups=3)
    grads = torch.autograd.grad(y, leaves, torch.randn(y.shape).to(dtype))
    saved[str(dtype)] = [t.detach() for t in (y, *grads)]
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
    generic = results.pop("generic")
    for other in results.values():
        for dtype in (torch.float32, torch.float64):
            got, expected = (dict(enumerate(found[str(dtype)])) for found in (other, generic))
            assert_close(
                {str(i): t for i, t in got.items()}, {str(i): t.double() for i, t in expected.items()}, TOLERANCE[dtype]
            )


@pytest.mark.parametrize(
    ("argument", "value", "says"),
    [
        ("x", torch.zeros(2, 6, dtype=torch.int32), "x: expected a floating dtype, got torch.int32"),
        ("x", torch.zeros(2, 0), r"x: expected shape \[..., D\] with D at least 1, got \[2, 0\]"),
        ("weight", torch.zeros(5), r"weight: expected shape \[6\], got \[5\]"),
        ("gate", torch.zeros(2, 5), r"gate: expected shape \[2, 6\], got \[2, 5\]"),
        ("num_groups", 4, "num_groups: expected a divisor of the last dim 6, got 4"),
        ("num_groups", 0, "num_groups: expected a divisor of the last dim 6, got 0"),
        ("weight", torch.zeros(6, device="meta"), "weight: expected device cpu as x, got meta"),
    ],
)
def test_bad_input_is_named(argument: str, value: Any, says: str) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(2, 6), "weight": torch.zeros(6)} | {argument: value}
    with pytest.raises(ValueError, match=f"rmsnorm: {says}"):
        rmsnorm(**arguments, eps=EPS)


def test_cost_counts_every_value_once() -> None:
    plain, gated = (rmsnorm.cost((2, 3, 8), (8,), gated=gated) for gated in (False, True))
    assert plain.bytes == 4 * (2 * 48 + 8) and gated.bytes == 4 * (3 * 48 + 8)
    assert gated.model_flops > plain.model_flops > 0
