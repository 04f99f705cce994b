"""Stateful training: the model's state goes from step to step, its gradient does not (truncated back-propagation)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lmtrain.data.batch import Batch
from lmtrain.model.branch import State


class CarriedState:
    """By micro-batch of a step: the state its rows ended with, and the runs these rows are blocks of.

    A row drops what it is given iff its ``before`` is 0 (``Documents``).
    """

    def __init__(self) -> None:
        self._held: dict[int, tuple[Tensor, State]] = {}

    def take(self, index: int, batch: Batch) -> State:
        """The state in front of micro-batch ``index``; {} if none of its rows goes on with one.

        Raises ValueError if a row goes on with a run whose state is not here.
        """
        docs = batch.docs if batch.docs.whole is None else batch.docs.whole
        goes_on = docs.before > 0
        if not goes_on.any():
            return {}
        runs, state = self._held.get(index, (torch.full_like(batch.run, -1), {}))
        if runs.shape != batch.run.shape or bool((goes_on & (runs != batch.run)).any()):
            raise ValueError(
                f"micro-batch {index} goes on with runs {batch.run[goes_on].tolist()}, the state held is of "
                f"{runs.tolist()}: training can only begin where a group of steps does (data.run_blocks)"
            )
        return state

    def keep(self, index: int, batch: Batch, state: State) -> None:
        """Hold the state after micro-batch ``index``, without gradient."""
        # copies: a view of what an op computed would hold the whole row
        self._held[index] = (batch.run, tree_map_only(Tensor, lambda leaf: leaf.detach().clone(), state))

    def forget(self, micro_batches: Sequence[Batch]) -> None:
        """Have the rows of a step that was not taken go on from zero: their state may be NaN, or was not computed."""
        for index, batch in enumerate(micro_batches):
            self.keep(index, batch, {})
