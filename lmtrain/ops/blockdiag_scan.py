"""Linear recurrence with a dense matrix per block of channels: the regular-language LRNN.

    a_t = A_t a_{t-1} + v_t          per block

v ``[B, T, h, b]``, A ``[B, T, h, b, b]``, a and state ``[B, h, b]``. A document's first token sees a_{t-1} = 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmtrain.ops import library
from lmtrain.ops.documents import Documents
from lmtrain.ops.op import AffineOp, Cost, Span, check_row, check_shape, check_static, compute_dtype
from lmtrain.ops.transitions import apply, in_chunks, starts_of


def recurrence(
    v: Tensor, transition: Tensor, docs: Documents | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition, one token after another."""
    values, matrices = v.to(compute_dtype(v)), transition.to(compute_dtype(v))
    state = values.new_zeros(v.shape[0], *v.shape[2:]) if initial_state is None else initial_state.to(values.dtype)
    starts = starts_of(v, docs)[:, :, None, None]
    outputs = []
    for t in range(v.shape[1]):
        kept = torch.einsum("bhij,bhj->bhi", matrices[:, t], state)
        state = torch.where(starts[:, t], values[:, t], kept + values[:, t])
        outputs.append(state)
    y = torch.stack(outputs, dim=1) if outputs else values
    return y.to(v.dtype), state


def prefixes(v: Tensor, transition: Tensor, docs: Documents | None, chunk: int) -> Tensor:
    """``[B, n, Q, h, b, b + 1]``: per token (product of the chunk's A so far | a from zero), all chunks at once."""
    batch, _, blocks, size = v.shape
    dtype = compute_dtype(v)
    starts = starts_of(v, docs)[:, :, None, None, None]
    opens = in_chunks(starts, chunk)
    matrices = in_chunks(torch.where(starts, v.new_zeros((), dtype=dtype), transition.to(dtype)), chunk)
    written = in_chunks(F.pad(v.to(dtype)[..., None], (size, 0)), chunk)
    eye = torch.eye(size, dtype=dtype, device=v.device)
    run = F.pad(eye, (0, 1)).expand(batch, matrices.shape[1], blocks, size, size + 1)
    states = []
    zero = v.new_zeros((), dtype=dtype)
    for matrix, value, start in zip(matrices.unbind(2), written.unbind(2), opens.unbind(2), strict=True):
        # where, beside a matrix of zeros: a NaN of another document must reach neither values nor gradients
        run = matrix @ torch.where(start, zero, run) + value
        states.append(run)
    return torch.stack(states, dim=2)


class BlockDiagScan(AffineOp):
    """See the module. Inputs ``(v, A)``; ``initial_state`` ``[B, h, b]`` in the computing dtype."""

    name = "blockdiag_scan"
    kind = "block"
    needs_state = True

    def __call__(
        self,
        *inputs: Tensor | None,
        docs: Documents | None = None,
        initial_state: Tensor | None = None,
        **static: Any,
    ) -> tuple[Tensor, Tensor]:
        """a ``[B, T, h, b]`` in v's dtype and the state after the last column.

        static: ``chunk`` (default: the root of T), which does not change the function: the steps taken one after
        another are chunk + T / chunk. Raises ValueError naming the argument, what was expected and what was got.
        """
        v, transition = self._check(inputs, docs)
        length, size = v.shape[1], v.shape[3]
        check_static(self.name, static, "chunk")
        chunk = static.get("chunk", max(1, math.isqrt(length)))
        state = v.new_zeros(v.shape[0], *v.shape[2:], dtype=compute_dtype(v))
        if initial_state is not None:
            check_shape(self.name, "initial_state", initial_state, tuple(state.shape))
            check_row(self.name, "v", v, None, initial_state=initial_state)
            state = initial_state.to(state.dtype)
            state = state if docs is None or not length else self.drop(state, docs.before)
        if not length:
            return v, state
        products, own = prefixes(v, transition, docs, chunk).split((size, 1), dim=-1)
        outputs = []
        for product, written in zip(products.unbind(1), own.unbind(1), strict=True):
            outputs.append(self.apply(product, state[:, None]) + written[..., 0])
            state = outputs[-1][:, -1]
        out = torch.cat(outputs, dim=1)[:, :length]
        return out.to(v.dtype), out[:, -1].clone()  # not a view, which would hold the whole row

    def span(self, *inputs: Tensor | None, docs: Documents | None = None) -> Span:
        v, transition = self._check(inputs, docs)
        batch, length, blocks, size = v.shape
        dtype = compute_dtype(v)
        run = F.pad(torch.eye(size, dtype=dtype, device=v.device), (0, 1)).expand(batch, blocks, size, size + 1)
        if length:
            chunk = max(1, math.isqrt(length))
            parts = prefixes(v, transition, docs, chunk)
            for n in range(parts.shape[1]):
                product, own = parts[:, n, min(chunk, length - n * chunk) - 1].split((size, 1), dim=-1)
                run = apply(product, run) + F.pad(own, (size, 0))
        gamma, state = run.split((size, 1), dim=-1)
        return Span(gamma, state[..., 0])

    def gamma(self, *inputs: Tensor | None, docs: Documents | None = None) -> Tensor:
        """``[B, h, b, b]``: the product of the A."""
        return self.span(*inputs, docs=docs).gamma

    def apply(self, gamma: Tensor, state: Tensor) -> Tensor:
        return apply(gamma, state[..., None])[..., 0]

    def transpose(self, gamma: Tensor, grad: Tensor) -> Tensor:
        return apply(gamma.mT, grad[..., None])[..., 0]

    def outer(self, grad: Tensor, state: Tensor) -> Tensor:
        return grad[..., :, None] * state[..., None, :]

    def step(self, *inputs: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        """v ``[B, h, b]``, A ``[B, h, b, b]``."""
        v, transition = (t[:, None] for t in inputs if t is not None)
        y, state = recurrence(v, transition, None, state)
        return y[:, 0], state

    def cost(self, *shapes: tuple[int, ...]) -> Cost:
        """Of ``(v, A)`` shapes."""
        batch, length, blocks, size = shapes[0]
        tokens = batch * length * blocks
        model = tokens * 2 * size * size
        return Cost(model, model * (size + 2), 4 * tokens * (2 * size + size * size))

    def _check(self, inputs: tuple[Tensor | None, ...], docs: Documents | None) -> tuple[Tensor, Tensor]:
        tensors = [t for t in inputs if t is not None]
        if len(inputs) != 2 or len(tensors) != 2:
            raise ValueError("blockdiag_scan: inputs: expected (v, A)")
        v, transition = tensors
        check_shape(self.name, "v", v, (None, None, None, None))
        check_shape(self.name, "A", transition, (*v.shape, v.shape[3]))
        check_row(self.name, "v", v, docs, A=transition)
        return v, transition


blockdiag_scan = BlockDiagScan()
library.register(BlockDiagScan.name, library.Backend("reference"))
