"""The time mixing of RWKV-4: a softmax over the past with a linear decay per channel (arXiv 2305.13048).

    y_t = (sum_{i<t} e^{(t-1-i) w + k_i} v_i + e^{u + k_t} v_t) / (the same without v)

v, k ``[B, T, D]``, w ``[D]`` <= 0 the log decay of a step, u ``[D]`` the bonus of the own token. The state
``[B, 3, D]`` is (a, b, p): numerator a e^p and denominator b e^p of the past, before the next step's decay. It is not
unique: compare a / b and p + log b. A state with b = 0 is empty, whatever p, so zeros are; any other has b >= 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmtrain.ops import library
from lmtrain.ops.compiled import Like, compiled
from lmtrain.ops.documents import Documents
from lmtrain.ops.op import AffineOp, Cost, Span, check_row, check_shape, check_static, compute_dtype, starts_of

EMPTY = -1e38  # p of an empty state: below all others, and finite, for its difference to itself


def _merge(a1: Tensor, b1: Tensor, p1: Tensor, a2: Tensor, b2: Tensor, p2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of two states, at the larger p."""
    top = torch.maximum(p1, p2)
    left, right = (p1 - top).exp(), (p2 - top).exp()
    return left * a1 + right * a2, left * b1 + right * b2, top


def _unpack(state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(a, b, p), with nothing left of an empty state but zeros and EMPTY."""
    a, b, p = state.unbind(dim=1)
    empty = b == 0
    return torch.where(empty, b, a), b, torch.where(empty, p.new_full((), EMPTY), p)


def recurrence(
    v: Tensor, k: Tensor, w: Tensor, u: Tensor, docs: Documents | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition, one token after another."""
    dtype = compute_dtype(v)
    values, keys, decay, bonus = (t.to(dtype) for t in (v, k, w, u))
    state = values.new_zeros(v.shape[0], 3, v.shape[2]) if initial_state is None else initial_state.to(dtype)
    starts = starts_of(v, docs)[:, :, None, None]
    outputs = []
    for t in range(v.shape[1]):
        a, b, p = _unpack(torch.where(starts[:, t], state.new_zeros(()), state))
        value, key = values[:, t], keys[:, t]
        one = torch.ones_like(key)
        above, below, _ = _merge(a, b, p, value, one, key + bonus)
        outputs.append(above / below)
        state = torch.stack(_merge(a, b, p + decay, value, one, key), dim=1)
    y = torch.stack(outputs, dim=1) if outputs else values
    return y.to(v.dtype), state


def chunked(
    v: Tensor, k: Tensor, w: Tensor, u: Tensor, docs: Documents | None, initial_state: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """The same as a softmax over the tokens of a chunk and the state before it, chunk after chunk."""
    dtype = compute_dtype(v)
    values, keys, decay, bonus = (t.to(dtype) for t in (v, k, w, u))
    state = values.new_zeros(v.shape[0], 3, v.shape[2]) if initial_state is None else initial_state.to(dtype)
    starts = starts_of(v, docs)
    column = torch.arange(chunk, device=v.device)
    age = (column[:, None] - 1 - column)[..., None]  # [reader, writer, 1]: steps of decay in between
    hidden = values.new_full((), -float("inf"))
    outputs = []
    for start in range(0, v.shape[1], chunk):
        value, key, opens = (t[:, start : start + chunk] for t in (values, keys, starts))
        size = value.shape[1]
        run = opens.cumsum(dim=1)  # documents opened so far in the chunk
        steps = age[:size, :size]
        visible = (run[:, :, None] == run[:, None, :])[..., None] & (steps >= 0)
        own = (steps == -1) & torch.ones_like(visible)
        logits = torch.where(visible, steps.clamp(min=0) * decay + key[:, None], hidden)
        logits = torch.where(own, (key + bonus)[:, None], logits)  # [B, reader, writer, D]
        a, b, p = _unpack(state)
        scale = torch.where(b == 0, torch.ones_like(b), b)
        past = column[:size, None] * decay + (p + scale.log())[:, None]
        past = torch.where((run == 0)[:, :, None] & (b != 0)[:, None], past, hidden)
        shares = torch.cat([logits, past[:, :, None]], dim=2).softmax(dim=2)
        outputs.append((shares * torch.cat([value, (a / scale)[:, None]], dim=1)[:, None]).sum(dim=2))
        gamma, added = _summary(value, key, decay, opens)
        state = wkv4.combine(gamma, state, added)
    y = torch.cat(outputs, dim=1) if outputs else values
    return y.to(v.dtype), state


def _summary(v: Tensor, k: Tensor, w: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """gamma ``[B, D]`` and state of a span: the tokens of its last document, each with the decay to the end."""
    length = v.shape[1]
    run = starts.cumsum(dim=1)
    reset = starts.any(dim=1)[:, None]
    gamma = torch.where(reset, w.new_full((), -float("inf")), length * w)
    if not length:
        return gamma, v.new_zeros(v.shape[0], 3, v.shape[2])
    left = torch.arange(length - 1, -1, -1, device=v.device)[:, None]
    logs = torch.where((run == run[:, -1:])[..., None], left * w + k, w.new_full((), -float("inf")))
    p = logs.amax(dim=1)
    weights = (logs - p[:, None]).exp()
    return gamma, torch.stack([(weights * torch.where(weights == 0, 0, v)).sum(dim=1), weights.sum(dim=1), p], dim=1)


class WKV4(AffineOp):
    """See the module. ``docs`` resets the state; ``initial_state`` ``[B, 3, D]`` in the computing dtype.

    Spans of this kind do not compose by ``apply(gamma, state) + added``: gamma ``[B, D]`` is the LOG decay over the
    span, -inf if a document starts in it; gammas of consecutive spans add, and ``combine`` joins states.
    """

    name = "wkv4"
    kind = "lse"
    needs_state = True
    timeless = frozenset({2, 3})

    def __call__(
        self,
        *inputs: Tensor | None,
        docs: Documents | None = None,
        initial_state: Tensor | None = None,
        **static: Any,
    ) -> tuple[Tensor, Tensor]:
        """``(v, k, w, u)`` to y ``[B, T, D]`` in v's dtype and the state after the last column.

        static: ``chunk`` of the torch form (default 16), which does not change the function. Raises ValueError naming
        the argument, what was expected and what was got.
        """
        v, k, w, u = _check(inputs, docs, initial_state)
        check_static(self.name, static, "chunk")
        chunk = static.get("chunk", 16)
        if docs is not None and initial_state is not None and v.shape[1]:
            initial_state = self.drop(initial_state, docs.before)  # whatever it holds, NaN included
        if library.backend(self.name, v.device.type, v.dtype) == "reference":
            return chunked(v, k, w, u, docs, initial_state, chunk)
        starts, dtype = None if docs is None else docs.starts(), compute_dtype(v)
        initial_state = None if initial_state is None else initial_state.to(dtype)
        y, state = torch.ops.lmtrain.wkv4(*(t.to(dtype) for t in (v, k, w, u)), starts, initial_state)
        return y.to(v.dtype), state

    def gamma(self, *inputs: Tensor | None, docs: Documents | None = None) -> Tensor:
        return self.span(*inputs, docs=docs).gamma

    def span(self, *inputs: Tensor | None, docs: Documents | None = None) -> Span:
        v, k, w, _ = _check(inputs, docs, None)
        dtype = compute_dtype(v)
        return Span(*_summary(v.to(dtype), k.to(dtype), w.to(dtype), starts_of(v, docs)))

    def combine(self, gamma: Tensor, state: Tensor, added: Tensor) -> Tensor:
        """The state after a span ``(gamma, added)`` that ``state`` enters."""
        forgotten = (gamma == -float("inf"))[:, None]
        a, b, p = _unpack(torch.where(forgotten, state.new_zeros(()), state))
        decay = torch.where(forgotten[:, 0] | (b == 0), gamma.new_zeros(()), gamma)
        return torch.stack(_merge(a, b, p + decay, *_unpack(added)), dim=1)

    def combine_backward(
        self, grad: Tensor, gamma: Tensor, state: Tensor, added: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of gamma, state and added from that of ``combine``: one step of the reverse fold."""
        leaves = [t.detach().requires_grad_() for t in (gamma, state, added)]
        with torch.enable_grad():
            by_gamma, by_state, by_added = torch.autograd.grad(self.combine(*leaves), leaves, grad)
        return by_gamma, by_state, by_added

    def apply(self, gamma: Tensor, state: Tensor) -> Tensor:
        raise TypeError(f"{self.name}: apply(): states of this kind do not add; use combine()")

    def transpose(self, gamma: Tensor, grad: Tensor) -> Tensor:
        raise TypeError(f"{self.name}: transpose(): states of this kind do not add; use combine_backward()")

    def outer(self, grad: Tensor, state: Tensor) -> Tensor:
        raise TypeError(f"{self.name}: outer(): states of this kind do not add; use combine_backward()")

    def step(self, *inputs: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        """v and k ``[B, D]``, w and u ``[D]``."""
        v, k, w, u = (t for t in inputs if t is not None)
        y, state = recurrence(v[:, None], k[:, None], w, u, None, state)
        return y[:, 0], state

    def cost(self, *shapes: tuple[int, ...], chunk: int = 16) -> Cost:
        """Of the shape of v; an exponential counts as one."""
        batch, length, width = shapes[0]
        values = batch * length * width
        return Cost(20 * values, values * (6 * chunk + 20), 4 * 3 * values)


wkv4 = WKV4()


def _check(
    inputs: tuple[Tensor | None, ...], docs: Documents | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if len(inputs) != 4 or any(t is None for t in inputs):
        raise ValueError("wkv4: inputs: expected (v, k, w, u)")
    v, k, w, u = (t for t in inputs if t is not None)
    check_shape("wkv4", "v", v, (None, None, None))
    batch, length, width = v.shape
    check_shape("wkv4", "k", k, (batch, length, width))
    check_shape("wkv4", "w", w, (width,))
    check_shape("wkv4", "u", u, (width,))
    if initial_state is not None:
        check_shape("wkv4", "initial_state", initial_state, (batch, 3, width))
    check_row("wkv4", "v", v, docs, k=k, w=w, u=u, initial_state=initial_state)
    return v, k, w, u


def _outputs(v: Tensor, *_: Tensor | None) -> tuple[Like, ...]:
    return v, (v, (v.shape[0], 3, v.shape[2]))


def _gradients(v: Tensor, *_: Tensor | None) -> tuple[Like | None, ...]:
    per_row = (v, (v.shape[0], v.shape[2]))
    return v, v, per_row, per_row, None, _outputs(v)[1]


library.register(WKV4.name, compiled(WKV4.name, _outputs, _gradients), library.Backend("reference"))
