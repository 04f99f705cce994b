"""Gated linear attention: the scan with a decay per key channel (GLA, arXiv 2312.06635; HGRN2; RWKV-5/6, 2404.05892).

    S_t = Diag(exp(g_t)) S_{t-1} + k_t v_t^T      y_t = S_t^T q_t                                   without u: inclusive
                                                  y_t = S_{t-1}^T q_t + (sum_i q_i u_i k_i) v_t     with u: exclusive

v ``[B, T, H, V]``, q, k, g ``[B, T, H, K]``, g <= 0 the log decay, u ``[H, K]`` the bonus of the own token or None,
state ``[B, H, K, V]``. A document's first token sees S_{t-1} = 0.
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


def _previous(t: Tensor, dim: int) -> Tensor:
    """``t`` moved on by one along ``dim``; the first is zeros."""
    return torch.cat([torch.zeros_like(t.narrow(dim, 0, 1)), t.narrow(dim, 0, t.shape[dim] - 1)], dim=dim)


def recurrence(
    v: Tensor, q: Tensor, k: Tensor, g: Tensor, u: Tensor | None, docs: Documents | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition, one token after another."""
    dtype = compute_dtype(v)
    values, queries, keys, decay = v.to(dtype), q.to(dtype), k.to(dtype), g.to(dtype).exp()
    state = values.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3])
    state = state if initial_state is None else initial_state.to(dtype)
    starts = starts_of(v, docs)[:, :, None, None, None]
    outputs = []
    for t in range(v.shape[1]):
        old = torch.where(starts[:, t], state.new_zeros(()), state)
        written = keys[:, t, :, :, None] * values[:, t, :, None, :]
        state = torch.where(starts[:, t], written, decay[:, t, :, :, None] * old + written)
        read = state if u is None else old + u.to(dtype)[:, :, None] * written
        outputs.append(torch.einsum("bhkv,bhk->bhv", read, queries[:, t]))
    y = torch.stack(outputs, dim=1) if outputs else values
    return y.to(v.dtype), state


def chunked(
    v: Tensor,
    q: Tensor,
    k: Tensor,
    g: Tensor,
    u: Tensor | None,
    docs: Documents | None,
    initial_state: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """The same with the tokens of a chunk at once and a fold over chunks. Memory: T * chunk * H * K a few times.

    Decays are summed from the writing token to the reading one, within one document: no factor exceeds 1, and documents
    stay independent to the bit.
    """
    batch, length, heads, width = v.shape
    dtype = compute_dtype(v)
    count = -(-length // chunk)
    pad = count * chunk - length

    def chunks(t: Tensor) -> Tensor:  # [B, n, H, Q, *]
        t = F.pad(t.to(dtype), (0, 0, 0, 0, 0, pad)) if pad else t.to(dtype)
        return t.reshape(batch, count, chunk, heads, t.shape[3]).transpose(2, 3)

    values, queries, keys, logs = (chunks(t) for t in (v, q, k, g))
    run = (
        F.pad(starts_of(v, docs).int(), (0, pad)).reshape(batch, count, chunk).cumsum(dim=2)
    )  # documents opened so far
    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=v.device).tril(-1)
    same = (run[:, :, :, None] == run[:, :, None, :])[:, :, None, :, :, None]  # [B, n, 1, Q, Q, 1]
    earlier = same & lower[:, :, None]
    zero, one = logs.new_zeros(()), logs.new_ones(())
    # [i, j]: g summed over (j, i], of one document
    between = torch.where(earlier, logs[..., :, None, :], zero).cumsum(dim=-3)
    carried = (run == 0)[:, :, None, :, None]  # tokens of the document that entered the chunk
    entered = torch.where(carried, logs, zero).cumsum(dim=-2)

    def read_by(total: Tensor) -> Tensor:
        """The decay that reader i applies: up to its own token, or with a bonus up to the one before."""
        return total if u is None else _previous(total, 3)

    diagonal = torch.eye(chunk, dtype=torch.bool, device=v.device)[:, :, None]
    own = one if u is None else u.to(dtype)[:, None, None, :]
    weight = torch.where(earlier, read_by(between).exp(), torch.where(diagonal, own, zero))
    scores = ((keys[..., None, :, :] * weight) @ queries[..., None]).squeeze(-1)  # [B, n, H, Q, Q]
    y = scores @ values

    leave = torch.where(same[:, :, :, -1], between[..., -1, :, :].exp(), zero)
    ends = (keys * leave).mT @ values  # what each chunk adds to the state [B, n, H, K, V]
    gamma = torch.where(carried[..., -1, :], entered[..., -1, :].exp(), zero)
    enter = queries * torch.where(carried, read_by(entered).exp(), zero)
    state = values.new_zeros(batch, heads, k.shape[3], width) if initial_state is None else initial_state.to(dtype)
    entering = []
    for factor, added in zip(gamma.unbind(dim=1), ends.unbind(dim=1), strict=True):
        entering.append(state)
        state = scaled(factor[..., None], state) + added
    if count:
        y = y + enter @ torch.stack(entering, dim=1)
    y = y.transpose(2, 3).reshape(batch, count * chunk, heads, width)[:, :length]
    return y.to(v.dtype), state


class GLA(AffineOp):
    """See the module. ``docs`` resets the state; ``initial_state`` ``[B, H, K, V]`` in the computing dtype.

    Whether the read is exclusive follows from ``u``, which is an input of every method: a read without bonus of its
    own token is ``u = 0``.
    """

    name = "gla"
    kind = "vector"
    needs_state = False
    timeless = frozenset({4})

    def __call__(
        self,
        *inputs: Tensor | None,
        docs: Documents | None = None,
        initial_state: Tensor | None = None,
        **static: Any,
    ) -> tuple[Tensor, Tensor]:
        """``(v, q, k, g, u)`` to y ``[B, T, H, V]`` in v's dtype and the state after the last column.

        static: ``chunk`` of the torch form (default 16), which does not change the function; ``exclusive``, if given,
        must say whether ``u`` is. Raises ValueError naming the argument, what was expected and what was got.
        """
        v, q, k, g, u = _check(inputs, docs, initial_state)
        check_static(self.name, static, "chunk", "exclusive")
        chunk, exclusive = static.get("chunk", 16), static.get("exclusive", u is not None)
        if exclusive != (u is not None):
            raise ValueError(f"{self.name}: exclusive: expected {u is not None}, as u says, got {exclusive}")
        if docs is not None and initial_state is not None and v.shape[1]:
            initial_state = self.drop(initial_state, docs.before)  # whatever it holds, NaN included
        backend = library.backend(self.name, v.device.type, v.dtype)
        if backend == "fla":
            return fla.gla(v, q, k, g, u, docs, initial_state)
        if backend == "reference":
            return chunked(v, q, k, g, u, docs, initial_state, chunk)
        starts, dtype = None if docs is None else docs.starts(), compute_dtype(v)
        values, *others = (t.to(dtype) for t in (v, q, k, g))
        u, initial_state = (None if t is None else t.to(dtype) for t in (u, initial_state))
        y, state = torch.ops.lmtrain.gla(values, *others, u, starts, initial_state)
        return y.to(v.dtype), state

    def gamma(self, *inputs: Tensor | None, docs: Documents | None = None) -> Tensor:
        """``[B, H, K]``: e to the summed log decay."""
        v, _, _, g, _ = _check(inputs, docs, None)
        total = g.to(compute_dtype(v)).sum(dim=1).exp()
        return torch.where(starts_of(v, docs).any(dim=1)[:, None, None], total.new_zeros(()), total)

    def apply(self, gamma: Tensor, state: Tensor) -> Tensor:
        return scaled(gamma[..., None], state)

    def transpose(self, gamma: Tensor, grad: Tensor) -> Tensor:
        return scaled(gamma[..., None], grad)

    def outer(self, grad: Tensor, state: Tensor) -> Tensor:
        return (grad * state).sum(dim=-1)

    def correct(self, y: Tensor, *inputs: Tensor | None, docs: Documents | None, incoming: Tensor) -> Tensor:
        v, q, _, g, u = _check(inputs, docs, incoming)
        if docs is not None and v.shape[1]:
            incoming = self.drop(incoming, docs.before)
        carried = (starts_of(v, docs).cumsum(dim=1) == 0)[:, :, None, None]
        zero = incoming.new_zeros(())
        entered = torch.where(carried, g.to(incoming.dtype), zero).cumsum(dim=1)
        entered = entered if u is None or not v.shape[1] else _previous(entered, 1)
        reach = q.to(incoming.dtype) * torch.where(carried, entered.exp(), zero)
        return (y.to(incoming.dtype) + torch.einsum("bthk,bhkv->bthv", reach, incoming)).to(y.dtype)

    def step(self, *inputs: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        """v ``[B, H, V]``, q, k, g ``[B, H, K]``, u ``[H, K]`` or None."""
        *tokens, u = inputs
        v, q, k, g = (t[:, None] for t in tokens if t is not None)
        y, state = recurrence(v, q, k, g, u, None, state)
        return y[:, 0], state

    def cost(self, *shapes: tuple[int, ...], chunk: int = 16) -> Cost:
        """Of ``(v, q, k, g)`` shapes."""
        (batch, length, heads, width), keys = shapes[0], shapes[1][-1]
        tokens = batch * length * heads
        within = tokens * chunk * (2 * width + 4 * keys)
        between = tokens * 4 * keys * width
        return Cost(tokens * 5 * keys * width, within + between, 4 * tokens * (2 * width + 3 * keys))


gla = GLA()


def _check(
    inputs: tuple[Tensor | None, ...], docs: Documents | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    if len(inputs) != 5 or any(t is None for t in inputs[:4]):
        raise ValueError("gla: inputs: expected (v, q, k, g, u), of which u may be None")
    (v, q, k, g), u = (t for t in inputs[:4] if t is not None), inputs[4]
    check_shape("gla", "v", v, (None, None, None, None))
    batch, length, heads, width = v.shape
    check_shape("gla", "q", q, (batch, length, heads, None))
    check_shape("gla", "k", k, tuple(q.shape))
    check_shape("gla", "g", g, tuple(q.shape))
    if u is not None:
        check_shape("gla", "u", u, (heads, q.shape[3]))
    if initial_state is not None:
        check_shape("gla", "initial_state", initial_state, (batch, heads, q.shape[3], width))
    check_row("gla", "v", v, docs, q=q, k=k, g=g, u=u, initial_state=initial_state)
    return v, q, k, g, u


def _outputs(v: Tensor, q: Tensor, *_: Tensor | None) -> tuple[Like, ...]:
    return v, (v, (v.shape[0], v.shape[2], q.shape[3], v.shape[3]))


def _gradients(v: Tensor, q: Tensor, k: Tensor, g: Tensor, *_: Tensor | None) -> tuple[Like | None, ...]:
    return v, q, k, g, (v, (v.shape[0], *q.shape[2:])), None, _outputs(v, q)[1]


library.register(GLA.name, compiled(GLA.name, _outputs, _gradients), fla.WHOLE, library.Backend("reference"))
