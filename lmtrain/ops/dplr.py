"""Diagonal plus low rank: the generalised delta rule of RWKV-7 (arXiv 2503.14456).

    S_t = Diag(exp(w_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T          y_t = S_t^T r_t

v ``[B, T, H, V]``, r, w, k, a, b ``[B, T, H, K]``, w <= 0 the log decay, state ``[B, H, K, V]``; a reads the state
before its decay. A document's first token sees S_{t-1} = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmtrain.ops import library
from lmtrain.ops.documents import Documents
from lmtrain.ops.op import Cost, check_shape, compute_dtype
from lmtrain.ops.transitions import Chunks, MatrixOp, check_device, decays, in_chunks, previous, scores, starts_of

NAMES = ("v", "r", "w", "k", "a", "b")


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

    def step(self, *inputs: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        """v ``[B, H, V]``, the others ``[B, H, K]``."""
        v, r, w, k, a, b = (t[:, None] for t in inputs if t is not None)
        y, state = recurrence(v, r, w, k, a, b, None, state)
        return y[:, 0], state

    def cost(self, *shapes: tuple[int, ...], chunk: int = 16) -> Cost:
        """Of ``(v, r, w, k, a, b)`` shapes; what is executed is the torch form's."""
        (batch, length, heads, width), keys = shapes[0], shapes[1][-1]
        tokens = batch * length * heads
        within = tokens * chunk * (15 * keys + 7 * width)  # scores, triangle, reader and own
        between = tokens * 2 * keys * (keys + 3 * width + keys * width // chunk)
        return Cost(tokens * 9 * keys * width, within + between, 4 * tokens * (2 * width + 5 * keys))

    def _check(self, inputs: tuple[Tensor | None, ...], docs: Documents | None) -> tuple[Tensor, ...]:
        tensors = tuple(t for t in inputs if t is not None)
        if len(inputs) != 6 or len(tensors) != 6:
            raise ValueError("dplr: inputs: expected (v, r, w, k, a, b)")
        v = tensors[0]
        if not v.is_floating_point():
            raise ValueError(f"dplr: v: expected a floating dtype, got {v.dtype}")
        check_shape("dplr", "v", v, (None, None, None, None))
        check_shape("dplr", "r", tensors[1], (*v.shape[:3], None))
        for name, tensor in zip(NAMES[2:], tensors[2:], strict=True):
            check_shape("dplr", name, tensor, tuple(tensors[1].shape))
        if docs is not None:
            check_shape("dplr", "docs.ids", docs.ids, tuple(v.shape[:2]))
        others = dict(zip(NAMES, tensors, strict=True))
        check_device("dplr", v, **others, docs=None if docs is None else docs.ids)
        return tensors


dplr = DPLR()
library.register(DPLR.name, library.Backend("reference"))
