"""A variant of an op, as the tests of all ops see it: how inputs are made, call, definition, what else it promises."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lmtrain.ops import AffineOp, Documents, library
from tests.ops.op_inputs import Draw, Tensors
from tests.ops.scan_cases import BATCH, assert_close, run

Outputs = tuple[Tensor, ...]
Call = Callable[..., Outputs]

DECAYS = {"weak": 1e-3, "mixed": 1.0, "strong": 50.0}  # strong: e^-50 a token, a chunk underflows to 0


@dataclass(frozen=True)
class Case:
    """One variant of an op.

    op: the name under which its backends are registered.
    make: ``(draw, batch, length, decay)`` to the floating inputs; ``draw(*shape)`` is normal, and new at each call.
    call: ``(inputs, docs, **static)`` to the outputs; definition: ``(inputs, docs)`` to the same, token by token or as
        the formula says.
    outputs: their names; all but ``state`` are per token.
    whole: the inputs without a T dim. wide: the inputs that stay fp32 where values are bf16.
    reach: how many columns back a column sees in its document; None: all.
    sees: inputs to bool ``[B, T, T]``, what of its document a column sees, where that depends on them.
    once: in bf16 the outputs are those of fp32, rounded once; else products are made in bf16.
    skips: the torch form, too, leaves out what it does not see, instead of multiplying it by zero: no NaN gets through.
    chunks: lengths to try of the ``chunk`` it takes, if it takes one.
    tolerance: relative RMS allowed in fp32, three times the worst measured over scenes and backends, 6e-7.
    resumes: the call whose state another call may start from; None where none is carried.
    """

    op: str
    make: Callable[[Draw, int, int, float], Tensors]
    call: Call
    definition: Call
    outputs: tuple[str, ...] = ("y", "state")
    whole: frozenset[str] = frozenset()
    wide: frozenset[str] = frozenset()
    reach: int | None = None
    sees: Callable[[Tensors], Tensor] | None = None
    once: bool = True
    skips: bool = True
    chunks: tuple[int, ...] = ()
    tolerance: float = 2e-6
    resumes: Call | None = None
    affine: Affine | None = None

    def inputs(self, length: int, decay: float = 1.0, *, batch: int = BATCH, seed: int = 0) -> Tensors:
        """In fp64, of values that fp32 has: one definition serves both precisions."""
        generator = torch.Generator().manual_seed(seed)
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        return {name: t.float().double() for name, t in self.make(draw, batch, length, decay).items()}

    def part(self, tensors: Tensors, first: int, last: int) -> Tensors:
        """The columns ``[first, last)``, with what has none as it is, but for the initial state."""
        row = {name: tensor for name, tensor in tensors.items() if name != "initial_state"}
        return {name: t if name in self.whole else t[:, first:last] for name, t in row.items()}

    def in_bf16(self, tensors: Tensors) -> Tensors:
        return {name: t.float() if name in self.wide else t.bfloat16() for name, t in tensors.items()}


@dataclass(frozen=True)
class Affine:
    """An op whose spans compose, and its inputs in order; unique: what a state stands for, where it is not unique;
    derived: the inputs that are not floating, made of the others."""

    op: AffineOp
    names: tuple[str, ...]
    unique: Callable[[Tensor], Tensor]
    derived: Callable[[Tensors], Tensors]

    def arguments(self, tensors: Tensors) -> list[Tensor | None]:
        tensors = tensors | self.derived(tensors)
        return [tensors.get(name) for name in self.names]


def affine(
    op: AffineOp,
    recurrence: Call,
    names: str,
    make: Callable[[Draw, int, int, float], Tensors],
    *,
    whole: Iterable[str] = (),
    wide: Iterable[str] = (),
    chunks: tuple[int, ...] = (),
    skips: bool = False,
    tolerance: float = 2e-6,
    unique: Callable[[Tensor], Tensor] = lambda state: state,
    derived: Callable[[Tensors], Tensors] = lambda tensors: {},
    sees: Callable[[Tensors], Tensor] | None = None,
) -> Case:
    """An affine op: inputs ``names`` and an initial state to y and a state; the definition is its ``recurrence``."""
    row = Affine(op, tuple(names.split()), unique, derived)

    def resumes(tensors: Tensors, docs: Documents | None, **static: Any) -> Outputs:
        return op(*row.arguments(tensors), docs=docs, initial_state=tensors.get("initial_state"), **static)

    def call(tensors: Tensors, docs: Documents | None, **static: Any) -> Outputs:
        y, state = resumes(tensors, docs, **static)
        return y, unique(state)

    def definition(tensors: Tensors, docs: Documents | None) -> Outputs:
        y, state = recurrence(*row.arguments(tensors), docs, tensors.get("initial_state"))
        return y, unique(state)

    return Case(
        op.name,
        make,
        call,
        definition,
        whole=frozenset({*whole, "initial_state"}),
        wide=frozenset({*wide, "initial_state"}),
        sees=sees,
        skips=skips,
        chunks=chunks,
        tolerance=tolerance,
        resumes=resumes,
        affine=row,
    )


@dataclass(frozen=True)
class Running:
    """A case, by its name, on one backend of its op."""

    name: str
    case: Case
    backend: library.Backend

    @property
    def compiled(self) -> bool:
        """Whether its kernels are of the library, which owes more than torch's: same bits, no NaN let through."""
        return self.backend.name in ("cpu", "cuda")

    @property
    def device(self) -> str:
        return self.backend.device or "cpu"

    def takes(self, dtype: torch.dtype) -> bool:
        return self.backend.dtypes is None or dtype in self.backend.dtypes

    @property
    def widest(self) -> torch.dtype:
        """The most precise dtype that the backend takes."""
        return next(dtype for dtype in (torch.float64, torch.float32, torch.bfloat16) if self.takes(dtype))

    def run(self, tensors: Tensors, docs: Documents | None) -> Tensors:
        """Outputs and all gradients, computed on the backend's device."""
        there = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        found = run(self.case.call, there, docs and docs.to(self.device), self.case.outputs)
        return {name: tensor.cpu() for name, tensor in found.items()}

    def assert_matches(self, tensors: Tensors, docs: Documents | None, expected: Tensors | None = None) -> None:
        """In fp64 the worst measured is 3e-15, by delta's torch form; in fp32 as the case says."""
        if expected is None:
            expected = run(self.case.definition, tensors, docs, self.case.outputs)
        for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, self.case.tolerance)):
            if self.takes(dtype):
                found = self.run({name: t.to(dtype) for name, t in tensors.items()}, docs)
                assert all(tensor.dtype == dtype for tensor in found.values())
                assert_close(found, expected, tolerance)


ROWS_EDGES = ((16, 32, 33, 64, 128), (1, 5, 15, 31, 63, 65, 66, 127, 190, 999))
"""Columns of rows 0 and 1 at which documents start: at, before and after the borders of every kernel's chunks."""


def documents(kind: str, length: int, batch: int = BATCH) -> Documents | None:
    """none; fresh: one document from column 0; carried: going on; edges: as ``ROWS_EDGES``, row 0 going on."""
    if kind == "none":
        return None
    ids = torch.zeros(batch, length, dtype=torch.int32)
    if kind == "edges":
        for row in range(batch):
            ids[row, [t for t in ROWS_EDGES[row % 2] if t < length]] = 1
    before = {"fresh": [0, 0], "carried": [3, 1], "edges": [3, 0]}[kind]
    return Documents.from_ids(ids.cumsum(1), torch.tensor([before[row % 2] for row in range(batch)]))
