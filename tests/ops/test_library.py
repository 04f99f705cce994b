"""Choice of backends: the fixed order, the overrides, what is said when something is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lmtrain.errors import UsageError
from lmtrain.ops import library


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No override; a toy op whose fast backend serves fp32 on the cpu and whose other one is not installed."""
    monkeypatch.delenv("LMTRAIN_KERNELS", raising=False)
    monkeypatch.setattr(library, "_backends", dict(library._backends))
    monkeypatch.setattr(library, "_requested", "auto")
    library._choose.cache_clear()
    library.register(
        "toy",
        library.Backend("fla", missing=lambda: "flash-linear-attention is not installed (`pip install .[gpu]`)"),
        library.Backend("cpu", "cpu", frozenset({torch.float32})),
        library.Backend("reference"),
    )
    yield
    library._choose.cache_clear()


def in_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_the_library_is_built_and_names_its_unit() -> None:
    assert library.load() is None, "run `make install`"
    assert torch.ops.lmtrain.cpu_unit() in ("generic", "avx2", "avx512")
    assert library.chosen()["causal_conv1d"] == "cpu"


def test_auto_takes_the_first_that_serves() -> None:
    assert library.backend("toy", "cpu", torch.float32) == "cpu"
    assert library.backend("toy", "cpu", torch.float64) == "reference"
    assert library.backend("toy", "cuda", torch.float32) == "reference"


def test_the_environment_overrides_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    library.set_kernels("cpu")
    assert library.chosen()["toy"] == "cpu"
    monkeypatch.setenv("LMTRAIN_KERNELS", "reference")
    assert set(library.chosen().values()) == {"reference"}


@pytest.mark.parametrize(
    ("kernels", "device", "dtype", "says"),
    [
        ("cpu", "cuda", torch.float32, "toy: backend cpu was asked for, but it runs on cpu, not on cuda"),
        ("cpu", "cpu", torch.float64, "toy: backend cpu was asked for, but it does not take float64"),
        ("fla", "cpu", torch.float32, r"toy: backend fla was asked for, but .* not installed \(`pip install .\[gpu\]`"),
        ("cuda", "cpu", torch.float32, "toy: backend cuda was asked for, but no op has it"),
    ],
)
def test_a_named_backend_that_cannot_serve_is_refused(kernels: str, device: str, dtype: torch.dtype, says: str) -> None:
    library.set_kernels(kernels)
    with pytest.raises(UsageError, match=says):
        library.backend("toy", device, dtype)


def test_ops_without_the_named_backend_choose_as_in_auto() -> None:
    library.set_kernels("cpu")
    library.register("plain", library.Backend("reference"))
    assert library.chosen()["plain"] == "reference"


def test_an_unknown_name_is_refused_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"kernels=referense: no such backend; did you mean reference\?"):
        library.set_kernels("referense")
    monkeypatch.setenv("LMTRAIN_KERNELS", "cdua")
    with pytest.raises(UsageError, match=r"LMTRAIN_KERNELS=cdua: no such backend; did you mean cuda\?"):
        library.backend("toy", "cpu", torch.float32)


def test_an_op_needs_a_reference() -> None:
    with pytest.raises(ValueError, match="toy: the last backend must be reference"):
        library.register("toy", library.Backend("cpu"))


CALL_TWICE = """
import torch
from lmtrain.ops import causal_conv1d, library
for dtype in (torch.float32, torch.float64):
    causal_conv1d(torch.zeros(1, 2, 3), torch.zeros(3, 4))
    library.backend("causal_conv1d", "cpu", dtype)
print(library.chosen()["causal_conv1d"])
"""


def test_a_library_that_does_not_load_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "broken.so").write_bytes(b"not a library")
    done = in_process(CALL_TWICE, LMTRAIN_LIBRARY=str(tmp_path / "broken.so"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "reference"
    assert done.stderr.count("does not load") == done.stderr.count("`make install`") == 1


def test_a_missing_library_is_refused_if_asked_for(tmp_path: Path) -> None:
    done = in_process(CALL_TWICE, LMTRAIN_LIBRARY=str(tmp_path / "none.so"))
    assert "UsageError: LMTRAIN_LIBRARY=" in done.stderr
    (tmp_path / "broken.so").write_bytes(b"not a library")
    done = in_process(CALL_TWICE, LMTRAIN_LIBRARY=str(tmp_path / "broken.so"), LMTRAIN_KERNELS="cpu")
    last = done.stderr.splitlines()[-1]
    assert "UsageError: causal_conv1d: backend cpu was asked for, but" in last and "`make install`" in last


def test_an_unknown_cpu_unit_is_named() -> None:
    done = in_process(CALL_TWICE, LMTRAIN_CPU_UNIT="sse9", LMTRAIN_KERNELS="cpu")
    assert "LMTRAIN_CPU_UNIT=sse9: expected generic, avx2 or avx512" in done.stderr


def test_vector_units_share_no_code() -> None:
    """A function both units define would run one machine's instructions on another: kernels export only their own."""
    objects = sorted(Path(__file__).parents[2].glob("build/*/CMakeFiles/cpu_avx*.dir/**/*.o"))
    if not objects:
        pytest.skip("no object files: the library was not built in this tree")
    listed = subprocess.run(["nm", "-C", *map(str, objects)], capture_output=True, text=True, check=True).stdout
    weak = [line for line in listed.splitlines() if line[17:18] in "VWuvw" and line.strip()]
    # DW.ref.*: a pointer to the C++ runtime's handler of exceptions, the same in every unit
    assert [line for line in weak if line[17:18].strip() and "DW.ref." not in line] == []
