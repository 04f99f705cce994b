"""What there is to know of a branch kind: asked of its settings, or seen in a forward pass.

No branch declares its op. It runs over a few tokens in a context that writes down what it is asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmtrain.model.branch import Branch, Place, branch_class
from lmtrain.model.context import Cache, LocalContext
from lmtrain.ops.attention import attention
from lmtrain.ops.documents import Documents
from lmtrain.ops.op import AffineOp

D_MODEL, SEQ_LEN = 2048, 4096
"""What sizes and costs are told for."""
SIZES: dict[str, dict[str, int]] = {
    "attention": {"num_heads": 16},
    "mla": {"num_heads": 16},
    "mlp": {"d_ff": 8192},
    "moe": {"num_experts": 64, "top_k": 8, "d_expert": 1024},
    "rwkv_channel": {"d_ff": 8192},
}
"""Settings that have no default."""
WATCHED_WIDTH, WATCHED_TOKENS = 256, 4  # which ops a branch calls depends on neither


@dataclass(frozen=True)
class Row:
    """One kind, with its default settings and ``settings`` beside them, at ``D_MODEL`` and ``SEQ_LEN``.

    group: mixers, ffn, ...: the folder it lies in. about: its first sentence. ops: through which it looks back in time.
    sp: as ``Branch.sp``. num_params: those a token uses. state_bytes: of one sequence, fp32. flops_per_token: forward.
    """

    kind: str
    group: str
    about: str
    settings: dict[str, int]
    ops: list[str]
    sp: str
    num_params: int
    state_bytes: int
    flops_per_token: int


class Watcher(LocalContext):
    """Writes down which ops a branch reaches through its context."""

    def __init__(self, docs: Documents) -> None:
        super().__init__(docs)
        self.ops: dict[str, None] = {}

    def scan(
        self, op: AffineOp, *inputs: Tensor | None, initial_state: Tensor | None, **static: Any
    ) -> tuple[Tensor, Tensor]:
        self.ops[op.name] = None
        return super().scan(op, *inputs, initial_state=initial_state, **static)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float, cache: Cache | None, **options: Any
    ) -> tuple[Tensor, Cache | None]:
        self.ops[attention.name] = None
        return super().attention(q, k, v, window=window, scale=scale, cache=cache, **options)


def rows(kinds: Iterable[str]) -> list[Row]:
    """A row per kind, mixers first."""
    found = [_row(kind, branch_class(kind)) for kind in sorted(kinds)]
    return sorted(found, key=lambda row: row.group, reverse=True)


def _row(kind: str, branch: type[Branch]) -> Row:
    chosen = SIZES.get(kind, {})
    settings = branch.Config(**chosen)
    return Row(
        kind=kind,
        group=branch.__module__.split(".")[-2],
        about=first_sentence(branch),
        settings=chosen,
        ops=ops_of(branch, settings),
        sp=branch.sp,
        num_params=settings.num_params(D_MODEL, active=True),
        state_bytes=settings.state_bytes(D_MODEL, 1, SEQ_LEN),
        flops_per_token=settings.flops_per_token(D_MODEL, SEQ_LEN),
    )


def first_sentence(branch: type[Branch]) -> str:
    """The first paragraph of the file that defines a branch."""
    paragraph = (sys.modules[branch.__module__].__doc__ or "").strip().partition("\n\n")[0]
    return " ".join(paragraph.split())


@torch.no_grad()
def ops_of(branch: type[Branch], settings: Any) -> list[str]:
    """Names of the ops that a branch with these settings reaches through its context, in order."""
    built = branch(settings, WATCHED_WIDTH, Place(0, 1))
    for parameter in built.parameters():
        parameter.zero_()
    context = Watcher(Documents.from_ids(torch.zeros(1, WATCHED_TOKENS, dtype=torch.int32)))
    built(torch.zeros(1, WATCHED_TOKENS, WATCHED_WIDTH), context, {}, {})
    return list(context.ops)
