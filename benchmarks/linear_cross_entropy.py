"""linear_cross_entropy and its sum, forward and backward, against cross_entropy of all logits of the same torch.

    OMP_NUM_THREADS=1 python benchmarks/linear_cross_entropy.py

CPU seconds, the best round of each, timed in turn; peak memory over inputs and parameter gradients, each in a process
of its own. Only the ratios travel between machines.
"""

from __future__ import annotations

import datetime
import multiprocessing
import platform
import resource
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lmtrain.ops.cross_entropy import cross_entropy
from lmtrain.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_sum

TOKENS, VOCAB, DIMS, ROUNDS = 2048, 32768, (256, 1024), 3


def full(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(F.linear(hidden, weight), labels)[0].sum()


def per_target(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, labels)[0].sum()


def summed(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return linear_cross_entropy_sum(hidden, weight, labels)[0]


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "cross_entropy": full,
    "linear_cross_entropy": per_target,
    "linear_cross_entropy_sum": summed,
}


def inputs(dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leaves whose gradients exist already, so that memory counts only what a step needs besides."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, TOKENS, dim), torch.randn(VOCAB, dim).mul_(dim**-0.5)
    for leaf in (hidden, weight):
        leaf.requires_grad_().grad = torch.ones_like(leaf)
    return hidden, weight, torch.randint(0, VOCAB, (1, TOKENS))


def seconds(form: str, leaves: tuple[Tensor, Tensor, Tensor]) -> float:
    """Of one forward and backward."""
    start = time.process_time()
    FORMS[form](*leaves).backward()
    return time.process_time() - start


def peak_bytes(form: str, dim: int) -> int:
    """Of one forward and backward, in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_bytes, (form, dim))


def _peak_bytes(form: str, dim: int) -> int:
    torch.set_num_threads(1)
    leaves = inputs(dim)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds(form, leaves)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return grown * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, 1 thread, torch {torch.__version__}, {datetime.date.today()}")
    print(f"fp32, {TOKENS} tokens, V={VOCAB}; forward + backward\n")
    print(f"{'D':>6}  {'form':<26}{'CPU s':>8}{'time':>8}{'peak MB':>10}{'memory':>8}")
    # first of all: a process starts with the peak of the one that makes it
    all_peaks = {dim: {form: peak_bytes(form, dim) for form in FORMS} for dim in DIMS}
    for dim, peaks in all_peaks.items():
        leaves = inputs(dim)
        rounds = [{form: seconds(form, leaves) for form in FORMS} for _ in range(ROUNDS)]
        best = {form: min(one[form] for one in rounds) for form in FORMS}
        for form in FORMS:
            time_ratio, memory_ratio = (found[form] / found["cross_entropy"] for found in (best, peaks))
            memory = f"{peaks[form] / 1e6:>10.0f}{memory_ratio:>8.2f}"
            print(f"{dim:>6}  {form:<26}{best[form]:>8.2f}{time_ratio:>8.2f}{memory}")


if __name__ == "__main__":
    main()
