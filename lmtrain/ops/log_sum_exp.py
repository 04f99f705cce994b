"""The logarithm of a running sum of exponentials: the normaliser of LightNet's additive decay (arXiv 2405.21022).

    y_t = log sum_{s<t} exp(k_s)

over the tokens s of t's document, the own token excluded: -inf at a document's first. k ``[B, T, C]``. The state
``[B, 2, C]`` is the sum over the document so far, and 1 where it has a token: zeros are the empty state.

It is computed as ``m_t + log r_t`` with m the largest so far and r_t = exp(m_{t-1} - m_t) r_{t-1} + exp(k_t - m_t), a
``diag_scan`` whose every term is at most 1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmtrain.ops.diag_scan import diag_scan
from lmtrain.ops.documents import Documents
from lmtrain.ops.op import AffineOp, Cost, Span, check_row, check_shape, check_static, compute_dtype, starts_of

INF = float("inf")
NOTHING = -1e4
"""A logarithm of 0, but finite: the difference of two infinities is no number."""


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


def _inclusive(keys: Tensor, docs: Documents | None, starts: Tensor, state: Tensor) -> Tensor:
    """The sums with the own token, ``[B, T, C]``."""
    seen, zero = state[:, 1] != 0, keys.new_zeros(())
    with torch.no_grad():  # the sums do not depend on what they are computed over
        largest = _running_max(torch.cat([_read(state)[:, None], keys], dim=1), starts)
        falls = torch.where(starts[..., None], zero, (largest[:, :-1] - largest[:, 1:]).clamp(min=NOTHING))
        held, largest = largest[:, 0], largest[:, 1:]
    entering = torch.where(seen, torch.exp(torch.where(seen, state[:, 0] - held, zero)), zero)
    total, _ = diag_scan(torch.exp(keys - largest), falls, docs=docs, initial_state=entering)
    return largest + total.log()


def _running_max(values: Tensor, starts: Tensor) -> Tensor:
    """The largest of ``[B, 1 + T, C]`` so far in each document, rounded to fp32; column 0 stands before the row.

    Documents stay independent to the bit: their number is the upper half of an integer, their numbers in order the
    lower.
    """
    numbers = _ordered(values.float().contiguous().view(torch.int32))
    document = F.pad(starts.cumsum(dim=1), (1, 0))[..., None]
    top = ((document << 32) + (numbers.long() + 2**31)).cummax(dim=1).values
    return _ordered(((top & 0xFFFFFFFF) - 2**31).int()).view(torch.float32).to(values.dtype)


def _ordered(bits: Tensor) -> Tensor:
    """int32 bits of fp32 numbers to integers in the order of the numbers, and back."""
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


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
        check_static(self.name, static)
        k = _check(inputs, docs, initial_state)
        if docs is not None and initial_state is not None and k.shape[1]:
            initial_state = self.drop(initial_state, docs.before)  # whatever it holds, NaN included
        keys, starts, state = _prepare(k, docs, initial_state)
        if not k.shape[1]:
            return k, state
        total = _inclusive(keys, docs, starts, state)
        y = torch.cat([_read(state)[:, None], total[:, :-1]], dim=1)
        return torch.where(starts[..., None], -INF, y).to(k.dtype), _one(total[:, -1])

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
        return Cost(4 * values, 8 * values, 4 * 2 * values)


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
