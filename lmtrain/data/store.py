"""Tokens on disk: Megatron-LM's ``PREFIX.bin`` / ``PREFIX.idx`` version 1, read and written byte for byte.

Layout in docs/formats.md. ``.bin`` holds all tokens back to back; ``.idx`` the lengths and the document borders.
"""

from __future__ import annotations

import os
import struct
from array import array
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from lmtrain.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
OLD_MAGIC = b"TNTIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {code: np.dtype(name) for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()}
"""Codes 6 and 7 are missing on purpose: Megatron and GPT-NeoX disagree on which of them is float32."""
MAX_LENGTH = 2**31 - 1


def smallest_dtype(vocab_size: int) -> np.dtype:
    """uint16 while every id fits in it, else int32 (the format has no uint32)."""
    return DTYPES[8] if vocab_size <= 65536 else DTYPES[4]


class Store:
    """A ``.bin/.idx`` pair, open for reading.

    Checked at open, vectorised: sizes of both files, magic, version, dtype, lengths against offsets, document borders.
    Every read returns a copy: a view into the map would crash the process if it outlived the store.

    num_tokens, num_documents: counts. dtype: of the file. document_starts: int64 ``[num_documents + 1]``, the token at
    which each document starts, and ``num_tokens``. Raises DataError, naming file and field.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        index = _read_bytes(self.prefix + ".idx")
        self.dtype, lengths, documents = parse_index(index, self.prefix + ".idx")
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        self.document_starts: NDArray[np.int64] = offsets[documents]
        self.num_tokens = int(offsets[-1])
        self.num_documents = len(documents) - 1
        self._tokens = self._map()

    def _map(self) -> NDArray[np.integer]:
        path = self.prefix + ".bin"
        expected = self.num_tokens * self.dtype.itemsize
        try:
            found = os.path.getsize(path)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None
        if found != expected:
            raise DataError(f"{path}: expected {expected:,} bytes from the .idx, found {found:,}")
        if expected == 0:
            return np.empty(0, dtype=self.dtype)
        return np.memmap(path, dtype=self.dtype, mode="r")

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.prefix,)  # a worker opens the files itself instead of receiving a copy of the map

    def num_windows(self, length: int) -> int:
        """Whole windows of ``length`` inputs; each needs one token more, as its last target."""
        return max((self.num_tokens - 1) // length, 0)

    def window(self, p: int, length: int) -> NDArray[np.int32]:
        """int32 ``[length + 1]``: inputs ``[:-1]`` and targets ``[1:]`` of window p; its stride is ``length``."""
        return self.tokens(p * length, length + 1)

    def windows(self, p: NDArray[np.int64], length: int) -> NDArray[np.int32]:
        """int32 ``[n, length + 1]``: the windows ``p`` int64 ``[n]``."""
        return np.stack([self.window(int(index), length) for index in p])

    def tokens(self, start: int, count: int) -> NDArray[np.int32]:
        """int32 ``[count]``: a copy of the tokens ``[start, start + count)``."""
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise IndexError(f"{self.prefix}.bin: tokens [{start}, {start + count}) of {self.num_tokens}")
        return self._tokens[start : start + count].astype(np.int32)

    def document(self, j: int) -> NDArray[np.int32]:
        """int32: a copy of document j's tokens, end-of-document token included if the writer added one."""
        start = int(self.document_starts[j])
        return self.tokens(start, int(self.document_starts[j + 1]) - start)

    def document_ids(self, start: int, count: int) -> NDArray[np.int32]:
        """int32 ``[count]``: the document of each token, counted from 0 at token ``start``."""
        first, last = np.searchsorted(self.document_starts, [start + 1, start + count])
        inner = np.unique(self.document_starts[first:last]) - start  # empty documents own no token
        opens = np.zeros(count, dtype=np.int32)
        opens[inner] = 1
        return np.cumsum(opens, dtype=np.int32)

    def check_range(self, vocab_size: int) -> None:
        """Raise DataError naming document and offset of the first id outside ``[0, vocab_size)``; reads everything."""
        piece = 1 << 24
        for start in range(0, self.num_tokens, piece):
            ids = self._tokens[start : start + piece]
            wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
            if wrong.size:
                raise self.out_of_range(start + int(wrong[0]), vocab_size)

    def out_of_range(self, position: int, vocab_size: int) -> DataError:
        """The error for the token at ``position``, with the document it lies in."""
        document = int(np.searchsorted(self.document_starts, position, side="right")) - 1
        offset = position - int(self.document_starts[document])
        return DataError(
            f"{self.prefix}.bin: token id {self._tokens[position]} at token {offset} of document {document} is outside "
            f"the vocabulary of {vocab_size}"
        )


class StoreWriter:
    """Writes one document after another; the pair appears under its names only when ``close`` succeeds.

    vocab_size: ids outside ``[0, vocab_size)`` are refused (a cast would wrap them silently). dtype: of the file,
    default the smallest for the vocabulary.
    """

    def __init__(self, prefix: str | Path, vocab_size: int, dtype: np.dtype | None = None) -> None:
        self.prefix = str(prefix)
        self.vocab_size = vocab_size
        self.dtype = dtype or smallest_dtype(vocab_size)
        self.num_tokens = 0
        self.lengths = array("i")
        self._bin = open(self.prefix + ".bin.partial", "wb")  # noqa: SIM115 (closed by close or __exit__)

    def add(self, tokens: NDArray[np.integer]) -> None:
        """Append one document, integers ``[n]``."""
        document = len(self.lengths)
        if tokens.size > MAX_LENGTH:
            raise DataError(f"{self.prefix}.bin: document {document} has {tokens.size:,} tokens, more than 2^31 - 1")
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            raise DataError(
                f"{self.prefix}.bin: document {document} has token ids {tokens.min()}..{tokens.max()}, the vocabulary "
                f"has {self.vocab_size}"
            )
        self._bin.write(tokens.astype(self.dtype).tobytes())
        self.lengths.append(int(tokens.size))
        self.num_tokens += int(tokens.size)

    def close(self) -> None:
        """Make both files durable, then visible, ``.idx`` last: a reader that finds it finds the rest."""
        _sync_close(self._bin)
        lengths = np.frombuffer(self.lengths, dtype=np.int32)
        with open(self.prefix + ".idx.partial", "wb") as file:
            file.write(index_bytes(self.dtype, lengths, np.arange(len(lengths) + 1)))
            _sync_close(file)
        for suffix in (".bin", ".idx"):
            os.replace(self.prefix + suffix + ".partial", self.prefix + suffix)
        sync_folder(Path(self.prefix).parent)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
            return
        self._bin.close()
        os.remove(self.prefix + ".bin.partial")


def index_bytes(dtype: np.dtype, lengths: NDArray[np.integer], documents: NDArray[np.integer]) -> bytes:
    """The ``.idx`` of sequences of ``lengths`` tokens; ``documents[j]`` is the first sequence of document j."""
    code = next(code for code, known in DTYPES.items() if known == dtype)
    offsets = np.zeros(len(lengths), dtype="<i8")
    np.cumsum(lengths[:-1], out=offsets[1:], dtype="<i8")
    header = HEADER.pack(MAGIC, 1, code, len(lengths), len(documents))
    arrays = (lengths.astype("<i4"), offsets * dtype.itemsize, documents.astype("<i8"))
    return header + b"".join(part.tobytes() for part in arrays)


def parse_index(data: bytes, path: str) -> tuple[np.dtype, NDArray[np.int64], NDArray[np.int64]]:
    """dtype, lengths and document array of an index, each checked."""
    if data.startswith(OLD_MAGIC):
        raise DataError(f"{path}: an old TNTIDX (cached/lazy) index; convert it to MMIDIDX with Megatron-LM's tools")
    if not data.startswith(MAGIC) or len(data) < HEADER.size:
        raise DataError(f"{path}: not a Megatron index: expected magic {MAGIC!r}, found {data[:9]!r}")
    _, version, code, sequences, borders = HEADER.unpack_from(data)
    if version != 1:
        raise DataError(f"{path}: index version {version}, only 1 is known")
    if code not in DTYPES:
        raise DataError(f"{path}: token dtype code {code}; known: {', '.join(map(str, DTYPES))}")
    expected = HEADER.size + 12 * sequences + 8 * borders
    if len(data) not in (expected, expected + sequences):  # one mode byte per sequence in multimodal sets; not read
        raise DataError(f"{path}: expected {expected:,} bytes for {sequences:,} sequences, found {len(data):,}")
    lengths = np.frombuffer(data, "<i4", sequences, HEADER.size).astype(np.int64)
    offsets = np.frombuffer(data, "<i8", sequences, HEADER.size + 4 * sequences)
    documents = np.frombuffer(data, "<i8", borders, HEADER.size + 12 * sequences).astype(np.int64)
    if (lengths < 0).any():
        raise DataError(f"{path}: sequence {int(np.argmax(lengths < 0))} has a negative length")
    wrong = offsets != (np.cumsum(lengths) - lengths) * DTYPES[code].itemsize
    if wrong.any():
        raise DataError(f"{path}: the byte offset of sequence {int(np.argmax(wrong))} does not follow from the lengths")
    steps = np.diff(documents)
    if borders < 1 or documents[0] != 0 or documents[-1] != sequences or (steps < 0).any():
        raise DataError(f"{path}: the document array must rise from 0 to {sequences}")
    if borders == sequences + 1 and (steps != 1).any():
        # As many documents as sequences, yet not one each: no builder writes this, a flipped byte does.
        raise DataError(f"{path}: document {int(np.argmax(steps != 1))} does not hold exactly one sequence")
    return DTYPES[code], lengths, documents


def _read_bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def _sync_close(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
