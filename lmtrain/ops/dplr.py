"""Diagonal plus low rank: the generalised delta rule of RWKV-7 (arXiv 2503.14456).

    S_t = Diag(exp(w_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T          y_t = S_t^T r_t

v ``[B, T, H, V]``, r, w, k, a, b ``[B, T, H, K]``, w <= 0 the log decay, state ``[B, H, K, V]``; a reads the state
before its decay. A document's first token sees S_{t-1} = 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmtrain.ops import library
from lmtrain.ops.adapters import fla
from lmtrain.ops.compiled import Like, compiled
from lmtrain.ops.documents import Documents
from lmtrain.ops.op import Cost, check_row, check_shape, check_static, compute_dtype, starts_of
from lmtrain.ops.transitions import Chunks, MatrixOp, decays, in_chunks, previous, scores

NAMES = ("v", "r", "w", "k", "a", "b")
PIECE = 32  # tokens between the states that the compiled forward keeps; kPiece in csrc/dplr/kernel.h


def recurrence(
    v: Tensor,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    a: Tensor,
    b: Tensor,
    docs: Documents | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The definition, one token after another."""
    values, queries, logs, keys, a, b = (t.to(compute_dtype(v)) for t in (v, r, w, k, a, b))
    decay = logs.exp()
    state = values.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3])
    state = state if initial_state is None else initial_state.to(values.dtype)
    starts = starts_of(v, docs)[:, :, None, None, None]
    outputs = []
    for t in range(v.shape[1]):
        read = torch.einsum("bhkv,bhk->bhv", state, a[:, t])
        kept = decay[:, t, :, :, None] * state + b[:, t, :, :, None] * read[:, :, None, :]
        written = keys[:, t, :, :, None] * values[:, t, :, None, :]
        state = torch.where(starts[:, t], written, kept + written)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, queries[:, t]))
    y = torch.stack(outputs, dim=1) if outputs else values
    return y.to(v.dtype), state


class DPLR(MatrixOp):
    """See the module. Inputs ``(v, r, w, k, a, b)``. The torch form holds T * chunk * H * K numbers a few times."""

    name = "dplr"

    def chunks(self, *inputs: Tensor | None, docs: Documents | None, chunk: int | None) -> Chunks:
        tensors = self._check(inputs, docs)
        v, chunk = tensors[0], chunk or 16
        values, queries, logs, keys, a, b = (
            in_chunks(t.to(compute_dtype(v)), chunk).transpose(2, 3) for t in tensors
        )  # [B, n, H, Q, *]
        sums = decays(logs, in_chunks(starts_of(v, docs), chunk))
        zero = logs.new_zeros(())
        diagonal = torch.eye(chunk, dtype=torch.bool, device=v.device)[:, :, None]
        upto = torch.where(sums.seen, sums.between.exp(), zero)  # to token i
        before = torch.where(sums.seen & ~diagonal, previous(sums.between, 3).exp(), zero)  # to token i - 1, for a
        (by_query_b,) = scores(upto, b, queries)
        (by_query_k,) = scores(upto, keys, queries)
        (by_a_b,) = scores(before, b, a)
        (by_a_k,) = scores(before, keys, a)
        entering = torch.where(sums.carried, previous(sums.entered, 3).exp(), zero)
        # what a reads is own + back . S, of which earlier tokens of its chunk wrote a part: a unit triangle
        read = torch.cat([by_a_k @ values, a * entering], dim=-1)
        read = torch.linalg.solve_triangular(-by_a_b, read, upper=False, unitriangular=True)
        own, back = read.split((values.shape[-1], keys.shape[-1]), dim=-1)
        reach, leave = sums.reach, sums.leave
        leaving = (b * leave).mT
        return Chunks(
            reader=queries * reach + by_query_b @ back,
            own=by_query_k @ values + by_query_b @ own,
            gamma=torch.diag_embed(reach[..., -1, :]) + leaving @ back,
            end=(keys * leave).mT @ values + leaving @ own,
        )

    def __call__(
        self,
        *inputs: Tensor | None,
        docs: Documents | None = None,
        initial_state: Tensor | None = None,
        **static: Any,
    ) -> tuple[Tensor, Tensor]:
        v, r, w, k, a, b = self._check(inputs, docs)
        backend = library.backend(self.name, v.device.type, v.dtype)
        if backend == "reference":
            return super().__call__(*inputs, docs=docs, initial_state=initial_state, **static)
        check_static(self.name, static, "chunk")
        state = self.check_state(v, k.shape[3], docs, initial_state)
        if backend == "fla":
            return fla.dplr(v, r, w, k, a, b, docs, state)
        values, r, w, k, a, b = (t.to(compute_dtype(v)) for t in (v, r, w, k, a, b))
        starts = None if docs is None else docs.starts()
        y, state, _ = torch.ops.lmtrain.dplr(values, r, w.exp(), k, a, b, starts, state)
        return y.to(v.dtype), state

    def step(self, *inputs: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        """v ``[B, H, V]``, the others ``[B, H, K]``."""
        v, r, w, k, a, b = (t[:, None] for t in inputs if t is not None)
        y, state = recurrence(v, r, w, k, a, b, None, state)
        return y[:, 0], state

    def cost(self, *shapes: tuple[int, ...]) -> Cost:
        """Of ``(v, r, w, k, a, b)`` shapes; the compiled kernel executes the definition."""
        (batch, length, heads, width), keys = shapes[0], shapes[1][-1]
        tokens = batch * length * heads
        flops = tokens * 9 * keys * width  # read, write, decay and the low rank
        return Cost(flops, flops, 4 * tokens * (2 * width + 5 * keys))

    def _check(self, inputs: tuple[Tensor | None, ...], docs: Documents | None) -> tuple[Tensor, ...]:
        tensors = tuple(t for t in inputs if t is not None)
        if len(inputs) != 6 or len(tensors) != 6:
            raise ValueError("dplr: inputs: expected (v, r, w, k, a, b)")
        check_shape("dplr", "v", tensors[0], (None, None, None, None))
        check_shape("dplr", "r", tensors[1], (*tensors[0].shape[:3], None))
        for name, tensor in zip(NAMES[2:], tensors[2:], strict=True):
            check_shape("dplr", name, tensor, tuple(tensors[1].shape))
        check_row("dplr", "v", tensors[0], docs, **dict(zip(NAMES[1:], tensors[1:], strict=True)))
        return tensors


dplr = DPLR()


def _outputs(v: Tensor, r: Tensor, *_: Tensor | None) -> tuple[Like, ...]:
    batch, length, heads, width = v.shape
    pieces = -(-length // PIECE)
    return v, (v, (batch, heads, r.shape[3], width)), (v, (batch, heads, pieces, r.shape[3], width))


def _gradients(v: Tensor, r: Tensor, *_: Tensor | None) -> tuple[Like | None, ...]:
    return v, r, r, r, r, r, None, _outputs(v, r)[1]


def _saved(inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return *inputs, outputs[2]


library.register(
    DPLR.name,
    compiled(DPLR.name, _outputs, _gradients, saved=_saved),
    fla.UP_TO_256,
    library.Backend("reference"),
)
