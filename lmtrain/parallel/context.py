"""The Context of a row that is cut over ranks: what LocalContext does, by exchanges."""

from __future__ import annotations

from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map

from lmtrain.errors import UsageError
from lmtrain.model.context import Cache, Context, LocalContext, Phase, Restore, join, keep
from lmtrain.ops.attention import attention
from lmtrain.ops.documents import Documents
from lmtrain.ops.op import AffineOp
from lmtrain.parallel.exchange import GatherSequence, Halo, PrefixState, from_heads, to_heads
from lmtrain.parallel.expert import dispatch
from lmtrain.parallel.mesh import Mesh


class ExpertContext(LocalContext):
    """Whole rows, experts spread over ``experts`` (None: all of them here)."""

    def __init__(
        self, docs: Documents, experts: dist.ProcessGroup | None, phase: Phase = "train", carries: bool = False
    ) -> None:
        super().__init__(docs, phase, carries)
        self.experts = experts

    def dispatch(self, x: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Restore]:
        if self.experts is None:
            return super().dispatch(x, experts, num_experts)
        return dispatch(x, experts, num_experts, self.experts)


class SequenceContext(ExpertContext):
    """One rank's contiguous shard of every row (``docs.cut``); see ``lmtrain.model.context.Context``.

    method: how softmax attention crosses shards: ``heads`` (where ``sp`` divides the key heads and nothing is carried),
    ``gather``, or ``auto``: heads where it can.
    """

    def __init__(
        self,
        docs: Documents,
        group: dist.ProcessGroup,
        method: str,
        phase: Phase = "train",
        carries: bool = False,
        experts: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(docs, experts, phase, carries)
        assert docs.whole is not None, "a shard's documents come from Documents.cut"
        self.row_positions = docs.whole.positions()
        self.group = group
        self.method = method

    def scan(
        self, op: AffineOp, *inputs: Tensor | None, initial_state: Tensor | None, **static: Any
    ) -> tuple[Tensor, Tensor]:
        gamma, state, y = None, None, None
        if op.needs_state:
            span = op.span(*inputs, docs=self.docs)
            gamma, state = span.gamma, span.state
        else:
            y, state = op(*inputs, docs=self.docs, initial_state=None, **static)
            gamma = op.gamma(*inputs, docs=self.docs)
        incoming, final = PrefixState.apply(op, self.group, gamma, state, initial_state)
        if y is None:
            y, _ = op(*inputs, docs=self.docs, initial_state=incoming, **static)
        else:
            y = op.correct(y, *inputs, docs=self.docs, incoming=incoming)
        return y, final

    def halo(self, x: Tensor, width: int, tail: Tensor | None) -> tuple[Tensor, Tensor]:
        if x.shape[1] < width:
            raise UsageError(
                f"sp: a shard of {x.shape[1]} columns is shorter than the {width} a convolution looks back"
            )
        return Halo.apply(x, width, tail, self.group)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float, cache: Cache | None, **options: Any
    ) -> tuple[Tensor, Cache | None]:
        carried = self.carries or bool(cache)
        divides = k.shape[2] % self.group.size() == 0
        heads = self.method == "heads" or (self.method == "auto" and divides and not carried)
        if heads and (carried or not divides):
            why = "state is carried" if carried else f"{k.shape[2]} key heads do not divide by sp {self.group.size()}"
            raise UsageError(f"sp_attention=heads: {why}; use sp_attention=gather or auto")
        if heads:
            q, k, v = to_heads([q, k, v], self.group)
            causal = self.docs.whole is not None and self.docs.whole.single
            o = attention.output(
                q,
                k,
                v,
                positions=self.row_positions,
                window=window,
                scale=scale,
                causal=causal,
                docs=self.docs.whole,
                **self._of_my_heads(options),
            )
            return from_heads(o, self.group), None
        k, v = GatherSequence.apply(k, self.group), GatherSequence.apply(v, self.group)
        held = 0
        if cache:
            held = cache["k"].shape[1]
            k, v = join(cache, k, v)
        offset = held + self.group.rank() * q.shape[1]
        o = attention.output(q, k, v, positions=self.positions, window=window, scale=scale, offset=offset, **options)
        return o, keep(k, v, window) if self.carries else None

    def _of_my_heads(self, options: dict[str, Any]) -> dict[str, Any]:
        """What is per head, cut as ``to_heads`` cuts; a gradient is then whole in the sum over the ranks."""
        size, rank = self.group.size(), self.group.rank()
        return tree_map(lambda t: t.chunk(size)[rank] if isinstance(t, Tensor) else t, options)

    def all_sum(self, counts: Tensor, over: Literal["row"]) -> Tensor:
        total = counts.clone()
        dist.all_reduce(total, group=self.group)
        return total


def make_context(
    docs: Documents,
    mesh: Mesh,
    method: str,
    phase: Phase = "train",
    carries: bool = False,
) -> Context:
    """The context of a batch on ``mesh``: of whole rows, or of this rank's shard of them."""
    experts = mesh.experts if mesh.cfg.ep > 1 else None
    if docs.whole is None:
        return ExpertContext(docs, experts, phase, carries)
    return SequenceContext(docs, mesh.sequence, method, phase, carries, experts)
