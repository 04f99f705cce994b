"""The ``.idx`` of Megatron-LM's indexed dataset, version 1 (docs/formats.md): read, checked, written.

A small one is read and checked whole at open. A large one is mapped: its header and its ends are checked at open, every
entry when it is used, everything by ``check``.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.store.borders import Borders, KnownBorders, SearchedBorders
from lmtrain.data.store.pieces import WHAT_NOW, PieceCheck
from lmtrain.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
OLD_MAGIC = b"TNTIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {code: np.dtype(name) for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()}
"""Codes 6 and 7 are missing on purpose: Megatron and GPT-NeoX disagree on which of them is float32."""
WHOLE = 64 << 20
"""Bytes up to which an index is read and checked whole at open; three million documents, some 30 ms."""
_STEP = 1 << 20  # entries handled at once
_INT64 = struct.Struct("<q")


class Index:
    """An index in ``data``, of the file ``path``. Header and size are checked here; raises DataError naming the field.

    dtype: of the tokens. num_sequences, num_documents, num_tokens: counts, the last by the last entry.
    """

    def __init__(self, data: bytes | mmap.mmap, path: str) -> None:
        self.path = path
        self._data = data
        if data[: len(OLD_MAGIC)] == OLD_MAGIC:
            raise DataError(f"{path}: an old TNTIDX (cached/lazy) index; convert it with Megatron-LM's tools")
        if data[: len(MAGIC)] != MAGIC or len(data) < HEADER.size:
            raise DataError(f"{path}: not a Megatron index: expected magic {MAGIC!r}, found {data[:9]!r}")
        _, version, code, self.num_sequences, borders = HEADER.unpack_from(data)
        if version != 1:
            raise DataError(f"{path}: index version {version}, only 1 is known")
        if code not in DTYPES:
            raise DataError(f"{path}: token dtype code {code}; known: {', '.join(map(str, DTYPES))}")
        self.dtype = DTYPES[code]
        expected = HEADER.size + 12 * self.num_sequences + 8 * borders
        modes = expected + self.num_sequences  # one byte per sequence in multimodal sets; not read
        if len(data) not in (expected, modes):
            raise DataError(
                f"{path}: expected {expected:,} bytes for {self.num_sequences:,} sequences, found {len(data):,}; "
                f"{WHAT_NOW}"
            )
        self.num_documents = borders - 1
        self._offsets_at = HEADER.size + 4 * self.num_sequences
        self._documents_at = self._offsets_at + 8 * self.num_sequences
        # Unaligned views: numpy reads them, at the price of a copy of what is computed with.
        self._lengths = np.frombuffer(data, "<i4", self.num_sequences, HEADER.size)
        self._offsets = np.frombuffer(data, "<i8", self.num_sequences, self._offsets_at)
        self._documents = np.frombuffer(data, "<i8", borders, self._documents_at)
        if borders < 1 or self._documents[0] != 0 or self._documents[-1] != self.num_sequences:
            raise DataError(f"{path}: the document array must rise from 0 to {self.num_sequences}")
        self.num_tokens = 0
        if self.num_sequences:
            self.num_tokens = int(self._offsets[-1]) // self.dtype.itemsize + int(self._lengths[-1])

    @classmethod
    def open(cls, path: str) -> Index:
        """The index of the file ``path``: read if it is small, else mapped."""
        try:
            if os.path.getsize(path) <= WHOLE:
                return cls(Path(path).read_bytes(), path)
            with open(path, "rb") as file:
                return cls(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), path)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None

    @property
    def one_each(self) -> bool:
        """Whether every document is one sequence, as all builders but those of sentence-split data write it."""
        return self.num_documents == self.num_sequences

    def borders(self, pieces: Sequence[str] = ()) -> Borders:
        """Where documents start: all of them, checked, or of a large index as they are asked for.

        pieces: digests of the 64 MiB pieces of a large one (pieces.py), each compared when it is first read.
        """
        if len(self._data) > WHOLE:
            return _MappedBorders(self, PieceCheck(self.path, pieces) if pieces else None)
        self.check()
        ends = np.append(self._offsets // self.dtype.itemsize, self.num_tokens)
        return KnownBorders(ends[self._documents])

    def check(self) -> None:
        """Check every entry, in O(1) memory; raises DataError for the first that is wrong."""
        self.check_sequences(0, self.num_sequences)
        for start in range(0, self.num_documents, _STEP):
            self.check_documents(start, min(start + _STEP, self.num_documents) + 1)

    def check_sequences(self, first: int, stop: int) -> None:
        """Check lengths and offsets of the sequences ``[first, stop)`` against each other."""
        end = int(self._offsets[first]) if first < stop and first else 0
        for start in range(first, stop, _STEP):
            lengths = self._lengths[start : min(start + _STEP, stop)].astype(np.int64)
            if (lengths < 0).any():
                raise DataError(f"{self.path}: sequence {start + int(np.argmax(lengths < 0))} has a negative length")
            ends = end + np.cumsum(lengths) * self.dtype.itemsize
            wrong = self._offsets[start : start + len(lengths)] != ends - lengths * self.dtype.itemsize
            if wrong.any():
                raise DataError(
                    f"{self.path}: the byte offset of sequence {start + int(np.argmax(wrong))} does not follow from "
                    "the lengths"
                )
            end = int(ends[-1])

    def check_documents(self, first: int, stop: int) -> NDArray[np.int64]:
        """Check the entries ``[first, stop)`` of the document array; returns them."""
        documents = self._documents[first:stop].astype(np.int64)
        steps = np.diff(documents)
        if (steps < 0).any() or documents[0] < 0 or documents[-1] > self.num_sequences:
            raise DataError(f"{self.path}: the document array must rise from 0 to {self.num_sequences}")
        if self.one_each and (documents != np.arange(first, stop)).any():
            # As many documents as sequences, yet not one each: no builder writes this, a flipped byte does.
            wrong = max(int(np.argmax(documents != np.arange(first, stop))) - 1, 0)
            raise DataError(f"{self.path}: document {first + wrong} does not hold exactly one sequence")
        return documents


class _MappedBorders(SearchedBorders):
    """Borders of a large index. Offsets alone are searched; what is handed out is checked against its neighbours."""

    def __init__(self, index: Index, check: PieceCheck | None) -> None:
        self.index = index
        self._check = check
        self._read(0, HEADER.size)  # what was believed so far
        self._read(index._documents_at + 8 * index.num_documents, 8)

    @property
    def num_documents(self) -> int:
        return self.index.num_documents

    def start(self, j: int) -> int:
        index = self.index
        sequence = j if index.one_each else self._int64(index._documents_at + 8 * j)
        if sequence >= index.num_sequences:
            return index.num_tokens
        return self._int64(index._offsets_at + 8 * sequence) // index.dtype.itemsize

    def starts(self, first: int, stop: int) -> NDArray[np.int64]:
        index = self.index
        if stop <= first:
            return np.empty(0, dtype=np.int64)
        self._read(index._documents_at + 8 * first, 8 * (stop - first))
        documents = index.check_documents(first, stop)
        low, high = int(documents[0]), min(int(documents[-1]) + 1, index.num_sequences)
        self._read(HEADER.size + 4 * low, 4 * (high - low))
        self._read(index._offsets_at + 8 * low, 8 * (high - low))
        index.check_sequences(low, high)
        offsets = np.append(index._offsets[low:high] // index.dtype.itemsize, index.num_tokens)
        return offsets[documents - low]

    def _int64(self, at: int) -> int:
        self._read(at, 8)
        return int(_INT64.unpack_from(self.index._data, at)[0])

    def _read(self, at: int, size: int) -> None:
        if self._check is not None:
            self._check(at, at + size)


class IndexWriter:
    """Writes the index of one sequence per document into ``file``, open for reading and writing; O(1) memory."""

    def __init__(self, file: BinaryIO, dtype: np.dtype) -> None:
        self.file = file
        self.dtype = dtype
        self.num_documents = 0
        file.write(bytes(HEADER.size))  # the counts come last

    def add(self, lengths: NDArray[np.integer]) -> None:
        """Append documents of ``lengths`` tokens, integers ``[n]``."""
        self.file.write(lengths.astype("<i4").tobytes())
        self.num_documents += len(lengths)

    def finish(self) -> None:
        """Write offsets, the document array and the header."""
        count, end = self.num_documents, 0
        for start in range(0, count, _STEP):
            self.file.seek(HEADER.size + 4 * start)
            lengths = np.frombuffer(self.file.read(4 * min(_STEP, count - start)), "<i4").astype("<i8")
            ends = end + np.cumsum(lengths) * self.dtype.itemsize
            self.file.seek(0, os.SEEK_END)
            self.file.write((ends - lengths * self.dtype.itemsize).tobytes())
            end = int(ends[-1])
        self.file.seek(0, os.SEEK_END)
        for start in range(0, count + 1, _STEP):
            self.file.write(np.arange(start, min(start + _STEP, count + 1), dtype="<i8").tobytes())
        code = next(code for code, known in DTYPES.items() if known == self.dtype)
        self.file.seek(0)
        self.file.write(HEADER.pack(MAGIC, 1, code, count, count + 1))
