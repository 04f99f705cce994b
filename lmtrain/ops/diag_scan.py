"""Diagonal scan: a decay per channel, the recurrence of RG-LRU (arXiv 2402.19427), HGRN (arXiv 2311.04823), minGRU.

    h_t = exp(log_a_t) h_{t-1} + x_t          y_t = h_t

x and log_a ``[B, T, D]``, log_a <= 0, state ``[B, D]``. A document's first token sees h_{t-1} = 0.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from lmtrain.ops import library
from lmtrain.ops.documents import Documents
from lmtrain.ops.op import AffineOp, Cost, check_shape, compute_dtype


def _scale(factor: Tensor, state: Tensor) -> Tensor:
    """``factor * state``, 0 where the factor is 0, even of infinities."""
    kept = torch.where(factor == 0, state.new_zeros(()), state)
    return factor * kept


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
        state = _scale(factor, state) + value
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
        first = h[:, :1] + _scale(decay[:, :1], initial_state.to(dtype)[:, None])
        h = torch.cat([first, h[:, 1:]], dim=1)
    distance = 1
    while distance < length:
        seen = (left[:, distance:] >= distance)[:, :, None]
        zero = h.new_zeros(())
        # what is not seen is replaced before it is multiplied: its NaN must not reach the gradients either
        factor = torch.where(seen, decay[:, distance:], zero)
        earlier = torch.where(seen, h[:, :-distance], zero)
        before = torch.where(seen, decay[:, :-distance], zero)
        h = torch.cat([h[:, :distance], h[:, distance:] + _scale(factor, earlier)], dim=1)
        decay = torch.cat([decay[:, :distance], factor * before], dim=1)
        distance *= 2
    return h.to(x.dtype), h[:, -1]


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
        return _scale(gamma, state)

    def transpose(self, gamma: Tensor, grad: Tensor) -> Tensor:
        return _scale(gamma, grad)

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
        if not x.is_floating_point():
            raise ValueError(f"diag_scan: x: expected a floating dtype, got {x.dtype}")
        check_shape(self.name, "x", x, (None, None, None))
        batch, length, channels = x.shape
        check_shape(self.name, "log_a", log_a, (batch, length, channels))
        if initial_state is not None:
            check_shape(self.name, "initial_state", initial_state, (batch, channels))
        if docs is not None:
            check_shape(self.name, "docs.ids", docs.ids, (batch, length))
        others = {"log_a": log_a, "initial_state": initial_state, "docs": None if docs is None else docs.ids}
        for argument, other in others.items():
            if other is not None and other.device != x.device:
                raise ValueError(f"diag_scan: {argument}: expected device {x.device} as x, got {other.device}")
        return x, log_a


diag_scan = DiagScan()


# --- the compiled backend: shapes for tracing and the backward, registered when the library first loads ---


def _native_missing() -> str | None:
    reason = library.load()
    if reason is None and not hasattr(torch.ops.lmtrain, DiagScan.name):
        reason = f"the compiled library is older than it; rebuild it with `{library.BUILD_COMMAND}`"
    if reason is None:
        _register_native()
    return reason


@cache
def _register_native() -> None:
    torch.library.register_fake("lmtrain::diag_scan", _fake_forward)
    torch.library.register_fake("lmtrain::diag_scan_backward", _fake_backward)
    torch.library.register_autograd("lmtrain::diag_scan", _backward, setup_context=_save)


def _fake_forward(
    x: Tensor, log_a: Tensor, starts: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], x.shape[2])


def _fake_backward(
    grad_y: Tensor, grad_state: Tensor, y: Tensor, log_a: Tensor, starts: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return y.new_empty(y.shape), y.new_empty(y.shape), y.new_empty(y.shape[0], y.shape[2])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, log_a, starts, initial_state = inputs
    ctx.save_for_backward(output[0], log_a, starts, initial_state)  # y holds every state


def _backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: activation checkpointing recomputes them, and refuses a second time
    grad_x, grad_log_a, grad_initial = torch.ops.lmtrain.diag_scan_backward(grad_y, grad_state, *saved)
    return grad_x, grad_log_a, None, None if saved[-1] is None else grad_initial


library.register(
    DiagScan.name,
    library.Backend("cpu", "cpu", frozenset({torch.float32, torch.float64, torch.bfloat16}), _native_missing),
    library.Backend("reference"),
)
