"""Which checkpoints are deleted, and which never: the last k, every n-th, pinned ones, the one just verified."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
import uuid
from collections.abc import Collection
from pathlib import Path

from lmtrain.checkpoint.commit import committed, verify, write_file
from lmtrain.checkpoint.manifest import Hasher, canonical, step_of
from lmtrain.checkpoint.storage import LocalStorage, Storage
from lmtrain.errors import DataError, StorageError

_PIN = ".pin-"


def pin(path: Path, by: str, storage: Storage | None = None) -> None:
    """Keep checkpoint ``path`` for ever because ``by`` (a run folder) branched from it. Raises StorageError.

    One file per pair, beside the checkpoint, made by a rename: two runs that branch at once do not race.
    """
    storage = storage or LocalStorage()
    target = _pin_path(path, by)
    temporary = target.with_name(f"{_PIN}{uuid.uuid4().hex}")
    content = canonical({"format_version": 1, "checkpoint": path.name, "by": by, "created_unix": int(time.time())})
    try:
        write_file(storage, temporary, [content], Hasher("blake2b", hashlib.blake2b))
        storage.rename(temporary, target)
        storage.fsync_dir(path.parent)
    except OSError as error:
        raise StorageError(f"{path} cannot be pinned: {error.strerror or error}") from error


def unpin(path: Path, by: str, storage: Storage | None = None) -> None:
    """Take back what ``pin`` did; nothing if there was no such pin."""
    with contextlib.suppress(FileNotFoundError):
        (storage or LocalStorage()).remove(_pin_path(path, by))


def _pin_path(path: Path, by: str) -> Path:
    return path.with_name(f"{path.name}{_PIN}{hashlib.blake2b(by.encode(), digest_size=8).hexdigest()}.json")


def pinned_by(path: Path, storage: Storage | None = None) -> list[str]:
    """The runs that pin checkpoint ``path``; a pin that cannot be read still pins."""
    storage = storage or LocalStorage()
    runs = []
    for name in storage.listdir(path.parent):
        if name.startswith(path.name + _PIN):
            try:
                runs.append(str(json.loads(storage.read(path.parent / name))["by"]))
            except (ValueError, KeyError, TypeError):
                runs.append("?")
    return runs


def retain(
    storage: Storage,
    root: Path,
    hasher: Hasher,
    *,
    keep_last: int,
    keep_every: int,
    protected: Collection[Path],
) -> list[Path]:
    """Delete the checkpoints under ``root`` that nothing keeps; returns them. Never call it while a save is written.

    A checkpoint that is visibly broken does not count as one of the last ``keep_last``.
    """
    deleted = []
    good = 0
    for path in committed(storage, root):
        step = step_of(path.name) or 0
        if good < keep_last:
            with contextlib.suppress(DataError):
                verify(storage, path, "size", hasher)
                good += 1
            continue
        if path in protected or (keep_every and step % keep_every == 0) or pinned_by(path, storage):
            continue
        doomed = root / f".del-{path.name}"
        if storage.exists(doomed):
            storage.remove(doomed)
        # the rename is on disk before the first file goes: a checkpoint is whole or hidden
        storage.rename(path, doomed)
        storage.fsync_dir(root)
        storage.remove(doomed)
        deleted.append(path)
    return deleted
