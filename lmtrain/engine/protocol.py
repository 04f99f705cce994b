"""What a training loop asks of an engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lmtrain.data.batch import Batch
from lmtrain.model.branch import State


@dataclass(frozen=True)
class StepInfo:
    """What one optimizer step did; every field is the same on every rank.

    loss_sum: nats over all targets of the step. flags: the flags of all ranks, summed. grad_norm: global, before
    clipping (None if nothing was computed). skipped: why the step was not taken. source_loss: fp64 ``[S, 2]``, nats and
    targets per source id. branch_loss: what branches added to the loss, per target. router_load: int64 ``[E]``, how
    often each expert was chosen, by place. seconds: wall time on this rank.
    """

    loss_sum: float
    num_targets: int
    flags: Tensor
    grad_norm: float | None
    skipped: str | None
    source_loss: Tensor
    branch_loss: float
    router_load: dict[int, Tensor]
    seconds: float

    @property
    def loss(self) -> float:
        """Nats per target."""
        return self.loss_sum / self.num_targets if self.num_targets else float("nan")


class Engine(Protocol):
    """Owns model and optimizer on their mesh. ``Batch`` stays outside the model, cut to this rank's shard.

    num_sources: S, the sources whose losses a step tells apart; the caller raises it when a source comes.
    """

    num_sources: int

    def train_step(self, micro_batches: Sequence[Batch], lr: float, flags: Tensor) -> StepInfo:
        """One optimizer step; collective. flags: int64, summed over ranks before anything is computed."""

    def losses(self, batch: Batch) -> Tensor:
        """Nats per target, fp32 (fp64 under float64) ``[B, T]``, 0 where there is none; no gradient; collective."""

    def decode(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """int ``[B, T]`` continuing ``state`` to logits ``[B, T, V]``; the state's ``length`` ``[B]`` grows by T.

        Collective: every rank decodes the same rows.
        """

    def init_state(self, batch: int) -> State:
        """The state of ``batch`` rows before their first token, for ``decode``."""

    def parameters_fp32(self) -> Iterator[tuple[str, Tensor]]:
        """Master weights by name, sharded as they are."""

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """All that must survive: tensors by flat name (``model.X``, ``optimizer.exp_avg.X``), and counters."""

    def load_state_dict(self, counters: Mapping[str, int]) -> None:
        """Take the counters; the tensors of ``state_dict`` were already filled in place."""
