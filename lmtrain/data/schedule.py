"""The mixture over time: an append-only list of events, from which the order of all data follows.

``schedule.jsonl``: one JSON object per line (docs/formats.md). A run with a fixed mixture has one event, at block 0.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from lmtrain.errors import DataError, UsageError

FORMAT_VERSION = 1
ORDER_VERSION = 1
"""Which order sample k is computed by; any change of word, permutation or keys must raise it."""
PERIOD, FINE_PERIOD = 1 << 16, 1 << 18
"""Sum of the integer weights; the fine one where a share is below 1/1000 and would be rounded by more than 1 %."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """From block ``first_block`` on, sources are read in proportion to ``weights``.

    weights: positive integers by source name (a source not named is not read). origin: recipe, policy or user.
    """

    first_block: int
    weights: dict[str, int]
    origin: str
    reason: str


class ScheduleLog:
    """The events of a run, oldest first. ``path`` None: in memory only (a dry run, a test)."""

    def __init__(self, events: tuple[Event, ...] = (), path: Path | None = None) -> None:
        self.events: tuple[Event, ...] = ()
        self.path = path
        for event in events:
            self._accept(event)

    @classmethod
    def fixed(cls, weights: Mapping[str, float]) -> ScheduleLog:
        """A log in memory with one event: the recipe's mixture, from block 0."""
        return cls((_recipe_event(weights),))

    @classmethod
    def open(cls, path: str | Path, weights: Mapping[str, float]) -> ScheduleLog:
        """The log at ``path``; begun with the recipe's mixture if there is none. Called by the one writer of a run.

        Raises UsageError if the log began with other weights: the order of a run cannot change behind its back.
        """
        path = Path(path)
        first = _recipe_event(weights)
        existing = cls.read(path) if path.exists() else cls(path=path)
        if not existing.events:
            existing.append(first)
        elif existing.events[0].weights != first.weights:
            raise UsageError(
                f"{path}: this run began with weights {existing.events[0].weights}, the recipe now gives "
                f"{first.weights}; restore data.sources.*.weight or start a new run"
            )
        return existing

    @classmethod
    def read(cls, path: str | Path) -> ScheduleLog:
        """The events of a file. A last line without its newline (a crash while writing) is ignored, with a warning."""
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None
        whole, _, torn = data.rpartition(b"\n")
        if torn:
            log.warning("%s: ignoring a torn last line of %d bytes", path, len(torn))
        result = cls(path=Path(path))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                result._accept(_parse(line))
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}:{number}: not a schedule event: {error}") from None
        return result

    def append(self, event: Event) -> None:
        """Add ``event``; it is on disk when this returns. Raises ValueError if it is not later than the last one."""
        self._accept(event)
        if self.path is None:
            return
        line = json.dumps({"format_version": FORMAT_VERSION, "order_version": ORDER_VERSION, **asdict(event)})
        with open(self.path, "ab+") as file:
            _drop_torn_line(self.path, file.fileno())
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _accept(self, event: Event) -> None:
        if not event.weights or any(weight <= 0 for weight in event.weights.values()):
            raise ValueError(f"weights must be positive integers, got {event.weights}")
        if not self.events and event.first_block != 0:
            raise ValueError(f"the first event must be at block 0, got {event.first_block}")
        if self.events and event.first_block <= self.events[-1].first_block:
            raise ValueError(f"event at block {event.first_block} is not after block {self.events[-1].first_block}")
        self.events = (*self.events, event)


def integer_weights(weights: Mapping[str, float]) -> dict[str, int]:
    """Positive integers proportional to ``weights``, by largest remainder, each at least 1; zero weights are left out.

    They sum to 65536, or 262144 if a share is below 1/1000. Raises UsageError for negative, infinite or all-zero ones.
    """
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise UsageError(f"data.sources.{name}.weight: must be a finite number >= 0, got {weight}")
    total = math.fsum(weights.values())
    if total <= 0:
        raise UsageError(f"data.sources: the weights of {', '.join(weights) or 'no sources'} sum to 0")
    shares = {name: weight / total for name, weight in sorted(weights.items()) if weight > 0}
    period = FINE_PERIOD if min(shares.values()) < 1e-3 else PERIOD
    result = {name: max(int(share * period), 1) for name, share in shares.items()}
    # sorted() is stable, so that equal remainders go by name. What the minimum of 1 added is taken from the largest.
    by_remainder = sorted(shares, key=lambda name: shares[name] * period - result[name], reverse=True)
    missing = period - sum(result.values())
    for name in by_remainder[: max(missing, 0)]:
        result[name] += 1
    for _ in range(-missing):
        result[max(result, key=lambda name: result[name])] -= 1
    return result


def _recipe_event(weights: Mapping[str, float]) -> Event:
    return Event(0, integer_weights(weights), "recipe", "data.sources.*.weight")


def _parse(line: bytes) -> Event:
    row = json.loads(line)
    if row["format_version"] > FORMAT_VERSION or row["order_version"] != ORDER_VERSION:
        versions = f"format {row['format_version']}, order {row['order_version']}"
        raise ValueError(f"{versions}, this version of lmtrain reads {FORMAT_VERSION} and {ORDER_VERSION}")
    weights = {str(name): int(weight) for name, weight in row["weights"].items()}
    return Event(int(row["first_block"]), weights, str(row["origin"]), str(row["reason"]))


def _drop_torn_line(path: Path, handle: int) -> None:
    """Cut an unfinished last line, or the next event would be glued to it."""
    data = path.read_bytes()
    os.ftruncate(handle, data.rfind(b"\n") + 1)
