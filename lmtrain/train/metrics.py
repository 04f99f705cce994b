"""metrics.jsonl, the record of a run: appended row by row, read back without dead timelines (docs/formats.md)."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from lmtrain.errors import DataError, StorageError

FORMAT_VERSION = 1
STEP_KEYS = frozenset(
    {"loss", "grad_norm", "lr", "tokens_per_second", "mfu", "memory_bytes", "data_wait_seconds", "token_hash"}
)
"""What every row of kind ``step`` has besides ``kind step tokens attempt``."""


class MetricsLog:
    """Appends rows to metrics.jsonl; one writer (rank 0, under the run's lock). Errors of the disk are StorageErrors.

    Opening writes a row of kind ``attempt``: format version, attempt, the step and tokens it starts from, and the last
    step that is ``recorded``, which it takes again up to there. Rows of earlier attempts beyond its start are thereby a
    dead timeline. A line torn by a crash is cut off first.
    """

    def __init__(self, path: Path, attempt: int, step: int, tokens: int, recorded: int = 0) -> None:
        self.path, self.attempt = path, attempt
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            _cut_torn_line(self._fd)
        except OSError as error:
            raise StorageError(f"{path}: cannot be written: {error.strerror}") from error
        start = {"format_version": FORMAT_VERSION, "time_unix": time.time(), "recorded": recorded}
        self._append("attempt", step, tokens, start)
        self.fsync()

    def step(self, step: int, tokens: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Appends the row of a finished optimizer step and returns it. ``values`` has all STEP_KEYS, and may have
        ``source_loss.NAME``, ``router_load.PLACE`` and ``skipped``; numbers are plain Python numbers."""
        if missing := STEP_KEYS - values.keys():
            raise ValueError(f"metrics row without {sorted(missing)}")
        return self._append("step", step, tokens, values)

    def evaluation(self, step: int, tokens: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Appends the row of an evaluation after ``step``: ``heldout_bpb`` and ``heldout_bpb.NAME``; returns it."""
        if "heldout_bpb" not in values:
            raise ValueError("evaluation row without heldout_bpb")
        return self._append("eval", step, tokens, values)

    def fsync(self) -> None:
        """Makes all rows durable; call it before a checkpoint commits."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise StorageError(f"{self.path}: fsync: {error.strerror}") from error

    def close(self) -> None:
        """Closes the file; rows are durable afterwards."""
        self.fsync()
        os.close(self._fd)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _append(self, kind: str, step: int, tokens: int, values: Mapping[str, Any]) -> dict[str, Any]:
        row = {"kind": kind, "step": step, "tokens": tokens, "attempt": self.attempt}
        finite = {key: _finite(value) for key, value in values.items()}
        row.update(finite)
        if finite != dict(values):
            row["nonfinite"] = True
        line = (json.dumps(row, allow_nan=False, separators=(",", ":")) + "\n").encode()
        try:
            written = os.write(self._fd, line)
        except OSError as error:
            raise StorageError(f"{self.path}: {error.strerror}") from error
        if written != len(line):
            raise StorageError(f"{self.path}: only {written} of {len(line)} bytes written; is the disk full?")
        return row


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of kind ``step`` and ``eval`` of the timeline that leads to the run's present, in order of step.

    A row of a newer attempt ends the older attempts beyond its step; of two rows of one kind and step the newest
    attempt's counts; rows of an attempt that was already superseded are dropped. A torn last line is skipped.
    DataError for a damaged line elsewhere or a newer format. Reads line by line: memory is that of the result.
    """
    rows: list[dict[str, Any]] = []
    newest = 0
    for row in _rows(path):
        if row["attempt"] > newest:
            newest = row["attempt"]
            while rows and rows[-1]["step"] > row["step"]:
                rows.pop()
        if row["kind"] != "attempt":
            _supersede(rows, row)
            rows.append(row)
    return rows


def recorded_step(path: Path) -> int:
    """The last step on record since the run began or was forked, 0 if there is none. Raises as ``read_metrics``.

    What a crashed attempt recorded counts, also where the next ones ended before they had read it again.
    """
    last = 0
    for row in _rows(path):
        if row["kind"] == "attempt":
            last = max(row["step"], row.get("recorded", 0))
        elif row["kind"] == "step":
            last = max(last, row["step"])
    return last


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """All rows but those of an attempt that was already superseded, and a torn last line."""
    newest = 0
    with open(path, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith("\n"):
                break
            row = _parse(line, f"{path}:{number}")
            newest = max(newest, row["attempt"])
            if row["attempt"] == newest:
                yield row


def _supersede(rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    """Removes an earlier row of the same kind and step (an evaluation repeated by a resumed run)."""
    at = len(rows) - 1
    while at >= 0 and rows[at]["step"] == row["step"]:
        if rows[at]["kind"] == row["kind"]:
            del rows[at]
        at -= 1


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        version = row.get("format_version", FORMAT_VERSION)
        if version > FORMAT_VERSION:
            raise DataError(f"{where}: format_version {version}; this lmtrain reads up to {FORMAT_VERSION}")
        if {"kind", "step", "tokens", "attempt"} <= row.keys():
            return dict(row)
    except (json.JSONDecodeError, AttributeError, TypeError):
        pass
    raise DataError(f"{where}: not a metrics row: {line[:80]!r}")


def _finite(value: Any) -> Any:
    """``value`` with every non-finite float, also within lists, replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return [_finite(item) for item in value] if isinstance(value, list) else value


def _cut_torn_line(fd: int) -> None:
    """Truncates to the end of the last whole line: a new row must not be glued to half of an old one."""
    end = os.fstat(fd).st_size
    position = end
    while position > 0:
        start = max(0, position - 65536)
        newline = os.pread(fd, position - start, start).rfind(b"\n")
        if newline >= 0:
            position = start + newline + 1
            break
        position = start
    if position != end:
        os.ftruncate(fd, position)
