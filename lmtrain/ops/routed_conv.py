"""Causal convolution over the tokens that use a memory: the local mixing before a mixture of memories.

    y_t,e = silu(sum_{d=0}^{W-1} weight[:, W-1-d] x_{t(d),e})      t(d): the d-th token before t that uses memory e

x ``[B, T, M, C]``, used bool ``[B, T, M]``, weight ``[C, W]`` of all memories, state ``[B, M, W-1, C]``: per memory the
last W-1 tokens that used it, the latest last. A token leaves a memory that it does not use as it is, and y there is 0.
A document's first token empties all memories. Gamma is a power of the shift by one place: affine, and nilpotent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lmtrain.ops import library
from lmtrain.ops.causal_conv1d import CPU, MAX_WIDTH, causal_conv1d
from lmtrain.ops.documents import Documents
from lmtrain.ops.grouped import inverse_of, permute
from lmtrain.ops.op import AffineOp, Cost, Span, check_row, check_shape, compute_dtype, starts_of
from lmtrain.ops.transitions import apply


def recurrence(
    x: Tensor, used: Tensor, weight: Tensor, docs: Documents | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition, one token after another."""
    # where, not a product: a NaN of a token that does not use the memory must reach neither values nor gradients
    taken = torch.where(used[..., None], x, x.new_zeros(())).to(compute_dtype(x))
    taps = weight.to(taken.dtype)
    state = taken.new_zeros(x.shape[0], x.shape[2], weight.shape[1] - 1, x.shape[3])
    state = state if initial_state is None else initial_state.to(taken.dtype)
    starts = starts_of(x, docs)[:, :, None, None, None]
    outputs = []
    for t in range(x.shape[1]):
        state = torch.where(starts[:, t], state.new_zeros(()), state)
        window = torch.cat([state, taken[:, t, :, None]], dim=2)
        y = F.silu(torch.einsum("bmwc,cw->bmc", window, taps))
        uses = used[:, t, :, None]
        outputs.append(torch.where(uses, y, y.new_zeros(())))
        state = torch.where(uses[..., None], window[:, :, 1:], state)
    y = torch.stack(outputs, dim=1) if outputs else taken
    return y.to(x.dtype), state


@dataclass(frozen=True)
class Routes:
    """Where tokens stand among those that use their memory, once every memory's are moved to the front of its row.

    order: int64 ``[B * M * T]``, the moved rows' places in ``[B, T, M]``; inverse: the way back.
    positions: int32 ``[B * M, T]``, moved tokens of the same document and memory to the left, W-1 more if the state
        holds some; 0 for a token that does not use the memory.
    count, opened: int64 ``[B, M]``, users of the memory in the row, and before its last document; -1 if none starts.
    """

    order: Tensor
    inverse: Tensor
    positions: Tensor
    count: Tensor
    opened: Tensor


def routes(used: Tensor, starts: Tensor, width: int) -> Routes:
    """Of used bool ``[B, T, M]`` and document starts ``[B, T]``, T at least 1."""
    batch, length, memories = used.shape
    users = used.cumsum(dim=1)
    left, count = users - used.long(), users[:, -1]
    column = torch.arange(length, device=used.device)[:, None]
    place = torch.where(used, left, count[:, None] + column - users)
    row = torch.arange(batch * memories, device=used.device).view(batch, 1, memories)
    inverse = (row * length + place).flatten()
    order = inverse_of(inverse)
    opened = torch.where(starts[..., None], left, left.new_full((), -1)).cummax(dim=1).values
    seen = torch.where(opened >= 0, left - opened, left + width - 1)
    positions = torch.where(used, seen, seen.new_zeros(())).flatten()[order].to(torch.int32)
    return Routes(order, inverse, positions.view(batch * memories, length), count, opened[:, -1])


class RoutedConv(AffineOp):
    """See the module. Inputs ``(x, used, weight)``; ``initial_state`` in the computing dtype.

    Moves every memory's tokens to the front, convolves them as ``causal_conv1d`` does a row, and moves them back.
    """

    name = "routed_conv"
    kind = "matrix"
    needs_state = True
    timeless = frozenset({2})

    def __call__(
        self, *inputs: Tensor | None, docs: Documents | None = None, initial_state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """y ``[B, T, M, C]`` in x's dtype and the state after the last column.

        Raises ValueError naming the argument, what was expected and what was got.
        """
        x, used, weight = self._check(inputs, docs)
        batch, length, memories, channels = x.shape
        dtype, width = compute_dtype(x), weight.shape[1]
        state = x.new_zeros(batch, memories, width - 1, channels, dtype=dtype)
        if initial_state is not None:
            check_shape(self.name, "initial_state", initial_state, tuple(state.shape))
            check_row(self.name, "x", x, None, initial_state=initial_state)
            state = initial_state.to(dtype)
        if not length:
            return x, state
        found = routes(used, starts_of(x, docs), width)
        rows = x.flatten(0, 2)
        moved = permute(rows, found.order, found.inverse)
        idle = torch.arange(length, device=x.device) >= found.count.flatten()[:, None]
        moved = moved.masked_fill_(idle.view(-1, 1), 0.0)  # a NaN there would reach gradients, as 0 * NaN
        moved = moved.view(batch * memories, length, channels).to(dtype)
        y = self._convolve(moved, weight.to(dtype), found.positions, state.flatten(0, 1), x.dtype)
        y = permute(y.to(x.dtype).flatten(0, 1), found.inverse, found.order)
        # what leaves is what a shift leaves of the state, and the row's last users
        kept = self.apply(self.gamma(*inputs, docs=docs), state)
        return y.view(x.shape), kept + _latest(rows, found, width).to(dtype)

    def _convolve(self, rows: Tensor, weight: Tensor, positions: Tensor, tail: Tensor, dtype: torch.dtype) -> Tensor:
        if library.backend(self.name, rows.device.type, dtype) == "reference":
            return causal_conv1d.reference(rows, weight, None, positions, tail, "silu")[0]
        return torch.ops.lmtrain.causal_conv1d(rows, weight, None, positions, tail, "silu")[0]

    def span(self, *inputs: Tensor | None, docs: Documents | None = None) -> Span:
        x, used, weight = self._check(inputs, docs)
        batch, length, memories, channels = x.shape
        width, dtype = weight.shape[1], compute_dtype(x)
        gamma = self.gamma(*inputs, docs=docs)
        if not length:
            return Span(gamma, x.new_zeros(batch, memories, width - 1, channels, dtype=dtype))
        found = routes(used, starts_of(x, docs), width)
        return Span(gamma, _latest(x.flatten(0, 2), found, width).to(dtype))

    def gamma(self, *inputs: Tensor | None, docs: Documents | None = None) -> Tensor:
        """``[B, M, W-1, W-1]``: the shift by as many places as tokens use the memory."""
        x, used, weight = self._check(inputs, docs)
        place = torch.arange(weight.shape[1] - 1, device=x.device)
        moves = place[:, None] + used.sum(dim=1)[..., None, None] == place
        started = starts_of(x, docs).any(dim=1)[:, None, None, None]
        return (moves & ~started).to(compute_dtype(x))

    def apply(self, gamma: Tensor, state: Tensor) -> Tensor:
        return apply(gamma.detach(), state)  # it counts tokens: nothing has a gradient through it

    def transpose(self, gamma: Tensor, grad: Tensor) -> Tensor:
        return apply(gamma.mT, grad)

    def outer(self, grad: Tensor, state: Tensor) -> Tensor:
        return grad.new_zeros(*grad.shape[:-1], grad.shape[-2])

    def step(self, *inputs: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        """x ``[B, M, C]``, used ``[B, M]``, weight ``[C, W]``."""
        x, used, weight = (t for t in inputs if t is not None)
        y, state = recurrence(x[:, None], used[:, None], weight, None, state)
        return y[:, 0], state

    def cost(self, *shapes: tuple[int, ...]) -> Cost:
        """Of shapes x ``[B, T, M, C]``, used and weight ``[C, W]``, as if every memory were used; bytes: of x and y."""
        batch, length, memories, channels = shapes[0]
        values = batch * length * memories * channels
        flops = 2 * shapes[2][1] * values
        return Cost(flops, flops, 4 * 2 * values)

    def _check(self, inputs: tuple[Tensor | None, ...], docs: Documents | None) -> tuple[Tensor, Tensor, Tensor]:
        tensors = [t for t in inputs if t is not None]
        if len(inputs) != 3 or len(tensors) != 3:
            raise ValueError(f"{self.name}: inputs: expected (x, used, weight)")
        x, used, weight = tensors
        check_shape(self.name, "x", x, (None, None, None, None))
        check_shape(self.name, "weight", weight, (x.shape[3], None))
        if not 1 <= weight.shape[1] <= MAX_WIDTH:
            raise ValueError(f"{self.name}: weight: expected 1 to {MAX_WIDTH} taps, got {weight.shape[1]}")
        check_row(self.name, "x", x, docs, weight=weight)
        check_shape(self.name, "used", used, tuple(x.shape[:3]))
        if used.dtype is not torch.bool:
            raise ValueError(f"{self.name}: used: expected bools, got {used.dtype}")
        if used.device != x.device:
            raise ValueError(f"{self.name}: used: expected device {x.device} as x, got {used.device}")
        return x, used, weight


def _latest(rows: Tensor, found: Routes, width: int) -> Tensor:
    """``[B, M, W-1, C]`` of rows ``[B * T * M, C]``: each memory's last users in the row's last document, zeros before
    the first of them."""
    batch, memories = found.count.shape
    place = found.count[..., None] + torch.arange(1 - width, 0, device=rows.device)
    last = found.order.view(batch, memories, -1).gather(2, place.clamp(min=0))
    held = place >= found.opened.clamp(min=0)[..., None]
    return torch.where(held[..., None], rows[last], rows.new_zeros(()))


routed_conv = RoutedConv()
library.register(RoutedConv.name, CPU, library.Backend("reference"))
