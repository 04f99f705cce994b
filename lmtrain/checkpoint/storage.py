"""The few file operations a checkpoint is made of, behind a protocol that tests record, block and break."""

from __future__ import annotations

import math
import os
import shutil
import uuid
from pathlib import Path
from typing import Protocol

from lmtrain.errors import StorageError

Bytes = bytes | bytearray | memoryview
SPACE_FACTOR = 1.2


class StorageFile(Protocol):
    """A new file open for writing."""

    def write(self, data: Bytes) -> None: ...
    def fsync(self) -> None: ...
    def close(self) -> None: ...


class Storage(Protocol):
    """A file system. Every method raises OSError when it is refused."""

    def mkdir(self, path: Path) -> None: ...  # exactly one new directory
    def create(self, path: Path) -> StorageFile: ...  # FileExistsError if it is there
    def fsync_dir(self, path: Path) -> None: ...
    def rename(self, source: Path, target: Path) -> None: ...
    def remove(self, path: Path) -> None: ...  # a file, or a directory with all it holds
    def listdir(self, path: Path) -> list[str]: ...
    def read(self, path: Path, offset: int = 0, size: int | None = None) -> bytearray: ...  # short at the end
    def exists(self, path: Path) -> bool: ...
    def is_dir(self, path: Path) -> bool: ...
    def size(self, path: Path) -> int: ...
    def free(self, path: Path) -> int: ...  # bytes this user may still write


class LocalFile:
    """A local file, created exclusively; ``close`` reports what the file system reports then (NFS: no space)."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "xb")  # noqa: SIM115 (closed by close)

    def write(self, data: Bytes) -> None:
        self._file.write(data)

    def fsync(self) -> None:
        # flush first: fsync before the buffer is empty is the bug of DCP's own writer
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class LocalStorage:
    """Any POSIX file system that all ranks see under the same path."""

    def mkdir(self, path: Path) -> None:
        os.mkdir(path)

    def create(self, path: Path) -> StorageFile:
        return LocalFile(path)

    def fsync_dir(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def remove(self, path: Path) -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            os.unlink(path)

    def listdir(self, path: Path) -> list[str]:
        return sorted(os.listdir(path))

    def read(self, path: Path, offset: int = 0, size: int | None = None) -> bytearray:
        with open(path, "rb") as file:
            file.seek(offset)
            if size is None:
                return bytearray(file.read())
            data = bytearray(size)
            # a buffered readinto loops over short reads; what is missing is the end of the file
            del data[file.readinto(data) :]
            return data

    def exists(self, path: Path) -> bool:
        return path.exists()

    def is_dir(self, path: Path) -> bool:
        return path.is_dir()

    def size(self, path: Path) -> int:
        return path.stat().st_size

    def free(self, path: Path) -> int:
        status = os.statvfs(path)
        return status.f_bavail * status.f_frsize


def check_space(directory: Path, needed: int, storage: Storage | None = None) -> None:
    """Raise StorageError unless ``directory`` has room for ``needed`` bytes and a fifth more."""
    free = (storage or LocalStorage()).free(directory)
    wanted = math.ceil(SPACE_FACTOR * needed)
    if free < wanted:
        raise StorageError(
            f"no space for a checkpoint in {directory}: need {wanted:,} bytes "
            f"({SPACE_FACTOR} x {needed:,}), free {free:,}"
        )


def probe_writable(directory: Path, storage: Storage | None = None) -> None:
    """Write, sync, rename and remove a small file; raise StorageError naming the path and the user if that fails."""
    storage = storage or LocalStorage()
    probe = directory / f".probe-{uuid.uuid4().hex}"
    try:
        file = storage.create(probe)
        try:
            file.write(b"probe")
            file.fsync()
        finally:
            file.close()
        renamed = probe.with_name(probe.name + "-renamed")
        storage.rename(probe, renamed)
        storage.remove(renamed)
    except OSError as error:
        raise StorageError(f"{directory} cannot be written by uid {os.getuid()}: {error.strerror or error}") from error
