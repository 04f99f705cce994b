"""delta and dplr, forward and backward, against torch forms and transformers' scan of Gated DeltaNet in the same run.

    python benchmarks/delta.py

All compute the same function in fp32, in turn, round after round; the best round of each counts, wall seconds, and only
ratios are printed. scalar: Gated DeltaNet; vector: KDA, and dplr: RWKV-7, which transformers' scan does not know. The
torch form is the fastest of chunks of several lengths and of one token after another, found first; transformers' scan
runs at its default, 64. ``error``: the relative RMS difference to the recurrence in fp64, the largest over y and all
gradients.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from lmtrain.ops import library
from lmtrain.ops.delta import delta
from lmtrain.ops.delta import recurrence as delta_recurrence
from lmtrain.ops.dplr import dplr
from lmtrain.ops.dplr import recurrence as dplr_recurrence
from lmtrain.ops.transitions import MatrixOp
from lmtrain.train.hardware import describe

SHAPES = ((1, 256, 8, 64, 64), (1, 1024, 8, 64, 64), (1, 1024, 4, 128, 128))  # B, T, H, K, V
CHUNKS, SECONDS = {"scalar": (16, 32, 64, 128), "vector": (4, 8, 16, 32), "dplr": (4, 8, 16, 32)}, 3.0

Function = Callable[..., Tensor]


def ours(kind: str) -> Function:
    op = dplr if kind == "dplr" else delta
    return lambda *inputs: op(*inputs)[0]


def stepwise(kind: str) -> Function:
    recurrence = dplr_recurrence if kind == "dplr" else delta_recurrence
    return lambda *inputs: recurrence(*inputs, None, None)[0]


def chunked(kind: str, chunk: int) -> Function:
    op = dplr if kind == "dplr" else delta
    return lambda *inputs: MatrixOp.__call__(op, *inputs, chunk=chunk)[0]


def hf_scan(v: Tensor, q: Tensor, k: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    return torch_chunk_gated_delta_rule(q * q.shape[-1] ** 0.5, k, v, g, beta)[0]  # it scales q by K^-1/2


def leaves_of(shape: tuple[int, ...], kind: str) -> list[Tensor]:
    batch, length, heads, keys, width = shape
    generator = torch.Generator().manual_seed(0)
    sizes = {"scalar": (keys, keys, None, None), "vector": (keys, keys, None, keys), "dplr": (keys,) * 5}[kind]
    v, q, *others = (
        torch.randn(batch, length, heads, *(() if size is None else (size,)), generator=generator)
        for size in (width, *sizes)
    )
    if kind == "dplr":
        w, k, a, b = others
        unit = F.normalize(a, dim=-1)
        others = [-0.1 * w.abs(), k / keys**0.5, -unit, unit * b.sigmoid()]
    else:
        k, beta, g = others
        others = [F.normalize(k, dim=-1), beta.sigmoid(), -0.1 * g.abs()]
    return [t.requires_grad_() for t in (v, q / keys**0.5, *others)]


def seconds(function: Function, leaves: list[Tensor], grad: Tensor) -> float:
    start = time.perf_counter()
    torch.autograd.grad(function(*leaves), leaves, grad)
    return time.perf_counter() - start


def error(kind: str, leaves: list[Tensor], grad: Tensor) -> float:
    def values(function: Function, dtype: torch.dtype) -> list[Tensor]:
        cast = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        y = function(*cast)
        return [y.detach(), *torch.autograd.grad(y, cast, grad.to(dtype))]

    exact = values(stepwise(kind), torch.float64)
    pairs = zip(values(ours(kind), torch.float32), exact, strict=True)
    return max(float((got - want).square().mean().sqrt() / want.square().mean().sqrt()) for got, want in pairs)


def measure(shape: tuple[int, ...], kind: str) -> str:
    leaves = leaves_of(shape, kind)
    grad = torch.randn(leaves[0].shape)
    forms = {f"torch, chunk {chunk}": chunked(kind, chunk) for chunk in CHUNKS[kind]} | {"torch": stepwise(kind)}
    tried = {name: min(seconds(form, leaves, grad) for _ in range(2)) for name, form in forms.items()}
    fastest = min(tried, key=tried.__getitem__)
    functions = {"ours": ours(kind), fastest: forms[fastest]}
    functions |= {"transformers": hf_scan} if kind == "scalar" else {}
    best = dict.fromkeys(functions, float("inf"))
    rounds, end = 0, time.perf_counter() + SECONDS
    while rounds < 3 or time.perf_counter() < end:
        for name, function in functions.items():
            best[name] = min(best[name], seconds(function, leaves, grad))
        rounds += 1
    ratios = ", ".join(f"{name} {took / best['ours']:.1f}x" for name, took in best.items())
    return f"{ratios}; error {error(kind, leaves, grad):.1e}"


def main() -> None:
    """Print hardware and versions, and one row of ratios per thread count, kind and shape."""
    if {library.backend(op, "cpu", torch.float32) for op in ("delta", "dplr")} != {"cpu"}:
        raise SystemExit(f"delta, dplr: the compiled library is missing; build it with `{library.BUILD_COMMAND}`")
    hardware, unit = describe(torch.device("cpu")), torch.ops.lmtrain.cpu_unit()
    print(f"{hardware['cpu']}, {hardware['cores']} cores, load {os.getloadavg()[0]:.1f}; unit {unit};", end=" ")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for kind in CHUNKS:
            for shape in SHAPES:
                name = ",".join(map(str, shape))
                print(f"{threads} threads, {kind:>6}, B,T,H,K,V = {name}: {measure(shape, kind)}", flush=True)


if __name__ == "__main__":
    main()
