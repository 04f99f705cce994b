"""ssd, forward and backward, against its chunked torch form and transformers' scan of Mamba-2 in the same run.

    python benchmarks/ssd.py            (LMTRAIN_CPU_UNIT=avx2 for the narrower unit, and then for torch as well)

All compute the same function in fp32, in turn, round after round; the best round of each counts, wall seconds. The
peers run at their fastest chunk, found first; transformers' also at the default of its Mamba-2, 256. Its function
multiplies by dt too, here 1, which costs it a few percent. ``error``: the largest difference to the torch form in fp64
over y and all gradients, relative to the largest element of each. ``of mm``: FLOPs of our matrix products (triangles
counted as such) per second, forward and backward, over torch.mm's.
Writes benchmarks/results/ssd.json, or ssd-UNIT.json if LMTRAIN_CPU_UNIT names one.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from op_roofline import ssd_work
from torch import Tensor
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from lmtrain.ops import library, ssd
from lmtrain.ops.ssd import chunked
from lmtrain.train.hardware import describe

SHAPES = (  # B, T, H, P, N; one group
    (4, 256, 8, 32, 32),
    (4, 512, 8, 32, 32),
    (1, 256, 16, 64, 64),
    (1, 1024, 16, 64, 64),
    (1, 4096, 16, 64, 64),
)
HF_DEFAULT = 256
CHUNKS, SECONDS = (32, 64, 128, 256), 8.0  # a cell is timed for about this long, in 5 rounds at least
UNIT = os.environ.get("LMTRAIN_CPU_UNIT")
TORCH_UNIT = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"} if UNIT == "avx2" else {}
RESULTS = Path(__file__).parent / "results" / (f"ssd-{UNIT}.json" if UNIT else "ssd.json")

Function = Callable[..., Tensor]


def ours(x: Tensor, log_a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return ssd(x, log_a, b, c)[0]


def torch_form(chunk: int) -> Function:
    return lambda x, log_a, b, c: chunked(x, log_a, b, c, None, None, chunk)[0]


def hf_scan(chunk: int) -> Function:
    return lambda x, log_a, b, c: mamba2_chunk_scan(x, torch.ones_like(log_a), log_a, b, c, chunk_size=chunk)


def leaves_of(shape: tuple[int, ...]) -> list[Tensor]:
    batch, length, heads, head_dim, d_state = shape
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(batch, length, heads, head_dim, generator=generator),
        -torch.rand(batch, length, heads, generator=generator),
        torch.randn(batch, length, 1, d_state, generator=generator) / d_state**0.5,
        torch.randn(batch, length, 1, d_state, generator=generator),
    ]
    return [tensor.requires_grad_() for tensor in tensors]


def seconds(function: Function, leaves: list[Tensor], grad: Tensor) -> tuple[float, float]:
    """Of one forward and one backward."""
    start = time.perf_counter()
    y = function(*leaves)
    middle = time.perf_counter()
    torch.autograd.grad(y, leaves, grad)
    return middle - start, time.perf_counter() - middle


def fastest(make: Callable[[int], Function], leaves: list[Tensor], grad: Tensor) -> int:
    """The chunk at which forward and backward take least."""
    best = {}
    for chunk in CHUNKS:
        best[chunk] = min(sum(seconds(make(chunk), leaves, grad)) for _ in range(3))
    return min(best, key=best.__getitem__)


def error(leaves: list[Tensor], grad: Tensor) -> float:
    def values(function: Function, dtype: torch.dtype) -> list[Tensor]:
        cast = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        y = function(*cast)
        return [y.detach(), *torch.autograd.grad(y, cast, grad.to(dtype))]

    pairs = zip(values(ours, torch.float32), values(torch_form(64), torch.float64), strict=True)
    return max(float((got - want).abs().max() / want.abs().max()) for got, want in pairs)


def measure(shape: tuple[int, ...]) -> dict[str, object]:
    leaves = leaves_of(shape)
    grad = torch.randn(shape[:4])
    chunk, hf_chunk = fastest(torch_form, leaves, grad), fastest(hf_scan, leaves, grad)
    functions = {
        "ours": ours,
        "torch": torch_form(chunk),
        "transformers": hf_scan(hf_chunk),
        "default": hf_scan(HF_DEFAULT),
    }
    best = {name: (float("inf"), float("inf")) for name in functions}
    square, mm = torch.randn(512, 512), float("inf")
    rounds, end = 0, time.perf_counter() + SECONDS
    while rounds < 5 or time.perf_counter() < end:
        for name, function in functions.items():
            forward, backward = seconds(function, leaves, grad)
            best[name] = (min(best[name][0], forward), min(best[name][1], backward))
        start = time.perf_counter()
        torch.mm(square, square)
        mm = min(mm, time.perf_counter() - start)
        rounds += 1
    peak = 2 * 512**3 / mm
    sizes = dict(zip("BTHPN", shape, strict=True))
    return {
        "shape": sizes,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "milliseconds": {name: [1e3 * t for t in times] for name, times in best.items()},
        "chunks": {"torch": chunk, "transformers": hf_chunk, "default": HF_DEFAULT},
        "ratios": {name: sum(times) / sum(best["ours"]) for name, times in best.items()},
        "mm_gflops": peak / 1e9,
        "of_mm": [work.flops / t / peak for work, t in zip(ssd_work(**sizes), best["ours"], strict=True)],
        "error": error(leaves, grad),
    }


def main() -> None:
    """Print hardware, versions, date and one row per shape and thread count; write the results."""
    if not os.environ.items() >= TORCH_UNIT.items():  # torch reads them when it loads
        os.execve(sys.executable, sys.orig_argv, os.environ | TORCH_UNIT)
    if library.backend("ssd", "cpu", torch.float32) != "cpu":
        raise SystemExit(f"ssd: the compiled library is missing; build it with `{library.BUILD_COMMAND}`")
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    hardware, date = describe(torch.device("cpu")), str(datetime.date.today())
    unit, load = torch.ops.lmtrain.cpu_unit(), os.getloadavg()[0]
    print(f"{hardware['cpu']}, {hardware['cores']} cores, load {load:.1f}; unit {unit}; {versions}; {date}")
    print("ms forward + backward; the peers' (chunk), and how many times ours is faster; the last two: transformers\n")
    header = f"{'B,T,H,P,N':>16} thr {'ours':>15} {'torch form':>27} {'its fastest':>27} {'its default':>28}"
    print(f"{header} {'of mm':>10} error")
    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for shape in SHAPES:
            row = measure(shape)
            rows.append(row)
            times = {name: f"{f:.2f} + {b:.2f}" for name, (f, b) in row["milliseconds"].items()}
            peers = [f"{times[name]} ({chunk}) {row['ratios'][name]:.1f}x" for name, chunk in row["chunks"].items()]
            line = f"{','.join(map(str, shape)):>16} {threads:>3} {times['ours']:>15}"
            line += f" {peers[0]:>27} {peers[1]:>27} {peers[2]:>28}"
            shares = " ".join(f"{100 * share:.0f} %" for share in row["of_mm"])
            print(f"{line} {shares:>10} {row['error']:.1e}", flush=True)
    record = {"format_version": 1, "date": date, "hardware": hardware, "versions": versions, "unit": unit, "load": load}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record | {"rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
