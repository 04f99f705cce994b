"""What a mixture policy is asked, and what it may answer.

A policy runs on rank 0 only and proposes; whoever owns the schedule log makes an event of it. It learns in ``observe``
alone: ``propose`` changes nothing, so that a step which was already recorded is observed again and not proposed again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lmtrain.data.policies.config import PolicyConfig


@dataclass(frozen=True)
class Run:
    """What is known of a run before it begins.

    available: tokens of whole blocks by source, one epoch each. total: tokens of the run. phases: the first token of
    each phase of the learning rate, by name. max_epochs: ``data.max_epochs``.
    """

    available: Mapping[str, int]
    total: int
    phases: Mapping[str, int] = field(default_factory=dict)
    max_epochs: float = 16.0


@dataclass(frozen=True)
class Progress:
    """Where a run stands at the block from which a proposal made now would hold.

    done: tokens of the run before that block. tokens: those by source, and with them what was skipped, so that
    their sum may be more. available: tokens of one epoch by source, added sources included. total: tokens of the run.
    weights: the integers of the event in force there, whoever made it; only these sources may be proposed by a policy
    that adapts. proposed: those of the newest event in force that the policy (or, before that, the recipe) made.
    """

    done: int
    tokens: Mapping[str, int]
    available: Mapping[str, int]
    total: int
    weights: Mapping[str, int]
    proposed: Mapping[str, int]

    @property
    def epochs(self) -> dict[str, float]:
        """Epochs read by source."""
        return {name: self.tokens.get(name, 0) / size for name, size in self.available.items() if size}


class MixPolicy(ABC):
    """first: shares of the mixture at block 0. every: optimizer steps between two proposals."""

    adapts: ClassVar[bool] = True
    """Whether it answers to losses: floor, cap and epochs then bound what it proposes."""

    def __init__(self, cfg: PolicyConfig, first: Mapping[str, float], run: Run) -> None:
        """Raises UsageError or DataError for what cannot work. ``first``: shares that sum to 1."""
        self.first = dict(first)
        self.every = cfg.every

    @abstractmethod
    def observe(self, step: int, tokens: Mapping[str, float], bits: Mapping[str, float]) -> None:
        """What a step taught, each step once, in order.

        step: optimizer steps taken, this one included. tokens: its targets by source. bits: its loss by source, in bits
        per byte of UTF-8 text (nats / ln 2 / bytes per token). A source without targets is absent or has 0.
        """

    @abstractmethod
    def propose(self, step: int, progress: Progress) -> dict[str, float] | None:
        """Weights in tokens by source, in any unit, or None for no change. Asked after ``observe`` of the same step."""

    def plan(self) -> dict[str, float] | None:
        """Tokens the whole run will read by source, where the policy decides that in advance; else None."""
        return None

    def ahead(self, done: int) -> list[tuple[int, dict[str, float]]] | None:
        """The mixtures it will propose, where it decides that in advance; else None.

        Each as shares, with the tokens of the run at which it begins: all more than ``done``, rising.
        """
        return None

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that was learnt, as JSON."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what ``state_dict`` gave, exactly."""


def shares(weights: Mapping[str, float]) -> dict[str, float]:
    """``weights`` divided by their sum, zeros left out."""
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items() if weight > 0}


def among(values: Mapping[str, float], names: Mapping[str, float]) -> dict[str, float]:
    """What ``values`` has for ``names``; a name it does not have gets the mean of those it has (0 if none)."""
    known = [values[name] for name in names if name in values]
    mean = sum(known) / len(known) if known else 0.0
    return {name: values.get(name, mean) for name in names}


def total_variation(a: Mapping[str, float], b: Mapping[str, float]) -> float:
    """Half the sum of absolute differences of two mixtures given as shares."""
    return sum(abs(a.get(name, 0.0) - b.get(name, 0.0)) for name in {*a, *b}) / 2
