"""The mixture over time: an append-only list of events, from which the order of all data follows.

``schedule.jsonl``: one JSON object per line (docs/formats.md). A run with a fixed mixture has one event, at block 0.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from lmtrain.data.order.weights import integer_weights
from lmtrain.data.store.store import sync_folder
from lmtrain.errors import DataError, StorageError, UsageError

FORMAT_VERSION = 3
ORDER_VERSION = 1
"""Which order sample k is computed by; any change of word, permutation or keys must raise it."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AddedSource:
    """A source that came during the run: the folder or store at ``path``, or the function ``synthetic`` with its
    ``arguments``. digest: of what names its content (``sources.content_digest``), or of the first documents that the
    function makes (``DocumentFunction.digest``), hex.
    """

    path: str | None
    digest: str
    synthetic: str | None = None
    arguments: dict[str, int | float | str | bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.path is None) == (self.synthetic is None):
            raise ValueError("an added source has a path or is synthetic, one of them")

    @property
    def origin(self) -> str:
        """Where it comes from, in words."""
        given = ", ".join(f"{name}={value}" for name, value in self.arguments.items())
        return self.path or f"{self.synthetic}({given})"


@dataclass(frozen=True)
class Event:
    """What changes from block ``first_block`` on.

    origin: recipe, policy or user. weights: positive integers by source name, in the proportion of which sources are
    read (one not named is not read); empty: as before. skip: so many blocks are passed over unread; they count as
    consumed. sources: new ones by name; they get the next ids. step: the optimizer steps done when it was made.
    """

    first_block: int
    origin: str
    reason: str
    weights: dict[str, int] = field(default_factory=dict)
    skip: int = 0
    sources: dict[str, AddedSource] = field(default_factory=dict)
    step: int = 0


class ScheduleLog:
    """The events of a run in the order they were made. ``path`` None: in memory only (a dry run, a test).

    They take effect in the order of ``first_block``, those at one block in the order they were made.
    """

    def __init__(self, events: Sequence[Event] = (), path: Path | None = None) -> None:
        self.path = path
        self._events: list[Event] = []
        self._added: set[str] = set()
        for event in events:
            self._accept(event)

    @property
    def events(self) -> tuple[Event, ...]:
        """All of them, in the order they were made."""
        return tuple(self._events)

    @classmethod
    def fixed(cls, weights: Mapping[str, float]) -> ScheduleLog:
        """A log in memory with one event: the recipe's mixture, from block 0."""
        return cls((recipe_event(weights),))

    @classmethod
    def create(cls, path: Path, events: Sequence[Event]) -> ScheduleLog:
        """A new log of ``events``, on disk whole or not at all. Raises ValueError for no such list, StorageError."""
        if path.exists():
            raise StorageError(f"{path}: there is a schedule log already; move it away, or choose another folder")
        log = cls(events, path)
        try:
            _write_whole(path, log.events)
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}") from error
        return log

    @classmethod
    def open(cls, path: str | Path, weights: Mapping[str, float]) -> ScheduleLog:
        """The log at ``path``; begun with the recipe's mixture if there is none. Called by the one writer of a run.

        Raises UsageError if the recipe's newest event has other weights: the order of a run cannot change behind its
        back.
        """
        path = Path(path)
        first = recipe_event(weights)
        existing = cls.read(path) if path.exists() else cls(path=path)
        if not existing.events:
            existing.append(first)
        began = [event.weights for event in existing.events if event.origin == "recipe"][-1:]
        if began != [first.weights]:
            raise UsageError(
                f"{path}: this run began with weights {began[0] if began else 'none'}, the recipe now gives "
                f"{first.weights}; restore data.sources.*.weight, start a new run, or change the mixture of this one: "
                "python launch/schedule.py set"
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
                result._accept(parse_event(json.loads(line)))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(f"{path}:{number}: not a schedule event: {error}") from None
        return result

    def append(self, event: Event) -> None:
        """Add ``event``; it is on disk when this returns. Raises ValueError if it cannot be one, StorageError."""
        self._accept(event)
        if self.path is None:
            return
        try:
            new = not self.path.exists()
            with open(self.path, "ab+") as file:
                _drop_torn_line(file)
                file.write(event_line(event))
                file.flush()
                os.fsync(file.fileno())
            if new:
                sync_folder(self.path.parent)
        except OSError as error:
            raise StorageError(f"{self.path}: {error.strerror}") from error

    def fork(self, count: int, aside: Path) -> None:
        """Forget all but the first ``count`` events; the file as it was is kept at ``aside``. Raises StorageError."""
        assert self.path is not None
        kept = self._events[:count]
        try:
            os.link(self.path, aside)
            _write_whole(self.path, kept)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be forked to {aside}: {error.strerror}") from error
        self._events, self._added = kept, {name for event in kept for name in event.sources}

    def _accept(self, event: Event) -> None:
        if any(weight <= 0 for weight in event.weights.values()):
            raise ValueError(f"weights must be positive integers, got {event.weights}")
        if event.skip < 0:
            raise ValueError(f"skip must not be negative, got {event.skip}")
        if not (event.weights or event.skip or event.sources):
            raise ValueError("an event must change weights, skip blocks or add sources")
        if not self._events and (event.first_block != 0 or not event.weights):
            raise ValueError(f"the first event must give weights from block 0, got block {event.first_block}")
        if event.first_block < 0:
            raise ValueError(f"first_block must not be negative, got {event.first_block}")
        if again := self._added & event.sources.keys():
            raise ValueError(f"source {min(again)} was added before; an added source keeps its data")
        self._added |= event.sources.keys()
        self._events.append(event)


def recipe_event(weights: Mapping[str, float], first_block: int = 0, step: int = 0) -> Event:
    """The recipe's mixture as an event."""
    return Event(first_block, "recipe", "data.sources.*.weight", integer_weights(weights), step=step)


def event_line(event: Event) -> bytes:
    """The line of ``schedule.jsonl`` that says ``event``."""
    return json.dumps(event_row(event)).encode() + b"\n"


def event_row(event: Event) -> dict[str, Any]:
    """``event`` as JSON knows it."""
    return {"format_version": FORMAT_VERSION, "order_version": ORDER_VERSION, **asdict(event)}


def parse_event(row: Mapping[str, Any]) -> Event:
    """The event of ``event_row``, or of an older version. ValueError, KeyError or TypeError if it is none."""
    version = row["format_version"]
    if version > FORMAT_VERSION or row["order_version"] != ORDER_VERSION:
        versions = f"format {version}, order {row['order_version']}"
        raise ValueError(f"{versions}, this version of lmtrain reads up to {FORMAT_VERSION} and {ORDER_VERSION}")
    weights = {str(name): int(weight) for name, weight in row["weights"].items()}
    place = (int(row["first_block"]), str(row["origin"]), str(row["reason"]), weights)
    if version == 1:
        return Event(*place)
    sources = {str(name): AddedSource(**source) for name, source in row["sources"].items()}
    return Event(*place, int(row["skip"]), sources, int(row["step"]))


def _write_whole(path: Path, events: Sequence[Event]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(b"".join(map(event_line, events)))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def _drop_torn_line(file: BinaryIO) -> None:
    """Cut an unfinished last line, or the next event would be glued to it."""
    if file.seek(0, os.SEEK_END) == 0:
        return
    file.seek(-1, os.SEEK_END)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
