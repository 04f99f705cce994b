"""Changes of the mixture while a run trains: asked for by a person or a policy, logged by rank 0, told to all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import xxhash

from lmtrain.checkpoint.ranks import Ranks
from lmtrain.data.loader import Loader
from lmtrain.data.mix_request import MixRequest
from lmtrain.data.policies.policy import MixPolicy, Progress
from lmtrain.data.policies.static import Static
from lmtrain.data.schedule import Event, ScheduleLog, event_row
from lmtrain.data.weights import COARSE_PERIOD, integer_weights
from lmtrain.engine.protocol import StepInfo
from lmtrain.errors import LmtrainError, StorageError, UsageError

REQUEST = "mix.yaml"


@dataclass
class Mixture:
    """Events of one attempt. An event is in the log, on disk, before any rank hears of it.

    log: on rank 0 the file's, elsewhere None. policy, control (the run's ``control`` folder), note (a line for the
    console): used on rank 0. recorded: the last step some earlier attempt recorded; until then nothing is proposed, for
    what was proposed then is in the log.
    """

    loader: Loader
    ranks: Ranks
    total_steps: int
    log: ScheduleLog | None
    policy: MixPolicy
    control: Path
    recorded: int
    note: Callable[[str], None]
    _told: int = field(init=False)

    def __post_init__(self) -> None:
        self._told = self.loader.log_length

    @property
    def grew(self) -> bool:
        """Whether this rank's log has events that not all ranks know: a flag of the next step."""
        return self.log is not None and len(self.log.events) > self._told

    def observe(self, step: int, info: StepInfo) -> None:
        """Learn from the ``step``-th step, and log what follows. On rank 0."""
        if self.log is None:
            return
        tokens, bits = {}, {}
        # a source that came in this step has no losses yet
        for name, (nats, targets) in zip(self.loader.source_names, info.source_loss.tolist(), strict=False):
            if targets and math.isfinite(nats):
                tokens[name] = targets
                bits[name] = nats / targets / math.log(2) / self.loader.catalog.bytes_per_token[name]
        if info.skipped is None:
            self.policy.observe(step, tokens, bits)
        if step >= self.total_steps:
            return
        # the ranks hear of it while they hold the next step, whose index is ``step``
        earliest = self.loader.schedule.first_block(step + self.loader.lead)
        self._answer_request(step, earliest)
        if step > self.recorded:
            self._propose(step, earliest)

    def state(self) -> dict[str, Any]:
        """For the checkpoint: what the policy learnt, and the events made so far; on rank 0 (elsewhere it is empty)."""
        if self.log is None:
            return {}
        learnt = {"kind": self.loader.cfg.policy.kind, "state": self.policy.state_dict()}
        return {"events": [event_row(event) for event in self.log.events], "policy": learnt}

    def share(self) -> None:
        """Tell all ranks the events they do not know; collective, in the step whose flags said so."""
        news: list[Event] = self.ranks.on_first(lambda: list(self.log.events[self._told :]) if self.log else [])
        self.ranks.together(lambda: self.loader.extend(news))
        self._told += len(news)

    def _propose(self, step: int, earliest: int) -> None:
        sampler, schedule = self.loader.sampler, self.loader.schedule
        assert self.log is not None
        if self.grew:
            return  # a person spoke in this step; the policy sees what came of it in the next
        tokens = {name: count * self.loader.block_tokens for name, count in sampler.counts(earliest).items()}
        weights = self.policy.propose(
            step,
            Progress(
                tokens=tokens,
                available=self.loader.tokens_available,
                total=schedule.tokens(self.total_steps),
                weights=_newest(self.log, {"recipe", "policy", "user"}),
                proposed=_newest(self.log, {"recipe", "policy"}),
            ),
        )
        if weights is None or earliest >= schedule.first_block(self.total_steps):
            return
        kind = self.loader.cfg.policy.kind
        event = Event(earliest, "policy", kind, integer_weights(weights, COARSE_PERIOD), step=step)
        try:
            self.loader.admit(event, None)
        except LmtrainError as error:
            self.note(f"WARNING: the policy's mixture after step {step} is refused: {error}")
            return
        self.log.append(event)
        self.note(f"policy {kind}: {describe(event, self.loader.block_tokens)}")

    def _answer_request(self, step: int, earliest: int) -> None:
        """Do what ``control/mix.yaml`` asks, or say why not; either way the file gets another name."""
        request = self.control / REQUEST
        try:
            data, stamp = request.read_bytes(), request.stat().st_mtime_ns
        except FileNotFoundError:
            return
        except OSError as error:
            self._settle(step, "rejected", f"cannot be read: {error.strerror}")
            return
        assert self.log is not None
        # names this very file, should a crash come between the log's line and the file's new name
        mark = f"control/{REQUEST} {xxhash.xxh3_64_hexdigest(data, seed=stamp % 2**64)}"
        if any(mark in event.reason for event in self.log.events):
            self._settle(step, "applied")
            return
        try:
            event = self._event(data, mark, step, earliest)
        except LmtrainError as error:
            self._settle(step, "rejected", str(error))
            self.note(f"WARNING: control/{REQUEST} is refused: {error}; training goes on")
            return
        self.log.append(event)
        self._settle(step, "applied")
        self.note(f"control/{REQUEST}: {describe(event, self.loader.block_tokens)}")

    def _event(self, data: bytes, mark: str, step: int, earliest: int) -> Event:
        try:
            request = MixRequest.parse(data.decode("utf-8"))
        except UnicodeDecodeError:
            raise UsageError("not UTF-8 text") from None
        event = request.event(
            self.loader.sampler,
            block_tokens=self.loader.block_tokens,
            earliest=earliest,
            end=self.loader.schedule.first_block(self.total_steps),
            now=self.loader.schedule.tokens(step),
            step=step,
        )
        event = replace(event, reason=f"{event.reason} [{mark}]".strip())
        self.loader.admit(event, self.total_steps if isinstance(self.policy, Static) else None)
        return event

    def _settle(self, step: int, outcome: str, reason: str = "") -> None:
        """Give the request the name of its outcome, with the reason in a file beside it."""
        target = self.control / f"mix.{outcome}-{step}.yaml"
        number = 1
        while target.exists():
            number += 1
            target = self.control / f"mix.{outcome}-{step}-{number}.yaml"
        try:
            if reason:
                target.with_suffix(".txt").write_text(reason + "\n", encoding="utf-8")
            (self.control / REQUEST).rename(target)
        except OSError as error:
            raise StorageError(f"{target}: {error.strerror}") from error


def describe(event: Event, block_tokens: int) -> str:
    """An event in words."""
    parts = [f"adds {name} ({source.path})" for name, source in event.sources.items()]
    if event.skip:
        parts.append(f"skips {event.skip * block_tokens:,} tokens")
    if event.weights:
        total = sum(event.weights.values())
        parts.append(", ".join(f"{name} {weight / total:.3g}" for name, weight in event.weights.items()))
    return f"from token {event.first_block * block_tokens:,} on: {'; '.join(parts)}"


def _newest(log: ScheduleLog, origins: set[str]) -> dict[str, int]:
    """The weights of the newest event of one of ``origins`` that gives some."""
    return next(event.weights for event in reversed(log.events) if event.weights and event.origin in origins)
