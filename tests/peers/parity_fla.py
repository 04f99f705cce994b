"""Holds ops and mixers to flash-linear-attention (fla), whose kinds transformers mostly lacks: ``make parity-fla``.

fla goes into an environment of its own, build/fla: where it is installed, transformers' delta-rule models call its
kernels and fail without a GPU. There its functions in plain torch, its Triton kernels (by Triton's interpreter) and its
layers get our inputs and weights; outputs, states and all gradients are compared. A minute or two once it is installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from lmtrain.ops import library

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / "build" / "fla"
VERSION = "0.6.0"
REQUIREMENTS = ["torch", "numpy", f"flash-linear-attention=={VERSION}", f"fla-core[cpu]=={VERSION}"]


def python() -> Path:
    """The interpreter of the environment; made if it is not there in this version."""
    interpreter, done = ENVIRONMENT / "bin" / "python", ENVIRONMENT / f"done-{VERSION}"
    if not done.exists():
        print(f"installing flash-linear-attention {VERSION} into {ENVIRONMENT}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
        pip = [interpreter, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-compile"]
        subprocess.run([*pip, "-c", ROOT / "constraints.txt", *REQUIREMENTS], check=True)
        done.touch()
    return interpreter


def main() -> None:
    path = library.library_path()
    if path is None:
        sys.exit(f"parity-fla: the library is not built; build it with `{library.BUILD_COMMAND}`")
    result = ROOT / "benchmarks" / "results" / "parity_fla.json"
    told = {"LMTRAIN_LIBRARY": str(path), "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [python(), "-m", "tests.peers.compare_fla", result]
    sys.exit(subprocess.run(command, env=os.environ | told, cwd=ROOT, check=False).returncode)


if __name__ == "__main__":
    main()
