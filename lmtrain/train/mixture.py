"""Changes of the mixture while a run trains: asked for by a person or a policy, logged by rank 0, told to all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lmtrain.checkpoint.ranks import Ranks
from lmtrain.data.blocks.packing import plan_digests
from lmtrain.data.loader import Loader
from lmtrain.data.order.mix_request import MixRequest
from lmtrain.data.order.schedule import Event, ScheduleLog, event_row
from lmtrain.data.order.weights import COARSE_PERIOD, integer_weights
from lmtrain.data.policies.guarded import Guarded
from lmtrain.data.policies.policy import MixPolicy, Progress
from lmtrain.engine.protocol import StepInfo
from lmtrain.errors import LmtrainError
from lmtrain.train.request_file import REQUEST, Request, RequestFile


@dataclass
class Mixture:
    """Events of one attempt. An event is in the log, on disk, before any rank takes it; one that adds sources is
    logged when every rank could open them.

    log: on rank 0 the file's, elsewhere None. policy, control (the run's ``control`` folder), note (a line for the
    console): used on rank 0. recorded: the last step some earlier attempt recorded; until then nothing is proposed, for
    what was proposed then is in the log, and no event changes what those steps read. policy_error: why the policy was
    given up, until it is in a metrics row.
    """

    loader: Loader
    ranks: Ranks
    total_steps: int
    log: ScheduleLog | None
    policy: MixPolicy
    control: Path
    recorded: int
    note: Callable[[str], None]
    policy_error: str = field(init=False, default="")
    _told: int = field(init=False)
    _candidate: Event | None = field(init=False, default=None)  # on rank 0: its sources are not opened everywhere yet
    _left: str = field(init=False, default="")  # mark of the request that an attempt before this one left
    _stuck: str = field(init=False, default="")  # mark of an answered request that would not take another name

    def __post_init__(self) -> None:
        self._told = self.loader.log_length
        self._file = RequestFile(self.control)
        self._policy = Guarded(self.policy, self.loader.cfg.policy.kind, self._give_up)
        if self.log is not None:
            self._left = _mark_of(self._file)

    @property
    def grew(self) -> bool:
        """Whether this rank has events that not all ranks know: a flag of the next step."""
        return self.log is not None and (self._candidate is not None or len(self.log.events) > self._told)

    def losses(self, info: StepInfo) -> dict[str, tuple[float, float]]:
        """Nats and targets of each source that the step read."""
        # a source that came in this step has no losses yet
        pairs = zip(self.loader.source_names, info.source_loss.tolist(), strict=False)
        return {name: (nats, targets) for name, (nats, targets) in pairs if targets}

    def observe(self, step: int, info: StepInfo) -> None:
        """Learn from the ``step``-th step, and log what follows. On rank 0."""
        if self.log is None:
            return
        tokens, bits = {}, {}
        for name, (nats, targets) in self.losses(info).items():
            length = self.loader.catalog.bytes_per_token[name]
            if math.isfinite(nats) and length > 0:
                tokens[name] = targets
                bits[name] = nats / targets / math.log(2) / length
        if info.skipped is None:
            self._policy.observe(step, tokens, bits)
        if step >= self.total_steps:
            return
        # the ranks hear of it while they hold the next step, whose index is ``step``
        earliest = max(self.loader.earliest(step), first_unrecorded(self.loader, self.recorded))
        self._answer_request(step, earliest)
        if step > self.recorded:
            self._propose(step, after_proposals(self.log.events, earliest))

    def state(self) -> dict[str, Any]:
        """For the checkpoint: what the policy learnt, the events made so far, and the digests of the pack plans that
        sources are read by; on rank 0 (elsewhere it is empty)."""
        if self.log is None:
            return {}
        learnt = {"kind": self.loader.cfg.policy.kind, "state": self._policy.state_dict()}
        plans = plan_digests(self.loader.catalog.blocks)
        return {"events": [event_row(event) for event in self.log.events], "policy": learnt, "plans": plans}

    def share(self) -> None:
        """Tell all ranks the events they do not know; collective, in the step whose flags said so."""
        candidate = self.ranks.on_first(lambda: self._candidate)
        if candidate is not None:
            self._decide(candidate)
        news: list[Event] = self.ranks.on_first(lambda: list(self.log.events[self._told :]) if self.log else [])
        self.ranks.together(lambda: self.loader.extend(news))
        self._told += len(news)

    def _decide(self, candidate: Event) -> None:
        """Log what adds sources if every rank can open them; else refuse it, and training goes on."""
        refusals = self.ranks.together(lambda: _refusal(lambda: self.loader.admit(candidate, None)))
        self._candidate = None
        refused = [(rank, why) for rank, why in enumerate(refusals) if why]
        if not refused:
            self.ranks.on_first(lambda: self.log.append(candidate) if self.log else None)
        if self.log is None:
            return
        if refused:
            self._reject(candidate.step, "; ".join(f"on rank {rank}: {why}" for rank, why in refused))
        else:
            self._applied(candidate)

    def _propose(self, step: int, earliest: int) -> None:
        sampler, schedule = self.loader.sampler, self.loader.schedule
        assert self.log is not None
        if self.grew:
            return  # a person spoke in this step; the policy sees what came of it in the next
        tokens = {name: count * self.loader.block_tokens for name, count in sampler.counts(earliest).items()}
        kind = self.loader.cfg.policy.kind
        progress = Progress(
            done=earliest * self.loader.block_tokens,
            tokens=tokens,
            available=self.loader.tokens_available,
            total=schedule.tokens(self.total_steps),
            weights=_in_force(self.log.events, {"recipe", "policy", "user"}, earliest),
            proposed=_in_force(self.log.events, {"recipe", "policy"}, earliest),
        )
        made: list[Event] = []

        def make() -> None:
            weights = self._policy.propose(step, progress)
            if weights is not None and earliest < schedule.first_block(self.total_steps):
                event = Event(earliest, "policy", kind, integer_weights(weights, COARSE_PERIOD), step=step)
                self.loader.admit(event, None)
                made.append(event)

        if why := _refusal(make):
            self.note(f"WARNING: the policy's mixture after step {step} is refused: {why}")
        for event in made:
            self.log.append(event)
            self.note(f"policy {kind}: {describe(event, self.loader.block_tokens)}")

    def _answer_request(self, step: int, earliest: int) -> None:
        """Do what ``control/mix.yaml`` asks, or say why not; either way the file gets another name."""
        assert self.log is not None
        found: list[Request | None] = []
        why = _refusal(lambda: found.append(self._file.read()))
        request = found[0] if found else None
        mark = request.mark if request else "unreadable" if why else ""
        if not mark or mark == self._stuck:
            return
        if request is None:
            self._stuck = mark
            self._reject(step, why)
            return
        self._stuck = mark  # until it has another name
        left, self._left = self._left, ""
        if mark == left and any(mark in event.reason for event in self.log.events):
            self._settle(step, "applied")
            self.note(f"control/{REQUEST} is in the log already: a crash came before it was renamed")
            return
        events: list[Event] = []
        why = _refusal(lambda: events.append(self._event(request, step, earliest)))
        if why:
            self._reject(step, why)
        elif events[0].sources:
            self._candidate = events[0]
        else:
            self.log.append(events[0])
            self._applied(events[0])

    def _event(self, request: Request, step: int, earliest: int) -> Event:
        assert self.log is not None
        asked = MixRequest.parse(request.text())
        event = asked.event(
            self.loader.sampler,
            block_tokens=self.loader.block_tokens,
            earliest=after_proposals(self.log.events, earliest) if asked.weights else earliest,
            end=self.loader.schedule.first_block(self.total_steps),
            now=self.loader.schedule.tokens(step),
            step=step,
        )
        event = replace(event, reason=f"{event.reason} [{request.mark}]".strip())
        self._warn(admit_to_end(self.loader, event, self._policy, step, self.total_steps))
        return event

    def _give_up(self, why: str) -> None:
        self.policy_error = why
        self._warn([why])

    def _warn(self, warnings: Sequence[str]) -> None:
        for warning in warnings:
            self.note(f"WARNING: {warning}")

    def _applied(self, event: Event) -> None:
        self._settle(event.step, "applied")
        self.note(f"control/{REQUEST}: {describe(event, self.loader.block_tokens)}")

    def _reject(self, step: int, why: str) -> None:
        self._settle(step, "rejected", why)
        self.note(f"WARNING: control/{REQUEST} is refused: {why}; training goes on")

    def _settle(self, step: int, outcome: str, reason: str = "") -> None:
        try:
            self._file.settle(step, outcome, reason)
            self._stuck = ""
        except OSError as error:
            self.note(f"WARNING: control/{REQUEST} is {outcome}, but cannot be renamed: {error}; it is not read again")


def first_unrecorded(loader: Loader, recorded: int) -> int:
    """The first block at which an event may take effect and leave what the first ``recorded`` steps read as it was."""
    return loader.sampler.next_change(loader.schedule.first_block(recorded))


def after_proposals(events: Sequence[Event], earliest: int) -> int:
    """The first block from ``earliest`` on at which a mixture made now stays.

    A policy proposes ahead of its steps by the loader's lead, and that may have been longer: before the newest of its
    events, in the order of blocks, a mixture made later would be undone by one made earlier.
    """
    return max([earliest, *(past.first_block for past in events if past.origin == "policy")])


def admit_to_end(loader: Loader, event: Event, policy: MixPolicy | Guarded, step: int, stop: int) -> list[str]:
    """``Loader.admit`` of what a person asks after ``step`` of ``stop`` steps, with what ``policy`` will do later.

    Epochs are those of the whole run where the policy decides in advance, else nothing is known of them.
    """
    # the policy was asked about everything before what a step ago was the first block that could change
    asked, earliest = (loader.earliest(at) for at in (step - 1, step))
    coming = policy.ahead(asked * loader.block_tokens)
    if coming is None:
        return loader.admit(event, None)
    ahead = []
    for tokens, mixture in coming:
        first = loader.sampler.next_change(max(-(-tokens // loader.block_tokens), earliest))
        ahead.append(Event(first, "policy", "", integer_weights(mixture, COARSE_PERIOD), step=step))
    return loader.admit(event, stop, ahead)


def describe(event: Event, block_tokens: int) -> str:
    """An event in words."""
    parts = [f"adds {name} ({source.origin})" for name, source in event.sources.items()]
    if event.skip:
        parts.append(f"skips {event.skip * block_tokens:,} tokens")
    if event.weights:
        total = sum(event.weights.values())
        parts.append(", ".join(f"{name} {weight / total:.3g}" for name, weight in event.weights.items()))
    return f"from token {event.first_block * block_tokens:,} on: {'; '.join(parts)}"


def _in_force(events: Sequence[Event], origins: set[str], block: int) -> dict[str, int]:
    """The weights that hold at ``block`` of all events of ``origins``; of two at one place, those made last."""
    reached = [event for event in events if event.weights and event.origin in origins and event.first_block <= block]
    return max(reversed(reached), key=lambda event: event.first_block).weights


def _refusal(attempt: Callable[[], object]) -> str:
    """Why ``attempt`` failed, in one line; empty if it did not."""
    try:
        attempt()
    except LmtrainError as error:
        return str(error)
    except Exception as error:  # whatever a file or a loss holds must not end a run
        return f"{type(error).__name__}: {error}"
    return ""


def _mark_of(file: RequestFile) -> str:
    marks: list[str] = []
    _refusal(lambda: marks.extend(request.mark for request in [file.read()] if request))
    return marks[0] if marks else ""
