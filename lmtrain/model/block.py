"""What stands around a branch: norm, multipliers, the residual sum, recomputation; and branches side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lmtrain.errors import UsageError
from lmtrain.model.branch import Branch, ParamInfo, State, Streams, named
from lmtrain.model.context import Context
from lmtrain.model.norm import Norm

NormPlace = Literal["pre", "post", "sandwich", "through"]


@dataclass(frozen=True)
class Multipliers:
    """Constant factors around a branch (Granite, MiniMax, Falcon-H1)."""

    input: float = 1.0
    """Of what the branch reads."""
    output: float = 1.0
    """Of what it adds."""
    skip: float = 1.0
    """Of the residual it is added to."""


class Block(nn.Module):
    """A branch in the residual stream, recomputed in the backward pass if ``recompute``; f the branch, N a norm.

    pre ``x + f(N(x))``; post ``x + N(f(x))`` (OLMo-2); sandwich ``x + N'(f(N(x)))`` (Gemma); through ``N(x) + f(N(x))``
    (MiniMax).
    """

    def __init__(self, branch: Branch, norms: Sequence[Norm], place: NormPlace, scale: Multipliers) -> None:
        super().__init__()
        if place == "post":
            (self.out_norm,) = norms
        else:
            self.norm = norms[0]
        if place == "sandwich":
            self.out_norm = norms[1]
        self.branch, self.norm_place, self.scale = branch, place, scale
        self.recompute = False

    def forward(self, x: Tensor, ctx: Context, state: State, streams: Streams) -> tuple[Tensor, State, Streams]:
        if self.recompute and torch.is_grad_enabled():
            run: Any = checkpoint(self._run, x, ctx, state, streams, use_reentrant=False, preserve_rng_state=False)
            return cast("tuple[Tensor, State, Streams]", run)
        return self._run(x, ctx, state, streams)

    def _run(self, x: Tensor, ctx: Context, state: State, streams: Streams) -> tuple[Tensor, State, Streams]:
        given = x if self.norm_place == "post" else self.norm(x)
        y, state, streams = self.branch(_times(given, self.scale.input), ctx, state, streams)
        if self.norm_place in ("post", "sandwich"):
            y = self.out_norm(y)
        kept = given if self.norm_place == "through" else x
        return _times(kept, self.scale.skip) + _times(y, self.scale.output), state, streams

    def param_info(self) -> dict[str, ParamInfo]:
        info = named("branch", self.branch.param_info())
        for name in ("norm", "out_norm"):
            norm = getattr(self, name, None)
            info |= {} if norm is None else named(name, norm.param_info())
        return info


class SideBySide(Branch):
    """Branches that read the same normalised x, and whose outputs are summed (Falcon-H1); states by position."""

    def __init__(self, branches: Sequence[Branch], scales: Sequence[Multipliers]) -> None:
        super().__init__()
        for stream, count in Counter(name for branch in branches for name in branch.reads | branch.writes).items():
            if count > 1:
                raise UsageError(f"model.pattern: branches side by side cannot hand each other the stream {stream}")
        self.branches = nn.ModuleList(branches)
        self.scales = scales
        self.reads = frozenset[str]().union(*(branch.reads for branch in branches))  # type: ignore[misc]
        self.place = branches[0].place

    def forward(self, x: Tensor, ctx: Context, state: State, streams: Streams) -> tuple[Tensor, State, Streams]:
        total, after, written = torch.zeros_like(x), State(), Streams()
        for index, (branch, scale) in enumerate(zip(self.members, self.scales, strict=True)):
            seen = {name: stream for name, stream in streams.items() if name in branch.reads}
            y, new, told = branch(_times(x, scale.input), ctx, state.get(str(index), {}), seen)
            total = total + _times(y, scale.output)
            written |= told
            if new:
                after[str(index)] = new
        return total, after, written

    @property
    def members(self) -> list[Branch]:
        return cast("list[Branch]", list(self.branches))

    def param_info(self) -> dict[str, ParamInfo]:
        return {
            key: one
            for index, branch in enumerate(self.members)
            for key, one in named(f"branches.{index}", branch.param_info()).items()
        }


def _times(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1.0 else x * factor
