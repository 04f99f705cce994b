"""The bindings on random arguments, without a sanitizer (`make fuzz` has one): a call returns or raises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lmtrain.ops import library


def test_random_calls_return_or_raise(tmp_path: Path) -> None:
    if library.load() is not None:
        pytest.skip("the library is not built")
    script, last_call = Path(__file__).parent / "fuzz_bindings.py", tmp_path / "last_call.txt"
    command = [sys.executable, str(script), "--unit", "as loaded", "--calls", "40", "--last-call", str(last_call)]
    environment = os.environ | {"LMTRAIN_LIBRARY": str(library.library_path())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, last_call.read_text(encoding="utf-8").splitlines()[-1] + done.stderr
    returned = {name: int(count) for name, count in re.findall(r"lmtrain::(\w+) +(\d+) of 40", done.stdout)}
    schemas = [s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("lmtrain::") and s.arguments]
    assert {f"lmtrain::{name}" for name in returned} == set(schemas)
    # of the calls that fit together some return: those that raise would hide the kernels
    seldom = [name for name, count in returned.items() if count < 3]
    assert not seldom, f"calls of {', '.join(seldom)} seldom fit together: give their shapes in fuzz_bindings.KNOWN"
