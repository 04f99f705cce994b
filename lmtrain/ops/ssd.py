"""State-space duality: the scalar-decay scan of Mamba-2, RetNet and lightning attention (arXiv 2405.21060).

    S_t = exp(log_a_t) S_{t-1} + B_t x_t^T          y_t = S_t^T C_t

x ``[B, T, H, P]`` (already times dt), log_a ``[B, T, H]`` <= 0, B and C ``[B, T, G, N]`` with head h reading group
``h // (H / G)``, state ``[B, H, N, P]``. A document's first token sees S_{t-1} = 0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmtrain.ops import library
from lmtrain.ops.adapters import fla
from lmtrain.ops.compiled import Like, compiled
from lmtrain.ops.documents import Documents
from lmtrain.ops.op import AffineOp, Cost, check_row, check_shape, check_static, compute_dtype, scaled, starts_of


def recurrence(
    x: Tensor, log_a: Tensor, b: Tensor, c: Tensor, docs: Documents | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition, one token after another."""
    dtype = compute_dtype(x)
    heads = x.shape[2] // b.shape[2]
    values, decay = x.to(dtype), log_a.to(dtype).exp()
    keys, queries = (t.to(dtype).repeat_interleave(heads, dim=2) for t in (b, c))
    state = keys.new_zeros(x.shape[0], x.shape[2], b.shape[3], x.shape[3])
    state = state if initial_state is None else initial_state.to(dtype)
    starts = starts_of(x, docs)
    outputs = []
    for t in range(x.shape[1]):
        state = torch.where(starts[:, t, None, None, None], state.new_zeros(()), state)
        state = decay[:, t, :, None, None] * state + keys[:, t, :, :, None] * values[:, t, :, None, :]
        outputs.append(torch.einsum("bhnp,bhn->bhp", state, queries[:, t]))
    y = torch.stack(outputs, dim=1) if outputs else values
    return y.to(x.dtype), state


def chunked(
    x: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    docs: Documents | None,
    initial_state: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """The same by matrix products within chunks and a fold over chunks.

    Decays are summed within one document only, never over a border and masked afterwards: documents stay independent
    to the bit.
    """
    batch, length, num_heads, head_dim = x.shape
    groups, d_state = b.shape[2], b.shape[3]
    heads = num_heads // groups
    dtype = compute_dtype(x)
    count = -(-length // chunk)
    pad = count * chunk - length

    def chunks(t: Tensor, *shape: int) -> Tensor:
        t = t.to(dtype) if t.dtype != torch.bool else t
        t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, pad)) if pad else t
        return t.reshape(batch, count, chunk, *shape)

    values = chunks(x, groups, heads, head_dim).permute(0, 1, 3, 4, 2, 5)  # [B, n, G, R, Q, P]
    logs = chunks(log_a, groups, heads).permute(0, 1, 3, 4, 2)  # [B, n, G, R, Q]
    keys, queries = (chunks(t, groups, d_state).permute(0, 1, 3, 2, 4)[:, :, :, None] for t in (b, c))  # [B,n,G,1,Q,N]
    run = chunks(starts_of(x, docs)).cumsum(dim=2)  # documents opened so far in the chunk [B, n, Q]

    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    same = ((run[:, :, :, None] == run[:, :, None, :]) & lower)[:, :, None, None]  # [B, n, 1, 1, Q, Q]
    zero = logs.new_zeros(())
    between = torch.where(same & lower.tril(-1), logs[..., :, None], zero).cumsum(dim=-2)
    decay = torch.where(same, between.exp(), zero)  # e^{log_a summed over (j, i]}
    y = ((queries @ keys.mT) * decay) @ values

    ends = keys.mT @ (decay[..., -1, :, None] * values)  # what each chunk adds to the state [B, n, G, R, N, P]
    carried = (run == 0)[:, :, None, None]  # tokens of the document that entered the chunk
    reach = torch.where(carried, torch.where(carried, logs, zero).cumsum(dim=-1).exp(), zero)
    gamma = reach[..., -1]  # [B, n, G, R]
    state = (
        ends.new_zeros(ends[:, 0].shape) if count else x.new_zeros(batch, groups, heads, d_state, head_dim, dtype=dtype)
    )
    if initial_state is not None:
        state = initial_state.to(dtype).reshape(state.shape)
    entering = []
    for through, end in zip(gamma.unbind(1), ends.unbind(1), strict=True):
        entering.append(state)
        state = scaled(through[..., None, None], state) + end
    if count:
        y = y + reach[..., None] * (queries @ torch.stack(entering, dim=1))
    y = y.permute(0, 1, 4, 2, 3, 5).reshape(batch, count * chunk, num_heads, head_dim)[:, :length]
    return y.to(x.dtype), state.reshape(batch, num_heads, d_state, head_dim).clone()  # FSDP warns of a view


class SSD(AffineOp):
    """See the module. ``docs`` resets the state; ``initial_state`` ``[B, H, N, P]`` in the computing dtype."""

    name = "ssd"
    kind = "scalar"
    needs_state = False

    def __call__(
        self,
        *inputs: Tensor | None,
        docs: Documents | None = None,
        initial_state: Tensor | None = None,
        **static: Any,
    ) -> tuple[Tensor, Tensor]:
        """``(x, log_a, B, C)`` to y ``[B, T, H, P]`` in x's dtype and the state after the last column.

        static: ``chunk`` (default 64), which does not change the function. Raises ValueError naming the argument, what
        was expected and what was got. The compiled backend keeps the states between chunks of at most 64 tokens for the
        backward: about ``T / chunk`` times ``[B, H, N, P]``.
        """
        x, log_a, b, c = self._check(inputs, docs, initial_state)
        check_static(self.name, static, "chunk")
        chunk = static.get("chunk", 64)
        if docs is not None and initial_state is not None and x.shape[1]:
            initial_state = self.drop(initial_state, docs.before)  # whatever it holds, NaN included
        backend = library.backend(self.name, x.device.type, x.dtype)
        if backend == "fla":
            return fla.ssd(x, log_a, b, c, docs, initial_state)
        if backend == "reference":
            return chunked(x, log_a, b, c, docs, initial_state, chunk)
        starts = None if docs is None else docs.starts()
        values, log_a, b, c = (t.to(compute_dtype(x)) for t in (x, log_a, b, c))
        initial_state = None if initial_state is None else initial_state.to(values.dtype)
        y, state, _ = torch.ops.lmtrain.ssd(values, log_a, b, c, starts, initial_state, chunk)
        return y.to(x.dtype), state

    def gamma(self, *inputs: Tensor | None, docs: Documents | None = None) -> Tensor:
        """``[B, H]``: e to the summed log decay."""
        x, log_a = inputs[0], inputs[1]
        assert x is not None and log_a is not None
        total = log_a.to(compute_dtype(x)).sum(dim=1).exp()
        return torch.where(starts_of(x, docs).any(dim=1)[:, None], total.new_zeros(()), total)

    def apply(self, gamma: Tensor, state: Tensor) -> Tensor:
        return scaled(gamma[..., None, None], state)

    def transpose(self, gamma: Tensor, grad: Tensor) -> Tensor:
        return scaled(gamma[..., None, None], grad)

    def outer(self, grad: Tensor, state: Tensor) -> Tensor:
        return (grad * state).sum(dim=(-2, -1))

    def correct(self, y: Tensor, *inputs: Tensor | None, docs: Documents | None, incoming: Tensor) -> Tensor:
        x, log_a, _, c = inputs
        assert x is not None and log_a is not None and c is not None
        carried = (starts_of(x, docs).cumsum(dim=1) == 0)[:, :, None]
        zero = incoming.new_zeros(())
        if docs is not None and x.shape[1]:
            incoming = self.drop(incoming, docs.before)
        reach = torch.where(carried, torch.where(carried, log_a.to(incoming.dtype), zero).cumsum(dim=1).exp(), zero)
        grouped = incoming.unflatten(1, (c.shape[2], -1))
        read = torch.einsum("btgn,bgrnp->btgrp", c.to(incoming.dtype), grouped).flatten(2, 3)
        return (y.to(incoming.dtype) + reach[..., None] * read).to(y.dtype)

    def step(self, *inputs: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        """x ``[B, H, P]``, log_a ``[B, H]``, B and C ``[B, G, N]``."""
        x, log_a, b, c = (t[:, None] for t in inputs if t is not None)
        y, state = recurrence(x, log_a, b, c, None, state)
        return y[:, 0], state

    def cost(self, *shapes: tuple[int, ...], chunk: int = 64) -> Cost:
        """Of ``(x, log_a, B, C)`` shapes."""
        batch, length, num_heads, head_dim = shapes[0]
        d_state = shapes[2][-1]
        tokens = batch * length * num_heads
        model = tokens * d_state * head_dim * 5  # decay, outer product, add, read
        within = tokens * chunk * 2 * (d_state + head_dim) + tokens * 3 * chunk
        between = tokens * 4 * d_state * head_dim
        moved = 4 * (2 * tokens * head_dim + tokens + 2 * batch * length * shapes[2][2] * d_state)
        return Cost(model, within + between, moved)

    def _check(
        self, inputs: tuple[Tensor | None, ...], docs: Documents | None, initial_state: Tensor | None
    ) -> tuple[Tensor, ...]:
        if len(inputs) != 4 or any(t is None for t in inputs):
            raise ValueError("ssd: inputs: expected (x, log_a, B, C)")
        x, log_a, b, c = (t for t in inputs if t is not None)
        check_shape(self.name, "x", x, (None, None, None, None))
        batch, length, num_heads, head_dim = x.shape
        check_shape(self.name, "log_a", log_a, (batch, length, num_heads))
        check_shape(self.name, "B", b, (batch, length, None, None))
        check_shape(self.name, "C", c, tuple(b.shape))
        if num_heads == 0:
            raise ValueError("ssd: x: expected at least one head, got 0")
        if b.shape[2] == 0 or num_heads % b.shape[2]:
            raise ValueError(f"ssd: B: expected groups that divide the {num_heads} heads, got {b.shape[2]}")
        if initial_state is not None:
            check_shape(self.name, "initial_state", initial_state, (batch, num_heads, b.shape[3], head_dim))
        check_row(self.name, "x", x, docs, log_a=log_a, B=b, C=c, initial_state=initial_state)
        return x, log_a, b, c


ssd = SSD()


# --- the compiled backend: the forward keeps the states that enter its pieces, at most _PIECE tokens long ---

_PIECE, _LANES = 64, 16  # as kChunk and kBlock in csrc/ssd/kernel.h


def _outputs(
    x: Tensor, log_a: Tensor, b: Tensor, c: Tensor, starts: Tensor | None, initial_state: Tensor | None, chunk: int
) -> tuple[Like, ...]:
    batch, length, num_heads, head_dim = x.shape
    pieces = -(-length // min(chunk, _PIECE))
    kept = pieces if initial_state is not None or length == 0 else pieces - 1
    width = -(-head_dim // _LANES) * _LANES
    state = (batch, num_heads, b.shape[3], head_dim)
    return x, (x, state), (x, (batch, kept, num_heads, b.shape[3], width))


def _saved(inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    *tensors, chunk = inputs
    return *tensors, outputs[2], chunk


def _gradients(x: Tensor, log_a: Tensor, b: Tensor, c: Tensor, *_: Any) -> tuple[Like | None, ...]:
    state = (x.shape[0], x.shape[2], b.shape[3], x.shape[3])
    return x, log_a, b, c, None, (x, state), None


library.register(
    SSD.name,
    compiled(SSD.name, _outputs, _gradients, saved=_saved),
    fla.WHOLE,
    library.Backend("reference"),
)
