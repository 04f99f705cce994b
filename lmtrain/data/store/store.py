"""Tokens on disk: Megatron-LM's ``PREFIX.bin`` / ``PREFIX.idx`` version 1, read and written byte for byte.

Layout in docs/formats.md. ``.bin`` holds all tokens back to back; ``.idx`` the lengths and the document borders.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.store.borders import Borders
from lmtrain.data.store.index import DTYPES, Index, IndexWriter
from lmtrain.data.store.pieces import WHAT_NOW, PieceCheck
from lmtrain.errors import DataError

MAX_LENGTH = 2**31 - 1
READ_TOKENS = 1 << 24
READ_DOCUMENTS = 1 << 20
"""Tokens, and document lengths, that a pass over a whole store holds at once."""


def smallest_dtype(vocab_size: int) -> np.dtype:
    """uint16 while every id fits in it, else int32 (the format has no uint32)."""
    return DTYPES[8] if vocab_size <= 65536 else DTYPES[4]


class Store:
    """Tokens in documents, open for reading. ``Store(prefix)`` opens a ``.bin/.idx`` pair; foreign.py has the others.

    An index of up to 64 MiB is checked whole at open; a larger one at its ends, then where it is read: 10^9 documents
    open in O(1) time and memory. Every read returns a copy: a view into the map would crash the process if it outlived
    the store. Pickled by its arguments: a worker opens the files itself.

    bin_pieces, idx_pieces: digests (pieces.py) of the files' 64 MiB pieces, each compared when it is first read; of a
    small index none is needed, the caller can compare all of it.

    prefix: as given. path: of the file of tokens. num_tokens, num_documents: counts. dtype: of the file. Raises
    DataError, naming file and field.
    """

    def __init__(self, prefix: str | Path, bin_pieces: Sequence[str] = (), idx_pieces: Sequence[str] = ()) -> None:
        index = Index.open(f"{prefix}.idx")
        borders = index.borders(idx_pieces)
        found = file_size(f"{prefix}.bin")
        if found != index.num_tokens * index.dtype.itemsize:
            raise DataError(
                f"{prefix}.bin: expected {index.num_tokens * index.dtype.itemsize:,} bytes from the .idx, "
                f"found {found:,}; {WHAT_NOW}"
            )
        check = PieceCheck(f"{prefix}.bin", bin_pieces) if bin_pieces else None
        self._open(prefix, f"{prefix}.bin", index.dtype, borders, (bin_pieces, idx_pieces), check=check)

    def _open(
        self,
        prefix: str | Path,
        path: str | Path,
        dtype: np.dtype,
        borders: Borders,
        arguments: tuple[Any, ...] = (),
        tokens: NDArray[np.integer] | None = None,
        check: PieceCheck | None = None,
    ) -> None:
        """Set what every kind of store has. tokens: of the file, mapped; default: the file holds nothing else.

        arguments: of ``__init__`` after ``prefix``, for a copy in another process. check: asked before bytes are used.
        """
        self.prefix, self.path, self.dtype, self.borders = str(prefix), str(path), dtype, borders
        self._arguments = (self.prefix, *arguments)
        self._check = check
        if tokens is None:
            empty = file_size(path) == 0  # which mmap refuses
            # a plain array over the map: slicing a memmap costs more than the copy
            tokens = np.empty(0, dtype=dtype) if empty else np.asarray(np.memmap(path, dtype=dtype, mode="r"))
        self._tokens = tokens
        self.num_tokens = len(tokens)

    def __reduce__(self) -> tuple[type[Store], tuple[Any, ...]]:
        return type(self), self._arguments

    @property
    def num_documents(self) -> int:
        return self.borders.num_documents

    @property
    def document_starts(self) -> NDArray[np.int64]:
        """int64 ``[num_documents + 1]``: the token at which each document starts, and ``num_tokens``; all in memory."""
        return self.borders.starts(0, self.num_documents + 1)

    def num_windows(self, length: int) -> int:
        """Whole windows of ``length`` inputs; each needs one token more, as its last target."""
        return max((self.num_tokens - 1) // length, 0)

    def window(self, p: int, length: int) -> NDArray[np.int32]:
        """int32 ``[length + 1]``: inputs ``[:-1]`` and targets ``[1:]`` of window p; its stride is ``length``."""
        return self.tokens(p * length, length + 1)

    def tokens(self, start: int, count: int) -> NDArray[np.int32]:
        """int32 ``[count]``: a copy of the tokens ``[start, start + count)``."""
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise IndexError(f"{self.path}: tokens [{start}, {start + count}) of {self.num_tokens}")
        if self._check is not None:
            self._check(start * self.dtype.itemsize, (start + count) * self.dtype.itemsize)
        found = self._tokens[start : start + count]
        tokens = found.astype(np.int32)
        if self.dtype.itemsize > 4 and (tokens != found).any():  # 2^32 + 5 must not become 5
            raise self.out_of_range(start + int((tokens != found).argmax()), MAX_LENGTH)
        return tokens

    def document(self, j: int) -> NDArray[np.int32]:
        """int32: a copy of document j's tokens, end-of-document token included if the writer added one."""
        start, stop = self.borders.starts(j, j + 2).tolist()
        return self.tokens(start, stop - start)

    def document_ids(self, start: int, count: int) -> NDArray[np.int32]:
        """int32 ``[count]``: the document of each token, counted from 0 at token ``start``."""
        ids = np.empty(count, dtype=np.int32)
        at = number = 0
        for border in (*(self.borders.inside(start, start + count) - start).tolist(), count):
            if border > at:  # an empty document has its border twice
                ids[at:border] = number
                at, number = border, number + 1
        return ids

    def pieces(self) -> Iterator[tuple[int, NDArray[np.integer]]]:
        """All tokens in order, as they are in the file, some 16 million at a time, with the number of the first."""
        for start in range(0, self.num_tokens, READ_TOKENS):
            yield start, self._tokens[start : start + READ_TOKENS]

    def document_lengths(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Tokens of every document, int64 ``[n]``, about a million at a time, with the number of the first."""
        for start in range(0, self.num_documents, READ_DOCUMENTS):
            yield start, np.diff(self.borders.starts(start, min(start + READ_DOCUMENTS, self.num_documents) + 1))

    def check_range(self, vocab_size: int) -> None:
        """Raise DataError naming document and offset of the first id outside ``[0, vocab_size)``; reads everything."""
        for start, ids in self.pieces():
            wrong = (ids < 0) | (ids >= vocab_size)
            if wrong.any():
                raise self.out_of_range(start + int(wrong.argmax()), vocab_size)

    def out_of_range(self, position: int, vocab_size: int) -> DataError:
        """The error for the token at ``position``, with the document it lies in."""
        document = self.borders.find(position + 1) - 1
        offset = position - int(self.borders.starts(document, document + 1)[0])
        return DataError(
            f"{self.path}: token id {self._tokens[position]} at token {offset} of document {document} is outside the "
            f"vocabulary of {vocab_size}"
        )


class StoreWriter:
    """Writes one document after another; the pair appears under its names only when ``close`` succeeds. O(1) memory.

    vocab_size: ids outside ``[0, vocab_size)`` are refused (a cast would wrap them silently). dtype: of the file,
    default the smallest for the vocabulary.
    """

    def __init__(self, prefix: str | Path, vocab_size: int, dtype: np.dtype | None = None) -> None:
        self.prefix = str(prefix)
        self.vocab_size = vocab_size
        self.dtype = dtype or smallest_dtype(vocab_size)
        self.num_tokens = 0
        self._bin = open(self.prefix + ".bin.partial", "wb")  # noqa: SIM115 (closed by close or __exit__)
        self._idx = open(self.prefix + ".idx.partial", "w+b")  # noqa: SIM115
        self._index = IndexWriter(self._idx, self.dtype)

    def add(self, tokens: NDArray[np.integer]) -> None:
        """Append one document, integers ``[n]``."""
        self.extend(tokens, np.array([tokens.size]))

    def extend(self, tokens: NDArray[np.integer], lengths: NDArray[np.integer]) -> None:
        """Append documents of ``lengths`` tokens, integers ``[d]``; ``tokens`` ``[lengths.sum()]`` holds them all."""
        first = self._index.num_documents
        if int(lengths.sum()) != tokens.size:
            raise ValueError(f"{tokens.size} tokens for documents of {int(lengths.sum())}")
        if lengths.size and int(lengths.max()) > MAX_LENGTH:
            j = int(lengths.argmax())
            raise DataError(f"{self.prefix}.bin: document {first + j} has {lengths[j]:,} tokens, more than 2^31 - 1")
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            wrong = int(((tokens < 0) | (tokens >= self.vocab_size)).argmax())
            j = int(np.cumsum(lengths).searchsorted(wrong, side="right"))
            document = tokens[int(lengths[:j].sum()) :][: int(lengths[j])]
            raise DataError(
                f"{self.prefix}.bin: document {first + j} has token ids {document.min()}..{document.max()}, the "
                f"vocabulary has {self.vocab_size}"
            )
        self._bin.write(tokens.astype(self.dtype).tobytes())
        self._index.add(lengths)
        self.num_tokens += int(tokens.size)

    def close(self) -> None:
        """Make both files durable, then visible, ``.idx`` last: a reader that finds it finds the rest."""
        _sync_close(self._bin)
        self._index.finish()
        _sync_close(self._idx)
        for suffix in (".bin", ".idx"):
            os.replace(self.prefix + suffix + ".partial", self.prefix + suffix)
        sync_folder(Path(self.prefix).parent)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            for file in (self._bin, self._idx):
                with suppress(OSError):  # a full disk refuses the last bytes again
                    file.close()
                Path(file.name).unlink(missing_ok=True)


def file_size(path: str | Path) -> int:
    """Bytes of a file, or DataError."""
    try:
        return os.path.getsize(path)
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
