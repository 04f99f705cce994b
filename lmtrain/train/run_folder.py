"""The folder of a run: recipe, environment, attempts, exits, and what a person drops in to stop or save."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from lmtrain.errors import DataError, StorageError, UsageError
from lmtrain.train.environment import redact

FORMAT_VERSION = 1
SHOWN_DIFFERENCES = 5


class RunFolder:
    """Creates ``path`` (mode 0700) if need be. Rank 0 writes, holding the run's lock; a refusing disk: StorageError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.control = path / "control"
        self.metrics = path / "metrics.jsonl"
        self.attempt = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(mode=0o700, exist_ok=True)
            self.control.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise StorageError(f"run.dir {path}: cannot be created: {error.strerror}") from error

    def keep_recipe(self, text: str, parse: Callable[[str], Mapping[str, Any]]) -> None:
        """Writes recipe.yaml at the run's start; afterwards UsageError unless ``text`` says the same as the file."""
        target, text = self.path / "recipe.yaml", redact(text)
        if not target.exists():
            _write_whole(target, text)
            return
        different = differences(parse(target.read_text(encoding="utf-8")), parse(text))
        if different:
            more = len(different) - SHOWN_DIFFERENCES
            shown = "; ".join(different[:SHOWN_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
            raise UsageError(
                f"{target}: this folder holds a run of another recipe: {shown} (old -> new). Give the new run its own "
                f"run.dir (with branch_from={self.path} to continue from its state), or start with this file as recipe="
            )

    def begin(self, environment: Mapping[str, Any]) -> int:
        """Starts an attempt: writes environment.json and returns the attempt's number, from 1.

        It grows also over attempts that were killed, since the number is durable before the attempt does anything.
        """
        past = [row["attempt"] for row in self.exits()]
        self.attempt = max([0, *past, (self.environment() or {}).get("attempt", 0)]) + 1
        record = {"format_version": FORMAT_VERSION, "attempt": self.attempt, "time_unix": time.time(), **environment}
        _write_whole(self.path / "environment.json", json.dumps(record, indent=2) + "\n")
        return self.attempt

    def environment(self) -> dict[str, Any] | None:
        """environment.json of the newest attempt, None before the first; DataError if it is damaged."""
        source = self.path / "environment.json"
        try:
            return dict(json.loads(source.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise DataError(f"{source}: damaged ({error}); move it away to go on") from error

    def exited(self, step: int, code: int, reason: str) -> None:
        """Appends to exits.jsonl, durably, how this attempt ended after ``step``: the verdict of the run."""
        row = {
            "format_version": FORMAT_VERSION,
            "attempt": self.attempt,
            "step": step,
            "code": code,
            "reason": redact(" ".join(reason.split())),
            "time_unix": time.time(),
        }
        target = self.path / "exits.jsonl"
        try:
            with open(target, "a+b", buffering=0, opener=_private) as file:
                # Half a line of an earlier crash must not swallow this one.
                end = file.seek(0, os.SEEK_END)
                torn = end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n"
                file.write((b"\n" if torn else b"") + json.dumps(row).encode() + b"\n")
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(f"{target}: {error.strerror}") from error

    def exits(self) -> list[dict[str, Any]]:
        """The rows of exits.jsonl, oldest first; a line torn by a crash is skipped."""
        rows = []
        source = self.path / "exits.jsonl"
        for line in source.read_text(encoding="utf-8").splitlines() if source.exists() else []:
            try:
                rows.append(dict(json.loads(line)))
            except ValueError:
                continue
        return rows

    def requested_stop(self) -> bool:
        """Whether someone made the file ``control/stop``: save, then end with 75."""
        return (self.control / "stop").exists()

    def requested_save(self) -> bool:
        """Whether someone made the file ``control/save``: make a checkpoint and go on."""
        return (self.control / "save").exists()

    def honoured(self, request: Literal["stop", "save"]) -> None:
        """Removes the request, once its checkpoint is committed (a crash in between leaves it to the next attempt)."""
        (self.control / request).unlink(missing_ok=True)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """``dotted.key: old -> new`` for each leaf in which two nested mappings differ, in order of key."""
    found = []
    for key in sorted(old.keys() | new.keys(), key=str):
        name, before, after = f"{prefix}{key}", old.get(key, "absent"), new.get(key, "absent")
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{name}.")
        elif before != after:
            found.append(f"{name}: {before} -> {after}")
    return found


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _write_whole(target: Path, text: str) -> None:
    """Readers, and a crash, see the old content or all of the new."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        with open(partial, "w", encoding="utf-8", opener=_private) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise StorageError(f"{target}: {error.strerror}") from error
