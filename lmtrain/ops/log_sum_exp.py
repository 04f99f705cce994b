"""The logarithm of a running sum of exponentials: the normaliser of LightNet's additive decay (arXiv 2405.21022).

    y_t = log sum_{s<t} exp(k_s)

over the tokens s of t's document, the own token excluded: -inf at a document's first. k ``[B, T, C]``. The state
``[B, 2, C]`` is the sum over the document so far, and 1 where it has a token: zeros are the empty state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmtrain.ops.documents import Documents
from lmtrain.ops.op import AffineOp, Cost, Span, check_row, check_shape, compute_dtype, starts_of

INF = float("inf")


def recurrence(k: Tensor, docs: Documents | None, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The definition, one token after another."""
    keys, starts, state = _prepare(k, docs, initial_state)
    outputs = []
    for t in range(k.shape[1]):
        gamma = torch.where(starts[:, t], keys.new_zeros(()), keys.new_ones(()))
        outputs.append(_read(log_sum_exp.apply(gamma, state)))
        state = log_sum_exp.combine(gamma, state, _one(keys[:, t]))
    y = torch.stack(outputs, dim=1) if outputs else keys
    return y.to(k.dtype), state


def _prepare(k: Tensor, docs: Documents | None, initial_state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    keys = k.to(compute_dtype(k))
    empty = keys.new_zeros(k.shape[0], 2, k.shape[2])
    return keys, starts_of(k, docs), empty if initial_state is None else initial_state.to(keys.dtype)


def _one(k: Tensor) -> Tensor:
    """The state after one token ``[B, C]``."""
    return torch.stack([k, torch.ones_like(k)], dim=1)


def _read(state: Tensor) -> Tensor:
    """``[B, C]``; -inf where the state is empty."""
    z, seen = state.unbind(dim=1)
    return torch.where(seen == 0, z.new_full((), -INF), z)


def doubling(keys: Tensor, starts: Tensor, state: Tensor) -> Tensor:
    """y by log2(T) passes: after each, a column holds the sum over twice as many columns before it.

    A column of another document is never an operand, so documents stay independent to the bit.
    """
    length = keys.shape[1]
    column = torch.arange(length, device=keys.device).expand(starts.shape)
    opened = torch.where(starts, column, column.new_full((), -1)).cummax(dim=1).values
    count = (column - opened)[..., None]  # terms of the sum: tokens before in the document, and the state if it entered
    total = torch.cat([_read(state)[:, None], keys[:, :-1]], dim=1)[:, :length]
    total = torch.where(count > 0, total, total.new_full((), -INF))
    zero, distance = total.new_zeros(()), 1
    while distance < length:
        joins = count > distance
        older, own = torch.where(joins, total.roll(distance, dims=1), zero), torch.where(joins, total, zero)
        total = torch.where(joins, torch.logaddexp(older, own), total)
        distance *= 2
    return total


class LogSumExp(AffineOp):
    """See the module. ``docs`` resets the sum; ``initial_state`` ``[B, 2, C]`` in the computing dtype.

    States join by ``combine``; gamma ``[B]`` is 1, or 0 if a document starts in the span. It has no gradient.
    """

    name = "log_sum_exp"
    kind = "lse"
    needs_state = True

    def __call__(
        self,
        *inputs: Tensor | None,
        docs: Documents | None = None,
        initial_state: Tensor | None = None,
        **static: Any,
    ) -> tuple[Tensor, Tensor]:
        """``(k,)`` to y ``[B, T, C]`` in k's dtype and the state after the last column. Raises ValueError naming the
        argument, what was expected and what was got."""
        k = _check(inputs, docs, initial_state)
        if docs is not None and initial_state is not None and k.shape[1]:
            initial_state = self.drop(initial_state, docs.before)  # whatever it holds, NaN included
        keys, starts, state = _prepare(k, docs, initial_state)
        span = self.span(k, docs=docs)
        return doubling(keys, starts, state).to(k.dtype), self.combine(span.gamma, state, span.state)

    def gamma(self, *inputs: Tensor | None, docs: Documents | None = None) -> Tensor:
        return self.span(*inputs, docs=docs).gamma

    def span(self, *inputs: Tensor | None, docs: Documents | None = None) -> Span:
        keys, starts, state = _prepare(_check(inputs, docs, None), docs, None)
        gamma = torch.where(starts.any(dim=1), keys.new_zeros(()), keys.new_ones(()))
        if keys.shape[1]:
            run = starts.cumsum(dim=1)
            last = (run == run[:, -1:])[..., None]
            state = _one(torch.where(last, keys, keys.new_full((), -INF)).logsumexp(dim=1))
        return Span(gamma, state)

    def apply(self, gamma: Tensor, state: Tensor) -> Tensor:
        return torch.where(gamma[:, None, None] == 0, state.new_zeros(()), state)

    def transpose(self, gamma: Tensor, grad: Tensor) -> Tensor:
        return self.apply(gamma, grad)

    def outer(self, grad: Tensor, state: Tensor) -> Tensor:
        return grad.new_zeros(grad.shape[0])

    def combine(self, gamma: Tensor, state: Tensor, added: Tensor) -> Tensor:
        """The state after a span ``(gamma, added)`` that ``state`` enters."""
        (left, before), (right, new) = self.apply(gamma, state).unbind(dim=1), added.unbind(dim=1)
        joined = torch.where(new == 0, left, torch.logaddexp(left, right))
        return torch.stack([torch.where(before == 0, right, joined), torch.maximum(before, new)], dim=1)

    def combine_backward(
        self, grad: Tensor, gamma: Tensor, state: Tensor, added: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Every part of a sum gets its share of the gradient."""
        kept, total = self.apply(gamma, state), self.combine(gamma, state, added)[:, 0]
        by_kept, by_added = (
            torch.stack([grad[:, 0] * (_read(part) - total).exp(), torch.zeros_like(total)], dim=1)
            for part in (kept, added)
        )
        return self.outer(grad, state), self.transpose(gamma, by_kept), by_added

    def step(self, *inputs: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        """k ``[B, C]``."""
        (k,) = (t for t in inputs if t is not None)
        y, state = recurrence(k[:, None], None, state)
        return y[:, 0], state

    def cost(self, *shapes: tuple[int, ...]) -> Cost:
        """Of the shape of k; an exponential and a logarithm count as one each."""
        batch, length, width = shapes[0]
        values = batch * length * width
        return Cost(4 * values, 4 * values * max(length - 1, 0).bit_length(), 4 * 2 * values)


log_sum_exp = LogSumExp()


def _check(inputs: tuple[Tensor | None, ...], docs: Documents | None, initial_state: Tensor | None) -> Tensor:
    if len(inputs) != 1 or inputs[0] is None:
        raise ValueError("log_sum_exp: inputs: expected (k,)")
    k = inputs[0]
    check_shape("log_sum_exp", "k", k, (None, None, None))
    if initial_state is not None:
        check_shape("log_sum_exp", "initial_state", initial_state, (k.shape[0], 2, k.shape[2]))
    check_row("log_sum_exp", "k", k, docs, initial_state=initial_state)
    return k
