"""The two files every other byte of a checkpoint is checked by: manifest.json and COMMIT (stdlib only)."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lmtrain.checkpoint.storage import Bytes, Storage
from lmtrain.errors import DataError

JSON = None | bool | int | float | str | Sequence[Any] | Mapping[str, Any]

FORMAT_VERSION = 1
MANIFEST, COMMIT = "manifest.json", "COMMIT"
_STEP = re.compile(r"step-(\d{8,})")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


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
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()


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


def commit_bytes(step: int, digest: str, hasher: Hasher) -> bytes:
    return canonical({"format_version": FORMAT_VERSION, "step": step, f"manifest_{hasher.name}": digest})


def read_manifest(storage: Storage, path: Path, hasher: Hasher) -> dict[str, Any]:
    """manifest.json, after its hash and every byte of COMMIT were checked. Raises DataError."""
    with readable(path):
        if not storage.exists(path / COMMIT):
            raise DataError(f"{path}: not a checkpoint (no {COMMIT})")
        raw_commit, raw_manifest = storage.read(path / COMMIT), storage.read(path / MANIFEST)
    claimed = _parse(raw_commit, path / COMMIT)
    if canonical(claimed) != raw_commit:
        raise DataError(f"{path / COMMIT}: damaged (not in canonical form)")
    got = hasher.of(raw_manifest)
    check_digest(path / MANIFEST, str(claimed.get(f"manifest_{hasher.name}")), got, hasher)
    manifest = _parse(raw_manifest, path / MANIFEST)
    version, step = manifest.get("format_version"), manifest.get("step")
    if isinstance(version, int) and version > FORMAT_VERSION and claimed.get("format_version") == version:
        raise NewerFormatError(
            f"{path}: written in checkpoint format {version} by a later lmtrain; this one reads up to "
            f"{FORMAT_VERSION}: upgrade, or name an older checkpoint by resume=PATH"
        )
    named = step_of(path.name)
    if version != FORMAT_VERSION or not isinstance(step, int) or raw_commit != commit_bytes(step, got, hasher):
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
        if (
            not isinstance(entry, dict)
            or type(entry.get("bytes")) is not int
            or not isinstance(entry.get(hasher.name), str)
        ):
            raise DataError(f"{path / MANIFEST}: files: {name}: expected bytes and {hasher.name}")
        records[name] = FileRecord(entry["bytes"], entry[hasher.name])
    return records


def read_json(storage: Storage, path: Path, record: FileRecord, hasher: Hasher) -> Any:
    """The content of a JSON file whose bytes are those of the manifest. Raises DataError."""
    with readable(path):
        raw = storage.read(path)
    check_digest(path, record.digest, hasher.of(raw), hasher)
    return _loads(raw, path)


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


def check_digest(path: Path, expected: str, got: str, hasher: Hasher) -> None:
    if got != expected:
        raise DataError(f"{path}: damaged: expected {hasher.name} {expected}, got {got}")


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{error.filename or path}: missing") from error
    except OSError as error:
        raise DataError(f"{error.filename or path}: cannot be read: {error.strerror or error}") from error
