"""Loads one compiled library under several versions of torch and compares what its ops return (``make abi-check``).

Each version is installed into an environment of its own under build/abi/. The first version runs forward and backward
of every op on seeded inputs and saves the results; the others must return the same bits.

    python tests/ops/abi_check.py VERSION...     of torch, as pip takes it (2.11.*), or "newest", or "installed"
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "abi"

WORKER = """
import sys, torch
from pathlib import Path
from lmtrain.ops import *
from lmtrain.ops import library
from lmtrain.ops.documents import Documents

assert library.load() is None, library.load()
generator = torch.Generator().manual_seed(0)
B, T, H, K, V, D = 2, 70, 2, 6, 5, 20

def rand(*shape):
    return torch.randn(*shape, generator=generator)

def unit(*shape):
    return torch.nn.functional.normalize(rand(*shape), dim=-1)

def logs(*shape):
    return -rand(*shape).exp() / 4

docs = Documents.from_ids(torch.arange(T).div(33, rounding_mode="floor").expand(B, T), torch.tensor([3, 0]))
key = unit(B, T, H, K)
CALLS = {
    causal_conv1d: [rand(B, T, D), rand(D, 4), rand(D)],
    delta: [rand(B, T, H, V), key, unit(B, T, H, K), rand(B, T, H).sigmoid(), logs(B, T, H)],
    diag_scan: [rand(B, T, D), logs(B, T, D)],
    dplr: [rand(B, T, H, V), rand(B, T, H, K), logs(B, T, H, K), rand(B, T, H, K), -key, key / 2],
    gla: [rand(B, T, H, V), rand(B, T, H, K), rand(B, T, H, K), logs(B, T, H, K), rand(H, K)],
    rmsnorm: [rand(B, T, D), rand(D)],
    selective_scan: [rand(B, T, D), rand(B, T, D).exp() / 4, -rand(D, K).exp(), rand(B, T, 1, K), rand(B, T, 1, K)],
    ssd: [rand(B, T, H, V), logs(B, T, H), rand(B, T, 1, K), rand(B, T, 1, K)],
    wkv4: [rand(B, T, D), rand(B, T, D), logs(D), rand(D)],
}
here = {name for name, backend in library.chosen().items() if backend == "cpu"}
assert here == {op.name for op in CALLS}, f"compiled ops {sorted(here)}, called {sorted(op.name for op in CALLS)}"
found = {}
for op, inputs in CALLS.items():
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    outputs = op(*inputs, docs=docs) if op is not rmsnorm else op(*inputs, eps=1e-5)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum((out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() for out in outputs)
    grads = torch.autograd.grad(total, inputs)
    found[op.name] = [tensor.detach() for tensor in (*outputs, *grads)]

saved = Path(sys.argv[1])
if not saved.exists():
    torch.save(found, saved)
first = torch.load(saved)
different = [name for name in found if not all(map(torch.equal, found[name], first[name]))]
print(f"torch {torch.__version__}, {torch.ops.lmtrain.cpu_unit()}: {len(found)} ops", end=", ")
print("different from the first: " + ", ".join(different) if different else "the same bits")
sys.exit(bool(different))
"""


def python_with(version: str) -> Path:
    """The interpreter of an environment that holds this torch; made if it is not there."""
    if version == "installed":
        return Path(sys.executable)
    environment = BUILD / version.rstrip(".*")
    python, done = environment / "bin" / "python", environment / "done"
    if not done.exists():
        print(f"installing torch {version} into {environment}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-compile"]
        subprocess.run([*pip, "torch" if version == "newest" else f"torch=={version}"], check=True)
        done.touch()
    return python


def main() -> None:
    from lmtrain.ops import library

    path = library.library_path()
    if path is None:
        sys.exit(f"abi-check: the library is not built; build it with `{library.BUILD_COMMAND}`")
    BUILD.mkdir(parents=True, exist_ok=True)
    saved = BUILD / "first.pt"
    saved.unlink(missing_ok=True)
    environment = os.environ | {"LMTRAIN_LIBRARY": str(path), "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    print(f"library: {path}", flush=True)
    failed = False
    for version in sys.argv[1:]:
        done = subprocess.run([python_with(version), "-c", WORKER, saved], env=environment, cwd=BUILD, check=False)
        failed |= done.returncode != 0
    sys.exit(failed)


if __name__ == "__main__":
    main()
