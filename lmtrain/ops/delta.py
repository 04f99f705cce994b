"""The gated delta rule of DeltaNet, Gated DeltaNet and KDA (arXiv 2406.06484, 2412.06464, 2510.26692).

    S_t = R_t + beta_t k_t (v_t - R_t^T k_t)^T      R_t = Diag(exp(g_t)) S_{t-1}      y_t = S_t^T q_t

v ``[B, T, Hv, V]``, q and k ``[B, T, H, K]`` with value head h reading key head ``h // (Hv / H)``, beta ``[B, T, Hv]``,
the log decay g <= 0 ``[B, T, Hv]`` (Gated DeltaNet), ``[B, T, Hv, K]`` (KDA) or None (DeltaNet), state
``[B, Hv, K, V]``. Stable if ``|k| = 1`` and ``0 <= beta <= 2``: the mixer normalises k. A document's first token sees
S_{t-1} = 0.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from lmtrain.ops import library
from lmtrain.ops.documents import Documents
from lmtrain.ops.op import Cost, check_shape, compute_dtype
from lmtrain.ops.transitions import Chunks, MatrixOp, check_device, decays, in_chunks, scores, starts_of


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
    queries, keys = (t.to(dtype).repeat_interleave(group, dim=2) for t in (q, k))
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
        if library.backend(self.name, v.device.type, v.dtype) == "reference":
            return super().__call__(*inputs, docs=docs, initial_state=initial_state, **static)
        self.check_chunk(static)
        state = self.check_state(v, k.shape[3], docs, initial_state)
        values, queries, keys, rates, logs = _widen(v, q, k, beta, g)
        decay, starts = None if g is None else logs.exp(), None if docs is None else docs.starts()
        y, state = torch.ops.lmtrain.delta(values, queries, keys, rates.squeeze(-1), decay, starts, state)
        return y.to(v.dtype), state

    def step(self, *inputs: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        """v ``[B, Hv, V]``, q and k ``[B, H, K]``, beta ``[B, Hv]``, g ``[B, Hv]``, ``[B, Hv, K]`` or None."""
        *tokens, g = inputs
        v, q, k, beta = (t[:, None] for t in tokens if t is not None)
        y, state = recurrence(v, q, k, beta, None if g is None else g[:, None], None, state)
        return y[:, 0], state

    def cost(self, *shapes: tuple[int, ...], chunk: int = 64) -> Cost:
        """Of ``(v, q, k, beta[, g])`` shapes; what is executed is the torch form's."""
        (batch, length, heads, width), keys = shapes[0], shapes[1][-1]
        tokens = batch * length * heads
        model = tokens * keys * width * (6 + (len(shapes) > 4))  # error, write, read, and the decay
        within = tokens * chunk * (7 * keys + 3 * width)  # scores, triangle, reader and own
        between = tokens * 2 * keys * (keys + 2 * width + keys * width // chunk)
        sizes = 2 * width + 1 + (0 if len(shapes) < 5 else keys if len(shapes[4]) == 4 else 1)
        moved = tokens * sizes + 2 * batch * length * shapes[1][2] * keys
        return Cost(model, within + between, 4 * moved)

    def _check(
        self, inputs: tuple[Tensor | None, ...], docs: Documents | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        if len(inputs) != 5 or any(t is None for t in inputs[:4]):
            raise ValueError("delta: inputs: expected (v, q, k, beta, g), of which g may be None")
        (v, q, k, beta), g = (t for t in inputs[:4] if t is not None), inputs[4]
        if not v.is_floating_point():
            raise ValueError(f"delta: v: expected a floating dtype, got {v.dtype}")
        check_shape("delta", "v", v, (None, None, None, None))
        batch, length, heads, _ = v.shape
        check_shape("delta", "q", q, (batch, length, None, None))
        check_shape("delta", "k", k, tuple(q.shape))
        check_shape("delta", "beta", beta, (batch, length, heads))
        if q.shape[2] == 0 or heads % q.shape[2]:
            raise ValueError(f"delta: q: expected key heads that divide the {heads} value heads, got {q.shape[2]}")
        if g is not None:
            check_shape("delta", "g", g, (batch, length, heads) + ((q.shape[3],) if g.dim() == 4 else ()))
        if docs is not None:
            check_shape("delta", "docs.ids", docs.ids, (batch, length))
        check_device("delta", v, q=q, k=k, beta=beta, g=g, docs=None if docs is None else docs.ids)
        return v, q, k, beta, g


delta = Delta()


# --- the compiled backend: shapes for tracing and the backward, registered when the library first loads ---


def _native_missing() -> str | None:
    reason = library.load()
    if reason is None and not hasattr(torch.ops.lmtrain, Delta.name):
        reason = f"the compiled library is older than it; rebuild it with `{library.BUILD_COMMAND}`"
    if reason is None:
        _register_native()
    return reason


@cache
def _register_native() -> None:
    torch.library.register_fake("lmtrain::delta", _fake_forward)
    torch.library.register_fake("lmtrain::delta_backward", _fake_backward)
    torch.library.register_autograd("lmtrain::delta", _backward, setup_context=_save)


def _fake_forward(v: Tensor, q: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), v.new_empty(v.shape[0], v.shape[2], q.shape[3], v.shape[3])


def _fake_backward(
    grad_y: Tensor, grad_state: Tensor, v: Tensor, q: Tensor, k: Tensor, beta: Tensor, *rest: Tensor | None
) -> tuple[Tensor, ...]:
    decay = (*beta.shape, 0) if rest[0] is None else rest[0].shape
    shapes = (v.shape, q.shape, k.shape, beta.shape, decay, grad_state.shape)
    return tuple(v.new_empty(shape) for shape in shapes)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: activation checkpointing recomputes them, and refuses a second time
    *grads, grad_decay, grad_initial = torch.ops.lmtrain.delta_backward(grad_y, grad_state, *saved)
    grad_decay = None if saved[4] is None else grad_decay
    return *grads, grad_decay, None, None if saved[6] is None else grad_initial


library.register(
    Delta.name,
    library.Backend("cpu", "cpu", frozenset({torch.float32, torch.float64, torch.bfloat16}), _native_missing),
    library.Backend("reference"),
)
