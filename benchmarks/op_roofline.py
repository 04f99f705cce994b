"""What bounds an op, as torch's own primitives do it in the same run, with the same threads.

Of most ops one thing, the FLOPs of the chunked form, its exponentials or a copy of its inputs and outputs. Of ssd its
unavoidable work in parts, timed apart. Their maximum is what they would take if they overlapped wholly, their sum if
not at all; which of the two a kernel is measured by has to be said. So has whether COLD is in the sum: an op is timed
after another form has used the caches, but torch.mm, from which the products follow, with its factors in them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from op_forms import Entry

Timer = Callable[[], tuple[float, float]]  # seconds of the forward, and of forward and backward
COLD = "cold inputs"
SQUARE, PIECE = 512, 64  # ssd's pieces: twice as long they cost a fifth more FLOPs, half as long twice the states


@dataclass(frozen=True)
class Work:
    """What cannot be avoided. flops: of matrix products; fresh: elements of each fp32 tensor that must be written."""

    flops: int
    exps: int
    fresh: tuple[int, ...]


def ssd_work(T: int, B: int, H: int, P: int, N: int) -> tuple[Work, Work]:
    """Of the forward and of the backward, by chunks of 64 tokens and with one group.

    Products. Through the states, per token and head 2 N P FLOPs each: reading and writing them; in the backward their
    gradient, and through it and them those of x, B and C. Between the tokens of a chunk, as triangles with their
    diagonal: scores times x, and the scores, once for all heads; in the backward what gradients of y make of x and of
    the scores, the scores again, and what the gradients of the scores, once summed over heads, make of B and C.
    Exponentials: one per token and head and pass, since all decays are products of those.
    Fresh memory: y, the last state and the states between chunks, which the backward needs unless it makes them again;
    then the gradients of x, log_a, B and C. No scratch. What is read is not in here: see COLD in ``timers``.
    """
    tokens, pairs = B * T * H, PIECE + 1  # a token is in half so many pairs, of 2 FLOPs per number
    states, keys = 2 * N * P, pairs * N // H
    entering = (-(-T // PIECE) - 1) * B * H * N * P
    forward = Work(tokens * (2 * states + pairs * P + keys), tokens, (tokens * P, B * H * N * P, entering))
    backward = Work(tokens * (4 * states + 2 * pairs * P + 3 * keys), tokens, (tokens * P, tokens, *2 * (B * T * N,)))
    return forward, backward


def extent(dims: str, sizes: dict[str, int]) -> tuple[int, ...]:
    """``BT1N`` to the sizes of these dims."""
    return tuple(int(dim) if dim.isdigit() else sizes[dim] for dim in dims)


def seconds(run: Callable[[], Any], times: int = 1) -> float:
    """The best of so many."""
    best = math.inf
    for _ in range(times):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def timers(entry: Entry, length: int, leaves: list[Tensor], y: Tensor) -> dict[str, Timer]:
    """By the name of what is timed.

    COLD is x, read by the forward, and again by the backward, with the gradient of y and the states between chunks that
    the forward wrote. It has to run right after a torch form, so that it finds x where ours would. The small inputs are
    left out.
    """
    sizes = entry.sizes | {"T": length}

    def scaled(run: Callable[[], Any], forward: float, both: float, times: int = 1) -> Timer:
        def timer() -> tuple[float, float]:
            taken = seconds(run, times)
            return forward * taken, both * taken

        return timer

    square = torch.randn(SQUARE, SQUARE)
    mm, mm_flops = partial(torch.mm, square, square), 2 * SQUARE**3
    if entry.work is not None:
        forward, backward = entry.work(**sizes)
        x, upstream = leaves[0].detach(), torch.randn(y.shape)

        def cold() -> tuple[float, float]:
            first = seconds(x.sum)
            _, _, states = write(forward.fresh)  # as the forward leaves them; not timed here, it is "fresh memory"
            upstream.normal_()  # the op's is made right before its backward too
            return first, first + sum(seconds(tensor.sum) for tensor in (x, upstream, states))

        def fresh() -> tuple[float, float]:
            first = seconds(partial(write, forward.fresh))
            return first, first + seconds(partial(write, backward.fresh))

        return {
            # warm, since the products of an op follow one another
            "products": scaled(mm, forward.flops / mm_flops, (forward.flops + backward.flops) / mm_flops, times=3),
            "exps": scaled(torch.randn(forward.exps).exp, 1.0, 1.0 + backward.exps / forward.exps),
            "fresh memory": fresh,
            COLD: cold,
        }
    if entry.bound == "products":
        share = entry.cost(**sizes).executed_flops / mm_flops
        return {entry.bound: scaled(mm, share, 3 * share)}
    if entry.bound == "exps":
        return {entry.bound: scaled(torch.randn(math.prod(extent(entry.exps, sizes))).exp, 1.0, 2.0)}
    moved = sum(t.numel() for t in leaves) + y.numel()
    values = torch.randn(moved // 2)  # a copy reads and writes
    # the backward reads all that and the gradient of y, and writes those of the inputs, but not y
    return {entry.bound: scaled(partial(torch.empty_like(values).copy_, values), 1.0, 3 - y.numel() / moved)}


def write(sizes: tuple[int, ...]) -> list[Tensor]:
    return [torch.empty(size).fill_(1.0) for size in sizes]
