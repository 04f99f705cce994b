"""The gated delta rule of DeltaNet, Gated DeltaNet and KDA (arXiv 2406.06484, 2412.06464, 2510.26692).

    S_t = R_t + beta_t k_t (v_t - R_t^T k_t)^T      R_t = Diag(exp(g_t)) S_{t-1}      y_t = S_t^T q_t

v ``[B, T, Hv, V]``, q and k ``[B, T, H, K]`` with value head h reading key head ``h // (Hv / H)``, beta ``[B, T, Hv]``,
the log decay g <= 0 ``[B, T, Hv]`` (Gated DeltaNet), ``[B, T, Hv, K]`` (KDA) or None (DeltaNet), state
``[B, Hv, K, V]``. Stable if ``|k| = 1`` and ``0 <= beta <= 2``: the mixer normalises k. A document's first token sees
S_{t-1} = 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmtrain.ops import library
from lmtrain.ops.adapters import fla
from lmtrain.ops.compiled import Like, compiled
from lmtrain.ops.documents import Documents
from lmtrain.ops.dplr import dplr
from lmtrain.ops.op import Cost, check_row, check_shape, check_static, compute_dtype, starts_of
from lmtrain.ops.transitions import Chunks, MatrixOp, decays, in_chunks, scores

CHUNK = 32  # tokens that the compiled kernel takes at once; kChunk in csrc/delta/kernel.h


def recurrence(
    v: Tensor,
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    g: Tensor | None,
    docs: Documents | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The definition, one token after another."""
    values, queries, keys, rates, logs = _widen(v, q, k, beta, g)
    decay = logs.exp()[..., None]
    state = values.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3])
    state = state if initial_state is None else initial_state.to(values.dtype)
    starts = starts_of(v, docs)[:, :, None, None, None]
    outputs = []
    for t in range(v.shape[1]):
        state = torch.where(starts[:, t], state.new_zeros(()), decay[:, t] * state)
        wrong = values[:, t] - torch.einsum("bhkv,bhk->bhv", state, keys[:, t])
        state = state + keys[:, t, :, :, None] * (rates[:, t] * wrong)[:, :, None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, queries[:, t]))
    y = torch.stack(outputs, dim=1) if outputs else values
    return y.to(v.dtype), state


def _widen(v: Tensor, q: Tensor, k: Tensor, beta: Tensor, g: Tensor | None) -> tuple[Tensor, ...]:
    """All in the computing dtype, ``[B, T, Hv, *]``."""
    dtype = compute_dtype(v)
    group = v.shape[2] // k.shape[2]
    queries, keys = (t.to(dtype) for t in (q, k))
    if group > 1:  # a factor of 1 would copy
        queries, keys = (t.repeat_interleave(group, dim=2) for t in (queries, keys))
    logs = torch.zeros_like(beta) if g is None else g
    logs = logs[..., None] if logs.dim() == 3 else logs
    return v.to(dtype), queries, keys, beta.to(dtype)[..., None], logs.to(dtype)


class Delta(MatrixOp):
    """See the module. Inputs ``(v, q, k, beta, g)``, of which g may be None.

    The default chunk is 64, but 16 for a decay per channel, whose torch form holds T * chunk * Hv * K numbers.
    """

    name = "delta"

    def chunks(self, *inputs: Tensor | None, docs: Documents | None, chunk: int | None) -> Chunks:
        v, q, k, beta, g = self._check(inputs, docs)
        chunk = chunk or (64 if g is None or g.dim() == 3 else 16)
        values, queries, keys, rates, logs = (
            in_chunks(t, chunk).transpose(2, 3) for t in _widen(v, q, k, beta, g)
        )  # [B, n, Hv, Q, *]
        sums = decays(logs, in_chunks(starts_of(v, docs), chunk))
        decay = torch.where(sums.seen, sums.between.exp(), logs.new_zeros(()))
        by_key, by_query = scores(decay, keys, keys, queries)
        reach = sums.reach
        # what a token writes is own - back . S, and corrects what earlier ones of its chunk wrote: a unit triangle
        written = rates * torch.cat([values, keys * reach], dim=-1)
        written = torch.linalg.solve_triangular(rates * by_key, written, upper=False, unitriangular=True)
        own, back = written.split((values.shape[-1], keys.shape[-1]), dim=-1)
        leaving = (keys * sums.leave).mT
        eye = torch.eye(keys.shape[-1], dtype=keys.dtype, device=keys.device)
        return Chunks(
            reader=queries * reach - by_query @ back,
            own=by_query @ own,
            gamma=eye * reach[..., -1, :, None] - leaving @ back,
            end=leaving @ own,
        )

    def __call__(
        self,
        *inputs: Tensor | None,
        docs: Documents | None = None,
        initial_state: Tensor | None = None,
        **static: Any,
    ) -> tuple[Tensor, Tensor]:
        v, q, k, beta, g = self._check(inputs, docs)
        backend = library.backend(self.name, v.device.type, v.dtype)
        if backend == "reference":
            return super().__call__(*inputs, docs=docs, initial_state=initial_state, **static)
        check_static(self.name, static, "chunk")
        state = self.check_state(v, k.shape[3], docs, initial_state)
        if backend == "fla":
            return fla.delta(v, q, k, beta, g, docs, state)
        values, queries, keys, rates, logs = _widen(v, q, k, beta, g)
        if g is not None and g.dim() == 4:  # R^T k reads through a decay per channel: diagonal plus low rank
            written, read = rates * keys, logs.exp() * keys
            return dplr(v, queries, logs, written, read, -written, docs=docs, initial_state=initial_state)
        decay, starts = None if g is None else logs.squeeze(-1), None if docs is None else docs.starts()
        y, state, *_ = torch.ops.lmtrain.delta(values, queries, keys, rates.squeeze(-1), decay, starts, state)
        return y.to(v.dtype), state

    def step(self, *inputs: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        """v ``[B, Hv, V]``, q and k ``[B, H, K]``, beta ``[B, Hv]``, g ``[B, Hv]``, ``[B, Hv, K]`` or None."""
        *tokens, g = inputs
        v, q, k, beta = (t[:, None] for t in tokens if t is not None)
        y, state = recurrence(v, q, k, beta, None if g is None else g[:, None], None, state)
        return y[:, 0], state

    def cost(self, *shapes: tuple[int, ...]) -> Cost:
        """Of ``(v, q, k, beta[, g])`` shapes; what is executed is the compiled kernel's."""
        (batch, length, heads, width), keys = shapes[0], shapes[1][-1]
        tokens = batch * length * heads
        model = tokens * keys * width * (6 + (len(shapes) > 4))  # error, write, read, and the decay
        channels = len(shapes) > 4 and len(shapes[4]) == 4
        sizes = 2 * width + 1 + (0 if len(shapes) < 5 else keys if channels else 1)
        moved = 4 * (tokens * sizes + 2 * batch * length * shapes[1][2] * keys)
        if channels:
            return Cost(model, dplr.cost(shapes[0], *[(batch, length, heads, keys)] * 5).executed_flops, moved)
        # states read and stepped; scores, the triangle and its read, each over half of a chunk
        return Cost(model, tokens * (6 * keys * width + 2 * CHUNK * (keys + width)), moved)

    def _check(
        self, inputs: tuple[Tensor | None, ...], docs: Documents | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        if len(inputs) != 5 or any(t is None for t in inputs[:4]):
            raise ValueError("delta: inputs: expected (v, q, k, beta, g), of which g may be None")
        (v, q, k, beta), g = (t for t in inputs[:4] if t is not None), inputs[4]
        check_shape("delta", "v", v, (None, None, None, None))
        batch, length, heads, _ = v.shape
        check_shape("delta", "q", q, (batch, length, None, None))
        check_shape("delta", "k", k, tuple(q.shape))
        check_shape("delta", "beta", beta, (batch, length, heads))
        if q.shape[2] == 0 or heads % q.shape[2]:
            raise ValueError(f"delta: q: expected key heads that divide the {heads} value heads, got {q.shape[2]}")
        if g is not None:
            check_shape("delta", "g", g, (batch, length, heads) + ((q.shape[3],) if g.dim() == 4 else ()))
        check_row("delta", "v", v, docs, q=q, k=k, beta=beta, g=g)
        return v, q, k, beta, g


delta = Delta()


def _outputs(v: Tensor, q: Tensor, *_: Tensor | None) -> tuple[Like, ...]:
    (batch, length, heads, width), keys = v.shape, q.shape[3]
    return v, (v, (batch, heads, keys, width)), v, (v, (batch, heads, length // CHUNK + 1, keys, width))


def _gradients(v: Tensor, q: Tensor, k: Tensor, beta: Tensor, decay: Tensor | None, *_: Any) -> tuple[Like | None, ...]:
    return v, q, k, beta, (v, (0,)) if decay is None else decay, None, _outputs(v, q)[1]


def _saved(inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return *inputs, *outputs[2:]


library.register(
    Delta.name,
    compiled(Delta.name, _outputs, _gradients, saved=_saved),
    fla.UP_TO_256,
    library.Backend("reference"),
)
