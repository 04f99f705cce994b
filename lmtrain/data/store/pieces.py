"""Digests of a file in pieces of 64 MiB: damage is located, and a reader checks only what it reads."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import xxhash

from lmtrain.errors import DataError

PIECE = 1 << 26
WHAT_NOW = "restore the file from a copy, or prepare the data again; then python launch/prepare.py verify FOLDER"
"""What to do about a damaged file."""
_READ = 1 << 20  # stays in the processor's cache between the copy and the hash


def digests(path: str | os.PathLike[str]) -> tuple[str, list[str]]:
    """xxh3-128, hex: of the whole file, and of each of its pieces; one pass."""
    whole, pieces = xxhash.xxh3_128(), []
    for start in range(0, os.path.getsize(path), PIECE):
        piece = xxhash.xxh3_128()
        for part in _parts(path, start):
            piece.update(part)
            whole.update(part)
        pieces.append(piece.hexdigest())
    return whole.hexdigest(), pieces


class PieceCheck:
    """Compares each piece of ``path`` with its digest before a byte of it is used: once per process and file.

    expected: xxh3-128, hex, per piece. Raises DataError naming the piece.
    """

    def __init__(self, path: str | os.PathLike[str], expected: Sequence[str]) -> None:
        self.path = path
        self.expected = expected
        if len(expected) != -(-os.path.getsize(path) // PIECE):
            raise DataError(
                f"{path}: {os.path.getsize(path):,} bytes, the manifest has {len(expected)} digests of it; {WHAT_NOW}"
            )
        self._unread = bytearray(b"\1") * len(expected)

    def __call__(self, start: int, stop: int) -> None:
        """Check the pieces that hold the bytes ``[start, stop)``."""
        for piece in range(start // PIECE, -(-stop // PIECE)):
            if self._unread[piece]:
                self._check(piece)

    def all(self) -> None:
        """Check every piece."""
        self(0, len(self.expected) * PIECE)

    def _check(self, piece: int) -> None:
        found = xxhash.xxh3_128()
        for part in _parts(self.path, piece * PIECE):
            found.update(part)
        if found.hexdigest() != self.expected[piece]:
            raise DataError(
                f"{self.path}: expected xxh3-128 {self.expected[piece]} of piece {piece} (64 MiB from byte "
                f"{piece * PIECE:,}), found {found.hexdigest()}; {WHAT_NOW}"
            )
        self._unread[piece] = 0


def _parts(path: str | os.PathLike[str], start: int) -> Iterator[memoryview]:
    """The piece from byte ``start``, in parts of one buffer that the next part overwrites."""
    buffer = memoryview(bytearray(_READ))
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        for _ in range(PIECE // _READ):
            size = file.readinto(buffer)
            yield buffer[:size]
