"""The kernels as compiled for each vector unit: the same numbers whichever this CPU has."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lmtrain.ops import library
from tests.ops.conftest import RUNNING
from tests.ops.op_case import Tensors, documents
from tests.ops.scan_cases import assert_close

ROOT = Path(__file__).parents[2]
Results = dict[str, Tensors]


def save(path: str) -> None:
    """Run in a process of its own: outputs and all gradients of every case by the unit that the environment names."""
    saved: dict[str, Any] = {}
    for name, op in RUNNING.items():
        if op.backend.name == "cpu":
            assert library.backend(op.case.op, "cpu", torch.float32) == "cpu"
            for dtype in (torch.float32, torch.float64):
                tensors = {n: t.to(dtype) for n, t in op.case.inputs(140).items()}
                saved[f"{name} {dtype}"] = op.run(tensors, documents("edges", 140))
    torch.save({"unit": torch.ops.lmtrain.cpu_unit(), "results": saved}, path)


def by_unit(unit: str, path: Path, **environment: str) -> Results | None:
    """What ``save`` finds; None where this CPU lacks the unit."""
    environment = {"LMTRAIN_CPU_UNIT": unit, "LMTRAIN_KERNELS": "cpu"} | environment
    command = [sys.executable, "-c", f"from tests.ops.test_vector_units import save; save({str(path)!r})"]
    done = subprocess.run(command, env=os.environ | environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode and "this CPU lacks it" in done.stderr:
        return None
    assert done.returncode == 0, done.stderr
    found = torch.load(path)
    assert found["unit"] == unit
    return found["results"]


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Results]:
    folder = tmp_path_factory.mktemp("units")
    found = {unit: by_unit(unit, folder / unit) for unit in ("generic", "avx2", "avx512")}
    return {unit: results for unit, results in found.items() if results is not None}


def assert_agree(got: Results, expected: Results, single: float, double: float) -> None:
    assert got.keys() == expected.keys() and got
    for name, tensors in got.items():
        assert_close(tensors, expected[name], single if "float32" in name else double)


def test_vector_units_agree(units: dict[str, Results]) -> None:
    """To rounding: they sum over their lanes in other orders. Measured, worst: 4e-7 and 6e-16."""
    for unit in units.keys() - {"generic"}:
        assert_agree(units[unit], units["generic"], 1.2e-6, 2e-15)


@pytest.mark.slow
def test_the_wide_source_runs_on_a_narrow_machine(units: dict[str, Results], tmp_path: Path) -> None:
    """Vectors of AVX-512's length, compiled for AVX2: AVX-512's outputs to the bit, its gradients to the last of them.

    Gradients end in sums over lanes, which the compiler contracts differently: measured 3e-8 and 1e-16.
    """
    if "avx2" not in units:
        pytest.skip("needs a CPU with AVX2")
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=programs)
    if cmake is None:
        pytest.skip("needs cmake")
    options = [
        "-DCMAKE_CXX_FLAGS=-ULM_LANES -DLM_LANES=16",
        f"-DPython_EXECUTABLE={sys.executable}",
        "-DLM_CUDA=off",
        "-GNinja",
    ]
    for step in (["-S", str(ROOT / "csrc"), "-B", str(tmp_path), *options], ["--build", str(tmp_path), "-j2"]):
        done = subprocess.run(
            [cmake, *step],
            env=os.environ | {"PATH": programs},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
    wide = by_unit("avx2", tmp_path / "results", LMTRAIN_LIBRARY=str(tmp_path / "liblmtrain_ops.so"))
    assert wide is not None
    if "avx512" not in units:
        assert_agree(wide, units["avx2"], 1.2e-6, 2e-15)
        return
    assert_agree(wide, units["avx512"], 1e-7, 4e-16)
    for name, tensors in wide.items():
        for output in RUNNING[name.split()[0]].case.outputs:
            assert torch.equal(tensors[output], units["avx512"][name][output]), f"{name}: {output}"
