"""causal_conv1d, forward and backward, against F.conv1d + silu of the same torch in the same run.

    OMP_NUM_THREADS=1 python benchmarks/causal_conv1d.py

Timed in turn, round after round; the best round of each counts. Only the ratios travel between machines.
"""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lmtrain.ops import causal_conv1d, library

CHANNELS, WIDTH, LENGTHS, ROUNDS = 1024, 4, (256, 1024, 4096), 9


def peer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same function in plain torch, in the layout of its convolutions and back."""
    length = x.shape[1]
    y = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=WIDTH - 1, groups=x.shape[2])
    return F.silu(y[..., :length].transpose(1, 2))


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return causal_conv1d(x, weight, bias)[0]


def reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return causal_conv1d.reference(x, weight, bias, None, None, "silu")[0]


def seconds(function: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> tuple[float, float]:
    """Of one forward and one backward."""
    start = time.perf_counter()
    y = function(*leaves)
    middle = time.perf_counter()
    torch.autograd.grad(y, leaves, grad)
    return middle - start, time.perf_counter() - middle


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    """Print hardware, versions, date, and one row per length: ns per value, and the ratio to the peer."""
    functions = {"F.conv1d+silu": peer, "reference": reference, "ours": ours}
    backend = library.chosen()["causal_conv1d"]
    unit = torch.ops.lmtrain.cpu_unit() if backend == "cpu" else "-"
    load = os.getloadavg()[0]
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, load {load:.1f}; backend {backend}, unit {unit}")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {datetime.date.today()}")
    print(f"fp32, B=1, C={CHANNELS}, W={WIDTH}; ns per value forward + backward (times faster than the peer)\n")
    print(f"{'T':>6}" + "".join(f"{name:>32}" for name in functions))
    for length in LENGTHS:
        shapes = ((1, length, CHANNELS), (CHANNELS, WIDTH), (CHANNELS,))
        leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
        grad = torch.randn(shapes[0])
        best = {name: (float("inf"), float("inf")) for name in functions}
        for _ in range(ROUNDS):
            for name, function in functions.items():
                forward, backward = seconds(function, leaves, grad)
                best[name] = (min(best[name][0], forward), min(best[name][1], backward))
        row = f"{length:>6}"
        for forward, backward in best.values():
            per_value = [1e9 * s / (length * CHANNELS) for s in (forward, backward)]
            ratios = [p / s for p, s in zip(best["F.conv1d+silu"], (forward, backward), strict=True)]
            row += f"{per_value[0]:>10.2f} + {per_value[1]:>5.2f} ({ratios[0]:>4.1f}x {ratios[1]:>4.1f}x)"
        print(row)


if __name__ == "__main__":
    main()
