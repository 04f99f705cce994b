"""The contract of a residual branch, what it must say about its parameters, and the registry of kinds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

from torch import Generator, Tensor, nn
from torch import device as Device

from lmtrain.errors import UsageError, nearest
from lmtrain.model.context import Context

State = dict[str, Any]
"""Carried in time: a pytree of batch-first contiguous tensors (dicts may nest); ``{}`` if there is none."""
Streams = dict[str, Tensor]
"""Carried in depth: ``[B, T, ...]`` tensors by name."""
Init = Callable[[tuple[int, ...], Generator], Tensor]
"""Draws a full fp32 parameter of this shape from a host generator."""


@dataclass(frozen=True)
class ParamInfo:
    """All that optimizers, sharding, scaling rules and export need to know about one parameter.

    role: matrix, embedding, head, norm, bias, conv, decay or scalar. decay: weight decay applies. fp32: stays fp32 in
    mixed precision. fan_in, fan_out: for width-scaled learning rates. tp_dim, tp_units: the dim that tensor parallelism
    would cut and the indivisible units (heads) along it. expert_dim: the dim that enumerates experts. drawn_as: the
    parameter of the same branch whose initial value it shares.
    """

    role: Literal["matrix", "embedding", "head", "norm", "bias", "conv", "decay", "scalar"]
    init: Init
    decay: bool = False
    fp32: bool = False
    fan_in: int | None = None
    fan_out: int | None = None
    lr_scale: float = 1.0
    tp_dim: int | None = None
    tp_units: int | None = None
    expert_dim: int | None = None
    drawn_as: str | None = None


def matrix(init: Init, fan_in: int, fan_out: int, *, rows: int | None = None, columns: int | None = None) -> ParamInfo:
    """Of a projection's weight ``[fan_out, fan_in]``; rows or columns: the units (heads) along the dim to cut."""
    tp_dim = 0 if rows is not None else 1 if columns is not None else None
    units = rows if rows is not None else columns
    return ParamInfo("matrix", init, True, fan_in=fan_in, fan_out=fan_out, tp_dim=tp_dim, tp_units=units)


def named(prefix: str, info: dict[str, ParamInfo]) -> dict[str, ParamInfo]:
    """What a sub-module says of its parameters, under the names they have in the branch."""
    return {
        f"{prefix}.{name}": replace(one, drawn_as=f"{prefix}.{one.drawn_as}") if one.drawn_as else one
        for name, one in info.items()
    }


@dataclass(frozen=True)
class Place:
    """Where a branch stands: ``index`` of ``count``, and the ``of_kind``-th (from 0) of ``kind_count`` of its kind."""

    index: int
    count: int
    of_kind: int = 0
    kind_count: int = 1

    @property
    def depth(self) -> float:
        """0 for the first of its kind, 1 for the last: what RWKV's initial values depend on."""
        return self.of_kind / max(self.kind_count - 1, 1)

    @property
    def left(self) -> float:
        """1 for the first of its kind, nearly 0 for the last."""
        return 1 - self.of_kind / self.kind_count


class BranchConfig(Protocol):
    """What every branch's settings answer for themselves; the tests hold the answers to the built module."""

    kind: str

    def num_params(self, d_model: int, active: bool = False, of_kind: int = 1) -> int:
        """Parameters of one branch; ``active``: those a token uses; ``of_kind``: 0 for the first of its kind."""

    def flops_per_token(self, d_model: int, seq_len: int, executed: bool = False) -> int:
        """Forward FLOPs per token (a multiply-add is 2); ``executed``: with what the chunked form adds."""

    def state_bytes(self, d_model: int, batch: int, seq_len: int) -> int:
        """Bytes of carried state of ``batch`` sequences after ``seq_len`` tokens (fp32)."""


class Branch(nn.Module):
    """A residual branch: ``x + branch(norm(x))``; norm and residual belong to the block.

    Subclasses import torch alone, know nothing of ranks, and keep neither state nor streams on themselves. Where the
    output is a partial sum (tp), a bias of the last projection is to be added once. Head counts are read from shapes,
    not from settings. Buffers start at 0 and are carried in checkpoints.
    """

    Config: ClassVar[type[Any]]
    reads: ClassVar[frozenset[str]] = frozenset()
    writes: ClassVar[frozenset[str]] = frozenset()
    sp: ClassVar[Literal["scan", "heads", "serial", "token"]]
    place: Place

    def forward(self, x: Tensor, ctx: Context, state: State, streams: Streams) -> tuple[Tensor, State, Streams]:
        """``[B, T, d_model]`` to ``[B, T, d_model]``, the state after the row's last column, the streams written."""
        raise TypeError(f"{type(self).__name__} has no forward")

    def init_state(self, batch: int, device: Device | str) -> State:
        """The state before the first token, of ``batch`` sequences."""
        return {}

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the carried tensors of one sequence, where they do not depend on its length: fp32, but the tails of
        convolutions and token shifts, which have x's dtype."""
        return {}

    def after_step(self, notes: dict[str, Tensor]) -> None:
        """Called once per optimizer step taken, with what this branch noted, summed over the step's whole batch."""

    def param_info(self) -> dict[str, ParamInfo]:
        """One entry for every name of ``named_parameters()``; checked when the model is built."""
        raise TypeError(f"{type(self).__name__} has no param_info")


BRANCHES: dict[str, type[Branch]] = {}
"""Every registered kind; the recipe's ``model.branches.NAME.kind`` picks one."""


def register(kind: str) -> Callable[[type[Branch]], type[Branch]]:
    """Class decorator: makes a Branch available to recipes under ``kind``."""

    def add(cls: type[Branch]) -> type[Branch]:
        if kind in BRANCHES:
            raise ValueError(f"branch kind {kind} is registered twice")
        BRANCHES[kind] = cls
        return cls

    return add


def branch_class(kind: str) -> type[Branch]:
    """The registered branch, or UsageError naming the nearest kind."""
    if kind not in BRANCHES:
        raise UsageError(f"model.branches: kind {kind} is unknown{nearest(kind, BRANCHES)}")
    return BRANCHES[kind]
