"""Diagonal scan: a decay per channel, the recurrence of RG-LRU (arXiv 2402.19427), HGRN (arXiv 2311.04823), minGRU.

    h_t = exp(log_a_t) h_{t-1} + x_t          y_t = h_t

x and log_a ``[B, T, D]``, log_a <= 0, state ``[B, D]``. A document's first token sees h_{t-1} = 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmtrain.ops import library
from lmtrain.ops.compiled import Like, compiled
from lmtrain.ops.documents import Documents
from lmtrain.ops.op import AffineOp, Cost, check_row, check_shape, compute_dtype, scaled


def _decay(log_a: Tensor, docs: Documents | None) -> Tensor:
    """e^log_a; 1 at a document's first token, where it acts on nothing: a NaN there must not reach a gradient."""
    return (log_a if docs is None else log_a.masked_fill(docs.starts()[:, :, None], 0)).exp()


def recurrence(x: Tensor, log_a: Tensor, docs: Documents | None, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The definition, one token after another."""
    dtype = compute_dtype(x)
    values, decay = x.to(dtype), _decay(log_a.to(dtype), docs)
    state = values.new_zeros(x.shape[0], x.shape[2]) if initial_state is None else initial_state.to(dtype)
    starts = [None] * x.shape[1] if docs is None else docs.starts()[:, :, None].unbind(1)
    outputs = []
    for value, factor, start in zip(values.unbind(1), decay.unbind(1), starts, strict=True):
        if start is not None:
            state = state.masked_fill(start, 0)
        state = scaled(factor, state) + value
        outputs.append(state)
    y = torch.stack(outputs, dim=1) if outputs else values
    return y.to(x.dtype), state


def doubled(x: Tensor, log_a: Tensor, docs: Documents | None, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same in log2(T) passes over the row: after k of them column t holds the sum over its last 2^k tokens.

    What lies in another document is left out, so documents stay independent to the bit.
    """
    dtype = compute_dtype(x)
    batch, length, channels = x.shape
    h = x.to(dtype)
    if not length:
        return x, h.new_zeros(batch, channels) if initial_state is None else initial_state.to(dtype)
    column = torch.arange(length, device=x.device)[None]
    # tokens of the same document to the left, in the row
    left = column.expand(batch, -1) if docs is None else torch.minimum(docs.positions(), column)
    decay = _decay(log_a.to(dtype), docs)
    if initial_state is not None:
        first = h[:, :1] + scaled(decay[:, :1], initial_state.to(dtype)[:, None])
        h = torch.cat([first, h[:, 1:]], dim=1)
    distance = 1
    while distance < length:
        seen = (left[:, distance:] >= distance)[:, :, None]
        zero = h.new_zeros(())
        # what is not seen is replaced before it is multiplied: its NaN must not reach the gradients either
        factor = torch.where(seen, decay[:, distance:], zero)
        earlier = torch.where(seen, h[:, :-distance], zero)
        before = torch.where(seen, decay[:, :-distance], zero)
        h = torch.cat([h[:, :distance], h[:, distance:] + scaled(factor, earlier)], dim=1)
        decay = torch.cat([decay[:, :distance], factor * before], dim=1)
        distance *= 2
    return h.to(x.dtype), h[:, -1].clone()  # FSDP warns of a view


class DiagScan(AffineOp):
    """See the module. ``docs`` resets the state; ``initial_state`` ``[B, D]`` in the computing dtype."""

    name = "diag_scan"
    kind = "diag"
    needs_state = False

    def __call__(
        self, *inputs: Tensor | None, docs: Documents | None = None, initial_state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(x, log_a)`` to y ``[B, T, D]`` in x's dtype and the state after the last column.

        Raises ValueError naming the argument, what was expected and what was got.
        """
        x, log_a = self._check(inputs, docs, initial_state)
        if docs is not None and initial_state is not None and x.shape[1]:
            initial_state = self.drop(initial_state, docs.before)  # whatever it holds, NaN included
        if library.backend(self.name, x.device.type, x.dtype) == "reference":
            return doubled(x, log_a, docs, initial_state)
        starts = None if docs is None else docs.starts()
        dtype = compute_dtype(x)
        initial_state = None if initial_state is None else initial_state.to(dtype)
        y, state = torch.ops.lmtrain.diag_scan(x.to(dtype), log_a.to(dtype), starts, initial_state)
        return y.to(x.dtype), state

    def gamma(self, *inputs: Tensor | None, docs: Documents | None = None) -> Tensor:
        """``[B, D]``: e to the summed log decay."""
        x, log_a = inputs
        assert x is not None and log_a is not None
        log_a = log_a.to(compute_dtype(x))
        if docs is None:
            return log_a.sum(dim=1).exp()
        opens = docs.starts().any(dim=1)[:, None]
        zero = log_a.new_zeros(())
        return torch.where(opens, zero, torch.where(opens[:, None], zero, log_a).sum(dim=1).exp())

    def apply(self, gamma: Tensor, state: Tensor) -> Tensor:
        return scaled(gamma, state)

    def transpose(self, gamma: Tensor, grad: Tensor) -> Tensor:
        return scaled(gamma, grad)

    def outer(self, grad: Tensor, state: Tensor) -> Tensor:
        return grad * state

    def correct(self, y: Tensor, *inputs: Tensor | None, docs: Documents | None, incoming: Tensor) -> Tensor:
        x, log_a = inputs
        assert x is not None
        # y is linear in (x, state): what the state adds is the scan of nothing that starts from it
        added, _ = self(torch.zeros_like(x, dtype=incoming.dtype), log_a, docs=docs, initial_state=incoming)
        return (y.to(incoming.dtype) + added).to(y.dtype)

    def step(self, *inputs: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        """x and log_a ``[B, D]``."""
        x, log_a = (t[:, None] for t in inputs if t is not None)
        y, state = recurrence(x, log_a, None, state)
        return y[:, 0], state

    def cost(self, *shapes: tuple[int, ...]) -> Cost:
        """Of ``(x, log_a)`` shapes; bytes for fp32."""
        batch, length, channels = shapes[0]
        values = batch * length * channels
        return Cost(model_flops=3 * values, executed_flops=3 * values, bytes=4 * 3 * values)  # exp, product, sum

    def _check(
        self, inputs: tuple[Tensor | None, ...], docs: Documents | None, initial_state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if len(inputs) != 2 or any(t is None for t in inputs):
            raise ValueError("diag_scan: inputs: expected (x, log_a)")
        x, log_a = (t for t in inputs if t is not None)
        check_shape(self.name, "x", x, (None, None, None))
        batch, length, channels = x.shape
        check_shape(self.name, "log_a", log_a, (batch, length, channels))
        if initial_state is not None:
            check_shape(self.name, "initial_state", initial_state, (batch, channels))
        check_row(self.name, "x", x, docs, log_a=log_a, initial_state=initial_state)
        return x, log_a


diag_scan = DiagScan()


def _outputs(x: Tensor, *_: Tensor | None) -> tuple[Like, ...]:
    return x, (x, (x.shape[0], x.shape[2]))


def _saved(inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return outputs[0], *inputs[1:]  # y holds every state


def _gradients(y: Tensor, log_a: Tensor, *_: Tensor | None) -> tuple[Like | None, ...]:
    return y, log_a, None, _outputs(y)[1]


library.register(
    DiagScan.name, compiled(DiagScan.name, _outputs, _gradients, saved=_saved), library.Backend("reference")
)
