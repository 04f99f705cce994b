"""How a checkpoint directory comes to exist all at once, and how one is verified (stdlib only).

Order of a save: ``begin`` makes ``.tmp-<step>-<start_id>``; files are written with ``write_file`` (hashed while
written, synced); ``seal`` writes manifest.json, then COMMIT (the hash of the manifest), and syncs the directory;
``publish`` renames it to ``step-<step>`` and syncs the parent. So a directory of that name is complete, whatever
moment the power went, and every byte in it is covered by COMMIT.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from lmtrain.checkpoint.storage import Bytes, Storage
from lmtrain.errors import DataError

JSON = None | bool | int | float | str | Sequence[Any] | Mapping[str, Any]

FORMAT_VERSION = 1
MANIFEST, COMMIT, QUARANTINE = "manifest.json", "COMMIT", "quarantine"
READ_BLOCK = 16 << 20
_STEP = re.compile(r"step-(\d{8,})")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")

logger = logging.getLogger(__name__)


class NewerFormatError(DataError):
    """A checkpoint of a later lmtrain: intact, but not ours to read, and not to be passed over for an older one."""


class Digest(Protocol):
    def update(self, data: Bytes, /) -> object: ...
    def hexdigest(self) -> str: ...


@dataclass(frozen=True)
class Hasher:
    """A hash function and the name its digests have in the JSON files."""

    name: str
    new: Callable[[], Digest]

    def of(self, data: Bytes) -> str:
        digest = self.new()
        digest.update(data)
        return digest.hexdigest()


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says of a file."""

    bytes: int
    digest: str


def canonical(value: JSON) -> bytes:
    """The one byte string that stands for ``value``. Raises TypeError for what JSON would change silently."""
    _check_keys(value)
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


def _check_keys(value: object) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError(f"a JSON document has text keys only, got {key!r}")
            _check_keys(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_keys(inner)


def directory_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a committed directory's name, None for any other name."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


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
    write_file(storage, path / COMMIT, [_commit_bytes(step, record.digest, hasher)], hasher)
    storage.fsync_dir(path)


def _commit_bytes(step: int, digest: str, hasher: Hasher) -> bytes:
    return canonical({"format_version": FORMAT_VERSION, "step": step, f"manifest_{hasher.name}": digest})


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
    with _oserror_as_dataerror(path):
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
                _check_digest(path / name, files[name].digest, digest.hexdigest(), hasher)


def read_manifest(storage: Storage, path: Path, hasher: Hasher) -> dict[str, Any]:
    """manifest.json, after its hash and every byte of COMMIT were checked. Raises DataError."""
    with _oserror_as_dataerror(path):
        if not storage.exists(path / COMMIT):
            raise DataError(f"{path}: not a checkpoint (no {COMMIT})")
        raw_commit, raw_manifest = storage.read(path / COMMIT), storage.read(path / MANIFEST)
    claimed = _parse(raw_commit, path / COMMIT)
    if canonical(claimed) != raw_commit:
        raise DataError(f"{path / COMMIT}: damaged (not in canonical form)")
    got = hasher.of(raw_manifest)
    _check_digest(path / MANIFEST, str(claimed.get(f"manifest_{hasher.name}")), got, hasher)
    manifest = _parse(raw_manifest, path / MANIFEST)
    version, step = manifest.get("format_version"), manifest.get("step")
    if isinstance(version, int) and version > FORMAT_VERSION and claimed.get("format_version") == version:
        raise NewerFormatError(
            f"{path}: written in checkpoint format {version} by a later lmtrain; this one reads up to {FORMAT_VERSION}: "
            f"upgrade, or name an older checkpoint by resume=PATH"
        )
    named = step_of(path.name)
    if version != FORMAT_VERSION or not isinstance(step, int) or raw_commit != _commit_bytes(step, got, hasher):
        raise DataError(f"{path / COMMIT}: damaged (expected what manifest.json says, got {bytes(raw_commit)!r})")
    if named is not None and named != step:
        raise DataError(f"{path}: the directory says step {named}, manifest.json says {step}")
    return manifest


def manifest_files(manifest: Mapping[str, Any], path: Path, hasher: Hasher) -> dict[str, FileRecord]:
    """The manifest's list of files; raises DataError if it is not one."""
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise DataError(f"{path / MANIFEST}: files: expected an object")
    records = {}
    for name, entry in files.items():
        # a name is a file of this directory and nothing else: no separator, no leading dot
        if not _PLAIN_NAME.fullmatch(name):
            raise DataError(f"{path / MANIFEST}: files: {name!r} is not a plain file name")
        if not isinstance(entry, dict) or type(entry.get("bytes")) is not int or not isinstance(entry.get(hasher.name), str):
            raise DataError(f"{path / MANIFEST}: files: {name}: expected bytes and {hasher.name}")
        records[name] = FileRecord(entry["bytes"], entry[hasher.name])
    return records


def read_json(storage: Storage, path: Path, record: FileRecord, hasher: Hasher) -> Any:
    """The content of a JSON file whose bytes are those of the manifest. Raises DataError."""
    with _oserror_as_dataerror(path):
        raw = storage.read(path)
    _check_digest(path, record.digest, hasher.of(raw), hasher)
    return _loads(raw, path)


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


def _parse(raw: bytearray, path: Path) -> dict[str, Any]:
    value = _loads(raw, path)
    if not isinstance(value, dict):
        raise DataError(f"{path}: damaged (expected a JSON object)")
    return value


def _loads(raw: bytearray, path: Path) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: damaged (not JSON: {error})") from error


def _check_digest(path: Path, expected: str, got: str, hasher: Hasher) -> None:
    if got != expected:
        raise DataError(f"{path}: damaged: expected {hasher.name} {expected}, got {got}")


@contextlib.contextmanager
def _oserror_as_dataerror(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{error.filename or path}: missing") from error
    except OSError as error:
        raise DataError(f"{error.filename or path}: cannot be read: {error.strerror or error}") from error
