"""What an op is: a function over a row of tokens that says its cost and, if affine in its state, how spans compose."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lmtrain.errors import nearest
from lmtrain.ops.documents import Documents


@dataclass(frozen=True)
class Cost:
    """Forward cost of one call: FLOPs of the definition, FLOPs the backend executes, bytes read and written."""

    model_flops: int
    executed_flops: int
    bytes: int


@dataclass(frozen=True)
class Span:
    """Summary of a run of tokens: ``S_out = gamma . S_in + state``."""

    gamma: Tensor
    state: Tensor


class Op(ABC):
    """Base of every op: callable, with a cost. ``name`` is the key under which backends are chosen and recorded."""

    name: ClassVar[str]

    @abstractmethod
    def __call__(
        self, *inputs: Tensor | None, docs: Documents | None = None, initial_state: Tensor | None = None, **static: Any
    ) -> tuple[Tensor, Tensor]:
        """``(y, final state)``. Computes in ``compute_dtype(inputs[0])``; y in the dtype of ``inputs[0]``."""

    @abstractmethod
    def cost(self, *shapes: tuple[int, ...]) -> Cost:
        """Cost of one forward call on inputs of these shapes."""


class AffineOp(Op):
    """An op affine in its incoming state (design: ``S_t = Gamma_t S_{t-1} + U_t``), so that spans compose.

    ``needs_state``: True if the incoming state must be known before y (matrix and block kinds); False if the local pass
    runs from zero and ``correct`` adds what the incoming state contributes.
    """

    kind: ClassVar[Literal["diag", "scalar", "vector", "matrix", "block", "lse"]]
    needs_state: ClassVar[bool]
    timeless: ClassVar[frozenset[int]] = frozenset()  # the inputs without a T dim: parameters of the recurrence

    @abstractmethod
    def gamma(self, *inputs: Tensor | None, docs: Documents | None = None) -> Tensor:
        """Transition over the whole span, in the computing dtype; 0 if a document starts in it, column 0 included."""

    @abstractmethod
    def apply(self, gamma: Tensor, state: Tensor) -> Tensor:
        """``gamma . state``: what is left of a state. Where gamma is 0 the result is 0, whatever the state."""

    def combine(self, gamma: Tensor, state: Tensor, added: Tensor) -> Tensor:
        """The state after a span ``(gamma, added)`` that ``state`` enters: one step of the fold over spans."""
        return self.apply(gamma, state) + added

    def combine_backward(
        self, grad: Tensor, gamma: Tensor, state: Tensor, added: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of gamma, state and added from that of ``combine``: one step of the reverse fold."""
        return self.outer(grad, state), self.transpose(gamma, grad), grad

    def drop(self, state: Tensor, before: Tensor) -> Tensor:
        """``state`` ``[B, ...]`` with the rows zeroed whose column 0 starts a document (``before`` ``[B]`` is 0)."""
        keep = (before != 0).view(-1, *([1] * (state.dim() - 1)))
        return torch.where(keep, state, state.new_zeros(()))

    @abstractmethod
    def transpose(self, gamma: Tensor, grad: Tensor) -> Tensor:
        """``gamma^T . grad``: the gradient of a state from that of what is left of it."""

    @abstractmethod
    def outer(self, grad: Tensor, state: Tensor) -> Tensor:
        """``d <grad, gamma . state> / d gamma``: gamma's gradient, summed over the dims gamma lacks."""

    def span(self, *inputs: Tensor | None, docs: Documents | None = None) -> Span:
        """Summary without y; only where ``needs_state``."""
        raise TypeError(f"{self.name}: span() is for ops that need their state first")

    def correct(self, y: Tensor, *inputs: Tensor | None, docs: Documents | None, incoming: Tensor) -> Tensor:
        """y of a pass from zero state, plus the contribution of ``incoming``; only where not ``needs_state``."""
        raise TypeError(f"{self.name}: correct() is for ops that run before their state is known")

    @abstractmethod
    def step(self, *inputs: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        """One token of decode: inputs without the T dim, the state in and out."""

    def at(self, token: int, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """The inputs of ``step`` at one column; those that have no T dim, or are None, as they are."""
        return tuple(t if t is None or i in self.timeless else t[:, token] for i, t in enumerate(inputs))


def compute_dtype(values: Tensor) -> torch.dtype:
    """The dtype an op computes in, and keeps its state in: fp32, or fp64 for fp64 values."""
    return torch.promote_types(values.dtype, torch.float32)


def starts_of(values: Tensor, docs: Documents | None) -> Tensor:
    """bool ``[B, T]``: where a document starts, for values ``[B, T, ...]``."""
    return values.new_zeros(values.shape[:2], dtype=torch.bool) if docs is None else docs.starts()


def scaled(factor: Tensor, state: Tensor) -> Tensor:
    """``factor * state``, 0 where the factor is 0, even of infinities and in the gradients."""
    return factor * torch.where(factor == 0, state.new_zeros(()), state)


def check_row(op: str, argument: str, values: Tensor, docs: Documents | None, **others: Tensor | None) -> None:
    """Raise ValueError unless all are floating and share a device, and ``docs`` is of the rows ``values [B, T, ...]``.

    others: the other tensors, by the names of their arguments.
    """
    for name, tensor in ((argument, values), *others.items()):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{op}: {name}: expected a floating dtype, got {tensor.dtype}")
    if docs is not None:
        check_shape(op, "docs.ids", docs.ids, tuple(values.shape[:2]))
        others["docs"] = docs.ids
    for name, other in others.items():
        if other is not None and other.device != values.device:
            raise ValueError(f"{op}: {name}: expected device {values.device} as {argument}, got {other.device}")


def check_static(op: str, static: dict[str, Any], *known: str) -> None:
    """Raise ValueError unless the settings ``static`` are among ``known`` and ``chunk``, if given, is 1 or more."""
    for name in static:
        if name not in known:
            raise ValueError(f"{op}: {name}: no such setting{nearest(name, known)}")
    chunk = static.get("chunk")
    if chunk is not None and not (isinstance(chunk, int) and chunk >= 1):
        raise ValueError(f"{op}: chunk: expected at least 1, got {chunk!r}")


def check_labels(op: str, labels: Tensor, expected: tuple[int | None, ...]) -> None:
    """Raise ValueError unless ``labels`` are integers of this shape."""
    check_shape(op, "labels", labels, expected)
    if labels.is_floating_point() or labels.dtype is torch.bool:
        raise ValueError(f"{op}: labels: expected integers, got {labels.dtype}")


def check_shape(op: str, argument: str, tensor: Tensor, expected: tuple[int | None, ...]) -> None:
    """Raise ValueError naming op, argument, expected and got unless ``tensor`` has this shape (None: any size)."""
    got = tuple(tensor.shape)
    if len(got) != len(expected) or any(e is not None and e != g for e, g in zip(expected, got, strict=True)):
        raise ValueError(f"{op}: {argument}: expected shape {_spell(expected)}, got {_spell(got)}")


def _spell(shape: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("*" if size is None else str(size) for size in shape) + "]"
