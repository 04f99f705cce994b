"""What an op is: a function over a row of tokens that says its cost and, if affine in its state, how spans compose."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

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

    @abstractmethod
    def gamma(self, *inputs: Tensor | None, docs: Documents | None = None) -> Tensor:
        """Transition over the whole span, in the computing dtype; 0 if a document starts in it, column 0 included."""

    @abstractmethod
    def apply(self, gamma: Tensor, state: Tensor) -> Tensor:
        """``gamma . state``: one step of the fold over spans. Where gamma is 0 the result is 0, whatever the state."""

    def drop(self, state: Tensor, before: Tensor) -> Tensor:
        """``state`` ``[B, ...]`` with the rows zeroed whose column 0 starts a document (``before`` ``[B]`` is 0)."""
        keep = (before != 0).view(-1, *([1] * (state.dim() - 1)))
        return torch.where(keep, state, state.new_zeros(()))

    @abstractmethod
    def transpose(self, gamma: Tensor, grad: Tensor) -> Tensor:
        """``gamma^T . grad``: one step of the reverse fold."""

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


def compute_dtype(values: Tensor) -> torch.dtype:
    """The dtype an op computes in, and keeps its state in: fp32, or fp64 for fp64 values."""
    return torch.promote_types(values.dtype, torch.float32)


def check_shape(op: str, argument: str, tensor: Tensor, expected: tuple[int | None, ...]) -> None:
    """Raise ValueError naming op, argument, expected and got unless ``tensor`` has this shape (None: any size)."""
    got = tuple(tensor.shape)
    if len(got) != len(expected) or any(e is not None and e != g for e, g in zip(expected, got, strict=True)):
        raise ValueError(f"{op}: {argument}: expected shape {_spell(expected)}, got {_spell(got)}")


def _spell(shape: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("*" if size is None else str(size) for size in shape) + "]"
