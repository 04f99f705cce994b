"""selective_scan and diag_scan, forward and backward, against torch's loop over tokens and transformers' Mamba.

    OMP_NUM_THREADS=1 python benchmarks/selective_scan.py            (LMTRAIN_CPU_UNIT=avx2 for the narrower unit)

All compute the same function in fp32 on one thread, in turn, round after round; the best round of each counts, in CPU
seconds (others may use the machine). ``loop``: the recurrence over unbound tokens, without documents, which is what
torch runs fastest. ``transformers``: its Mamba's scan without a kernel, whose backward is quadratic in T (it indexes
tokens); measured at the shortest row only.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from lmtrain.ops import library
from lmtrain.ops.diag_scan import diag_scan
from lmtrain.ops.selective_scan import selective_scan

SHAPES = ((4, 256, 256, 16), (1, 1024, 1024, 16), (1, 2048, 512, 16))  # B, T, D, N
ROUNDS = 5
Function = Callable[..., Tensor]


def ours(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return selective_scan(x, dt, a, b, c)[0]


def loop(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    state, outputs = x.new_zeros(x.shape[0], *a.shape), []
    for delta, value, key, query in zip(*(t.unbind(1) for t in (dt, dt * x, b, c)), strict=True):
        state = (delta[..., None] * a).exp() * state + value[..., None] * key
        outputs.append((state @ query[:, 0, :, None]).squeeze(-1))
    return torch.stack(outputs, dim=1)


def transformers_form(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return mamba_selective_scan(x.mT, dt.mT, a, b[:, :, 0].mT, c[:, :, 0].mT).mT


def our_diagonal(x: Tensor, log_a: Tensor) -> Tensor:
    return diag_scan(x, log_a)[0]


def diagonal_loop(x: Tensor, log_a: Tensor) -> Tensor:
    state, outputs = x.new_zeros(x.shape[0], x.shape[2]), []
    for value, decay in zip(x.unbind(1), log_a.exp().unbind(1), strict=True):
        state = decay * state + value
        outputs.append(state)
    return torch.stack(outputs, dim=1)


def measure(functions: dict[str, Function], leaves: list[Tensor], grad: Tensor) -> dict[str, tuple[float, float]]:
    """Milliseconds of forward and of backward."""
    best = dict.fromkeys(functions, (float("inf"), float("inf")))
    for _ in range(ROUNDS):
        for name, function in functions.items():
            start = time.process_time()
            y = function(*leaves)
            middle = time.process_time()
            torch.autograd.grad(y, leaves, grad)
            forward, backward = 1e3 * (middle - start), 1e3 * (time.process_time() - middle)
            best[name] = (min(best[name][0], forward), min(best[name][1], backward))
    return best


def show(title: str, best: dict[str, tuple[float, float]]) -> None:
    mine = sum(best["ours"])
    cells = [f"{name} {f:.2f} + {b:.2f} ({(f + b) / mine:.1f}x)" for name, (f, b) in best.items()]
    print(f"{title}: {', '.join(cells)}", flush=True)


def main() -> None:
    """Print one row per shape: milliseconds forward + backward, and how many times ours is faster."""
    if library.backend("selective_scan", "cpu", torch.float32) != "cpu":
        raise SystemExit(f"the compiled library is missing; build it with `{library.BUILD_COMMAND}`")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"unit {torch.ops.lmtrain.cpu_unit()}, torch {torch.__version__}, one thread, CPU milliseconds")
    for batch, length, channels, d_state in SHAPES:
        x, grad = torch.randn(2, batch, length, channels)
        b, c = torch.randn(2, batch, length, 1, d_state)
        rates = -torch.arange(1.0, d_state + 1).expand(channels, -1)  # Mamba's initial A
        leaves = [t.contiguous().requires_grad_() for t in (x, 0.1 * torch.rand_like(x), rates, b, c)]
        functions: dict[str, Function] = {"ours": ours, "loop": loop}
        if length == SHAPES[0][1]:
            functions["transformers"] = transformers_form
        show(f"selective_scan B,T,D,N {batch},{length},{channels},{d_state}", measure(functions, leaves, grad))
        leaves = [t.contiguous().requires_grad_() for t in (x, -torch.rand_like(x))]
        pair = measure({"ours": our_diagonal, "loop": diagonal_loop}, leaves, grad)
        show(f"diag_scan B,T,D {batch},{length},{channels}", pair)


if __name__ == "__main__":
    main()
