"""The implicit attention of a trained model: which earlier tokens a mixer's op reads, and how much.

An op that is linear in its values is a matrix: fed the identity as values it returns that matrix (design, section 2).
So the softmax weights and the scan of a state-space mixer come from the very ops that the model runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmtrain.model.context import Cache, LocalContext
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.mixers.mamba2 import Mamba2
from lmtrain.ops.attention import attention
from lmtrain.ops.documents import Documents
from lmtrain.ops.op import AffineOp, compute_dtype

LINEAR_IN_VALUES = ("scalar", "vector", "matrix")
"""Kinds of ops whose first input is values ``[B, T, H, V]`` of any width, in which y is linear."""


@dataclass
class BranchMap:
    """What one branch computed for one row: ``outputs[h] = matrix[h] @ values[h]``.

    place: index of the branch. op: name of the op. matrix ``[H, T, T]``, query by key. values and outputs
    ``[H, T, V]`` as the op saw and gave them. step_sizes: Mamba-2's dt ``[H, T]``, which its values hold already.
    """

    place: int
    op: str
    matrix: Tensor
    values: Tensor
    outputs: Tensor
    step_sizes: Tensor | None = None

    @property
    def weights(self) -> Tensor:
        """``[H, T, T]``: what token t takes of token s's own values, with Mamba-2 ``C_t (prod a) B_s dt_s``."""
        return self.matrix if self.step_sizes is None else self.matrix * self.step_sizes[:, None, :]

    @property
    def shares(self) -> Tensor:
        """``[H, T, T]``, rows sum to 1: the share of the absolute weight. Softmax weights are that already."""
        size = self.weights.abs()
        return size / size.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)


class RecordingContext(LocalContext):
    """A LocalContext for one row that also feeds every op the identity, and keeps what came out by branch."""

    def __init__(self, docs: Documents) -> None:
        super().__init__(docs)
        self.place = -1
        self.maps: dict[int, BranchMap] = {}

    def scan(
        self, op: AffineOp, *inputs: Tensor | None, initial_state: Tensor | None, **static: Any
    ) -> tuple[Tensor, Tensor]:
        y, state = super().scan(op, *inputs, initial_state=initial_state, **static)
        values, *rest = inputs
        assert values is not None, "the values come first"
        if op.kind in LINEAR_IN_VALUES and values.dim() == 4:
            matrix, _ = op(_identity(values, values.shape[2]), *rest, docs=self.docs, initial_state=None, **static)
            self._keep(op.name, matrix, values, y)
        return y, state

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float, cache: Cache | None, **options: Any
    ) -> tuple[Tensor, Cache | None]:
        o, new = super().attention(q, k, v, window=window, scale=scale, cache=cache, **options)
        if options.get("extra_kv") is not None:  # its columns are no tokens: the picture leaves them out
            more_k, more_v = options["extra_kv"]
            options["extra_kv"] = more_k, more_v.new_zeros(*more_v.shape[:2], v.shape[1])
        eye = _identity(v, v.shape[2])
        matrix, _ = attention(q, k, eye, positions=self.positions, window=window, scale=scale, **options)
        self._keep("attention", matrix, v.repeat_interleave(q.shape[2] // v.shape[2], dim=2), o)
        return o, new

    def _keep(self, op: str, matrix: Tensor, values: Tensor, outputs: Tensor) -> None:
        by_head = (tensor[0].transpose(0, 1).to(compute_dtype(tensor)) for tensor in (matrix, values, outputs))
        self.maps[self.place] = BranchMap(self.place, op, *by_head)


def _identity(values: Tensor, heads: int) -> Tensor:
    """``[1, T, heads, T]``: column s of the values is 1 at token s and 0 elsewhere."""
    length = values.shape[1]
    eye = torch.eye(length, dtype=compute_dtype(values), device=values.device)
    return eye[None, :, None, :].expand(1, length, heads, length).contiguous()


@torch.inference_mode()
def branch_maps(model: LanguageModel, tokens: Tensor, ids: Tensor) -> dict[int, BranchMap]:
    """The map of every branch that has one, by place, for one row: tokens and document ids int ``[T]``."""
    ctx = RecordingContext(Documents.from_ids(ids[None]))
    hooks = []
    for index, branch in enumerate(model.branches):

        def enter(*_: Any, index: int = index) -> None:
            ctx.place = index

        hooks.append(branch.register_forward_pre_hook(enter))
    steps: dict[int, Tensor] = {}
    for index, branch in enumerate(model.branches):
        if isinstance(branch, Mamba2):

            def decay(_: Any, __: Any, made: tuple[Tensor, Tensor], index: int = index) -> None:
                steps[index] = made[0][0].transpose(0, 1)

            hooks.append(branch.decay.register_forward_hook(decay))
    try:
        model(tokens[None], ctx, {})
    finally:
        for hook in hooks:
            hook.remove()
    for index, dt in steps.items():
        ctx.maps[index].step_sizes = dt
    return ctx.maps


def chosen(maps: dict[int, BranchMap]) -> list[BranchMap]:
    """One branch of each op, the middle one of its kind, in order of place."""
    by_op: dict[str, list[int]] = {}
    for place, found in sorted(maps.items()):
        by_op.setdefault(found.op, []).append(place)
    return [maps[place] for place in sorted(places[len(places) // 2] for places in by_op.values())]
