"""How a checkpoint directory comes to exist all at once, and how one is verified (stdlib only).

Order of a save: ``begin`` makes ``.tmp-<step>-<start_id>``; files are written with ``write_file`` (hashed while
written, synced); ``seal`` writes manifest.json, then COMMIT (the hash of the manifest), and syncs the directory;
``publish`` renames it to ``step-<step>`` and syncs the parent. So a directory of that name is complete, whatever
moment the power went, and every byte in it is covered by COMMIT.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal

from lmtrain.checkpoint.manifest import (
    COMMIT,
    FORMAT_VERSION,
    JSON,
    MANIFEST,
    FileRecord,
    Hasher,
    NewerFormatError,
    canonical,
    check_digest,
    commit_bytes,
    manifest_files,
    read_manifest,
    readable,
    step_of,
)
from lmtrain.checkpoint.storage import Bytes, Storage
from lmtrain.errors import DataError

QUARANTINE = "quarantine"
READ_BLOCK = 16 << 20

logger = logging.getLogger(__name__)


def committed(storage: Storage, root: Path) -> list[Path]:
    """Directories ``step-*`` under ``root``, newest (by integer step) first; verified or not."""
    names = storage.listdir(root) if storage.is_dir(root) else []
    steps = {name: step for name in names if (step := step_of(name)) is not None and storage.is_dir(root / name)}
    return [root / name for name in sorted(steps, key=steps.__getitem__, reverse=True)]


# ---------------------------------------------------------------------------------------------------- writing


def begin(storage: Storage, root: Path, step: int, start_id: str) -> Path:
    """A fresh directory to write ``step`` into; makes ``root`` if this is its first checkpoint."""
    if not storage.exists(root):
        storage.mkdir(root)
        storage.fsync_dir(root.parent)
    path = root / f".tmp-{step:08d}-{start_id}"
    if storage.exists(path):
        storage.remove(path)
    storage.mkdir(path)
    return path


def write_file(storage: Storage, path: Path, chunks: Iterable[Bytes], hasher: Hasher) -> FileRecord:
    """Write a new file, hashing on the way, and sync it."""
    digest, count = hasher.new(), 0
    file = storage.create(path)
    try:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            count += memoryview(chunk).nbytes
        file.fsync()
    finally:
        file.close()
    return FileRecord(count, digest.hexdigest())


def seal(
    storage: Storage, path: Path, step: int, facts: Mapping[str, JSON], files: Mapping[str, FileRecord], hasher: Hasher
) -> None:
    """Write manifest.json (``facts`` and what is known of ``files``) and COMMIT, and sync the directory."""
    listed = {name: {"bytes": record.bytes, hasher.name: record.digest} for name, record in files.items()}
    manifest = {**facts, "format_version": FORMAT_VERSION, "step": step, "files": listed}
    record = write_file(storage, path / MANIFEST, [canonical(manifest)], hasher)
    write_file(storage, path / COMMIT, [commit_bytes(step, record.digest, hasher)], hasher)
    storage.fsync_dir(path)


def publish(storage: Storage, path: Path, final: Path, check: Callable[[Path], None]) -> bool:
    """Make the sealed directory ``path`` visible as ``final``. False if a ``final`` that verifies was there and stays.

    ``check`` raises DataError for a checkpoint that does not verify; such a one moves to quarantine/.
    """
    root = final.parent
    if storage.exists(final):
        try:
            check(final)
        except DataError as error:
            logger.warning("%s does not verify and moves to %s/: %s", final, QUARANTINE, error)
            _quarantine(storage, final)
        else:
            storage.remove(path)
            return False
    storage.rename(path, final)
    storage.fsync_dir(root)
    return True


def _quarantine(storage: Storage, path: Path) -> None:
    place = path.parent / QUARANTINE
    if not storage.exists(place):
        storage.mkdir(place)
    taken = set(storage.listdir(place))
    name = next(name for n in range(len(taken) + 1) if (name := f"{path.name}-{n}") not in taken)
    storage.rename(path, place / name)
    storage.fsync_dir(place)


def remove_leftovers(storage: Storage, root: Path, start_id: str) -> list[str]:
    """Remove what dead starts left half written or half deleted. Only for the holder of the run's lock."""
    names = storage.listdir(root) if storage.is_dir(root) else []
    left = [n for n in names if n.startswith(".del-") or (n.startswith(".tmp-") and not n.endswith(f"-{start_id}"))]
    for name in left:
        storage.remove(root / name)
    return left


# ---------------------------------------------------------------------------------------------------- reading


def verify(
    storage: Storage,
    path: Path,
    mode: Literal["hash", "size"],
    hasher: Hasher,
    part: int = 0,
    parts: int = 1,
) -> None:
    """Raise DataError (which file, expected, got) unless ``path`` is a whole checkpoint that this version reads.

    COMMIT, manifest.json, the list of files and their sizes are always checked; of the files, ``hash`` reads all,
    ``size`` only the JSON ones. With ``parts`` > 1 this rank reads every ``parts``-th file.
    """
    with readable(path):
        files = manifest_files(read_manifest(storage, path, hasher), path, hasher)
        present = set(storage.listdir(path)) - {MANIFEST, COMMIT}
        for name in sorted(files.keys() ^ present):
            fault = "listed in manifest.json but missing" if name in files else "not listed in manifest.json"
            raise DataError(f"{path / name}: {fault}")
        for name, record in files.items():
            size = storage.size(path / name)
            if size != record.bytes:
                raise DataError(f"{path / name}: expected {record.bytes:,} bytes, got {size:,}")
        for name in sorted(files)[part::parts]:
            if mode == "hash" or name.endswith(".json"):
                digest = hasher.new()
                for offset in range(0, files[name].bytes, READ_BLOCK):
                    digest.update(storage.read(path / name, offset, READ_BLOCK))
                check_digest(path / name, files[name].digest, digest.hexdigest(), hasher)


def newest_verified(candidates: Iterable[Path], check: Callable[[Path], None]) -> Path | None:
    """The first candidate (newest first) that ``check`` does not refuse by DataError; one log line per refusal.

    Raises NewerFormatError: going back past an intact checkpoint silently would lose its work.
    """
    for path in candidates:
        try:
            check(path)
        except NewerFormatError:
            raise
        except DataError as error:
            logger.warning("checkpoint step %s does not verify: %s", step_of(path.name), error)
        else:
            return path
    return None
