"""The schedule log of an attempt: begun, continued as the checkpoint knows it, forked, or taken from another run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmtrain.data.order.schedule import Event, ScheduleLog, parse_event, recipe_event
from lmtrain.errors import DataError
from lmtrain.train.metrics import recorded_step

METRICS, SCHEDULE = "metrics.jsonl", "schedule.jsonl"


def settle_log(
    run_dir: Path, weights: Mapping[str, float], saved: Mapping[str, Any], *, first_block: int, step: int, fork: bool
) -> ScheduleLog:
    """The log of the run in ``run_dir``, held to what the checkpoint it continues from knew; on rank 0.

    weights: the recipe's first mixture. saved: the checkpoint's ``schedule``, {} for a new run. first_block, step:
    where the attempt begins. fork: forget events that the checkpoint does not know; the file as it was is kept beside.

    A run branched from another takes over its events; where its recipe's mixture is another, that holds from
    ``first_block`` on. Raises DataError for a log that is not the checkpoint's.
    """
    path = run_dir / SCHEDULE
    then = [parse_event({"format_version": 1, "order_version": 1, **row}) for row in saved.get("events", [])]
    if then and not path.exists():
        ScheduleLog.create(path, _taken_over(then, recipe_event(weights, first_block, step)))
    log = ScheduleLog.open(path, weights)
    for number, event in enumerate(then):
        if log.events[number : number + 1] != (event,):
            has = log.events[number] if number < len(log.events) else "no such line"
            raise DataError(
                f"{path}:{number + 1}: not the log of the checkpoint of step {step}, which has {event}; the file has "
                f"{has}: put the run's own file back, or continue from another checkpoint"
            )
    kept = len(then)
    if [event.origin for event in log.events[kept : kept + 1]] == ["recipe"]:
        kept += 1  # the mixture this run begins with, alone or after the events of a branch
    if fork and len(log.events) > kept:
        number = 1
        while (aside := path.with_name(f"schedule-forked-{number}.jsonl")).exists():
            number += 1
        log.fork(kept, aside)
    return log


def last_step(metrics: Path) -> int:
    """The last step on record, which no event may change any more; 0 if there is none."""
    return recorded_step(metrics) if metrics.exists() else 0


def _taken_over(events: list[Event], own: Event) -> list[Event]:
    theirs = [event.weights for event in events if event.origin == "recipe"][-1]
    return events if theirs == own.weights else [*events, own]
