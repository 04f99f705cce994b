"""Tokens that others wrote, read where they are: datatrove's ``.ds``, OLMo's flat ``.npy``, real numpy arrays.

Layouts in docs/formats.md. ``launch/prepare.py merge`` turns any of them into a ``.bin/.idx`` pair.
"""

from __future__ import annotations

import gzip
import logging
import os
from array import array
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.store.borders import Borders, KnownBorders, SearchedBorders
from lmtrain.data.store.index import WHOLE
from lmtrain.data.store.manifest import NAME, TokenizerEntry
from lmtrain.data.store.store import READ_TOKENS, Store, file_size
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import DataError, nearest

log = logging.getLogger(__name__)

NUMPY_MAGIC = b"\x93NUMPY"
_SAMPLE = 1 << 20  # tokens that tell the dtype of a flat array


def open_store(path: str | Path, tokenizer: Tokenizer | TokenizerEntry | None = None) -> Store:
    """The store at ``path``: a ``.ds`` or ``.npy`` file by its suffix, else the prefix of a ``.bin/.idx`` pair.

    tokenizer: that made the ids; ``.npy`` needs it: it says how wide an id is and where a document ends. Raises
    DataError.
    """
    name = str(path)
    if name.endswith(".ds"):
        return DatatroveStore(name)
    if name.endswith(".npy"):
        if tokenizer is None:
            raise DataError(f"{path}: a .npy file does not say where documents end; give its tokenizer")
        return ArrayStore(name, tokenizer.vocab_size, tokenizer.eod_id)
    if name.endswith((".bin", ".idx")):
        raise DataError(f"{path}: give the prefix of the pair, {name[:-4]}")
    if os.path.isdir(name):
        raise DataError(f"{path}: a folder, not a store; {_content(Path(name))}")
    if not os.path.exists(f"{name}.idx"):
        parent = Path(name).parent
        known = {
            entry.name.removesuffix(".idx") for entry in parent.glob("*") if entry.suffix in (".idx", ".ds", ".npy")
        }
        raise DataError(f"{name}: no store there: no {name}.idx{nearest(Path(name).name, known)}")
    return Store(name)


def _content(folder: Path) -> str:
    """What a folder given in place of a store holds, and what to give instead."""
    prepared = sorted(entry.parent.name for entry in folder.glob(f"*/{NAME}"))
    if prepared:
        return f"give one of the prepared sources in it: {', '.join(prepared)}"
    found = sorted(entry.name for entry in folder.iterdir() if entry.suffix in (".idx", ".ds", ".npy"))
    if not found:
        return "it holds no .idx, .ds or .npy"
    return (
        f"give one of its {len(found)} (first: {found[0].removesuffix('.idx')}), or make one of them all: "
        "python launch/prepare.py merge out=NEW tokenizer=PATH, and their paths"
    )


def index_file(path: str | Path) -> Path:
    """The file that says where the documents of the store at ``path`` end."""
    name = str(path)
    if name.endswith(".ds"):
        return Path(f"{name}.index")
    if not name.endswith(".npy"):
        return Path(f"{name}.idx")
    table = Path(_table(name))
    return table if table.exists() else Path(name)


def _table(path: str) -> str:
    return path.removesuffix(".npy") + ".csv.gz"


class DatatroveStore(Store):
    """``NAME.ds`` of datatrove / nanotron: raw uint16 or uint32; ``NAME.ds.index``: uint64 ends of the documents.

    The width of an id is the size of one file over the last end in the other; ``NAME.ds.metadata`` must agree if it is
    there. Source: datatrove, pipeline/tokens/tokenizer.py. ``NAME.ds.loss`` (targets left out) is not read: refused.
    """

    def __init__(self, path: str) -> None:
        index = f"{path}.index"
        size, index_size = file_size(path), file_size(index)
        if index_size % 8:
            raise DataError(f"{index}: {index_size:,} bytes, expected 8 per document")
        if os.path.exists(f"{path}.loss"):
            raise DataError(f"{path}.loss: per-token loss masks are not supported; without that file all are targets")
        ends = np.memmap(index, "<i8", "r") if index_size else np.empty(0, dtype=np.int64)
        num_tokens = int(ends[-1]) if len(ends) else 0
        widths = [width for width in (2, 4) if size == num_tokens * width]
        if not widths:
            raise DataError(f"{path}: {size:,} bytes are not 2 or 4 for each of the {num_tokens:,} tokens of {index}")
        _check_metadata(f"{path}.metadata", num_tokens, widths[0])
        borders = _EndsBorders(ends, index)
        if index_size <= WHOLE:
            known = KnownBorders(borders.starts(0, len(ends) + 1).copy())
            self._open(path, path, np.dtype(f"<u{widths[0]}"), known)
        else:
            self._open(path, path, np.dtype(f"<u{widths[0]}"), borders)


def _check_metadata(path: str, num_tokens: int, width: int) -> None:
    """Line 1 is ``tokenizer|width`` (older: without the width, which was 2), line 2 the number of tokens."""
    if not os.path.exists(path):
        return
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    stated = lines[0].rpartition("|")[2] if lines and "|" in lines[0] else "2"
    if len(lines) < 2 or lines[1] != str(num_tokens) or (num_tokens and stated != str(width)):
        raise DataError(
            f"{path}: expected {num_tokens} tokens of {width} bytes as in the .ds and its .index, found "
            f"{' / '.join(lines[:2])}"
        )


class _EndsBorders(SearchedBorders):
    """Borders from the end of each document, int64 ``[num_documents]``, on disk."""

    def __init__(self, ends: NDArray[np.int64], path: str) -> None:
        self.ends = ends
        self.path = path

    @property
    def num_documents(self) -> int:
        return len(self.ends)

    def start(self, j: int) -> int:
        return int(self.ends[j - 1]) if j else 0

    def starts(self, first: int, stop: int) -> NDArray[np.int64]:
        starts = np.asarray(self.ends[max(first - 1, 0) : max(stop - 1, 0)], dtype=np.int64)
        if first == 0 and stop:
            starts = np.append(np.int64(0), starts)
        wrong = np.diff(starts) < 0
        if wrong.any() or (len(starts) and starts[0] < 0):
            raise DataError(f"{self.path}: document {first + int(np.argmax(wrong))} ends before it starts")
        return starts


class ArrayStore(Store):
    """A one-dimensional array of ids: a real ``.npy`` (by its magic), or OLMo's, which has the name but no header.

    The width of a headerless one follows from its bytes: uint32 if its beginning, read so, lies in the vocabulary, else
    uint16. Documents: rows ``start,end,...`` of ``NAME.csv.gz`` beside it, else each ends with ``eod_id``, which is
    looked for where it is read. Source: OLMo-core, data/utils.py.
    """

    def __init__(self, path: str, vocab_size: int, eod_id: int) -> None:
        tokens = _array(path, vocab_size)
        table = _table(path)
        borders = _table_borders(table, len(tokens)) if os.path.exists(table) else _FoundBorders(tokens, eod_id, path)
        self._open(path, path, tokens.dtype, borders, (vocab_size, eod_id), tokens)


def _array(path: str, vocab_size: int) -> NDArray[np.integer]:
    size = file_size(path)
    with open(path, "rb") as file:
        numpy_file = file.read(len(NUMPY_MAGIC)) == NUMPY_MAGIC
    if numpy_file:
        try:
            loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise DataError(f"{path}: not a readable numpy file: {error}") from None
        if loaded.ndim != 1 or loaded.dtype.kind not in "iu":
            raise DataError(f"{path}: expected integers [n], found {loaded.dtype} {list(loaded.shape)}")
        return loaded
    if size == 0:
        return np.empty(0, dtype=np.uint16)
    for width in (4, 2):
        if size % width == 0:
            tokens = np.memmap(path, f"<u{width}", "r")
            if 0 < int(tokens[:_SAMPLE].max()) < vocab_size:
                return tokens
    raise DataError(
        f"{path}: a flat array whose beginning is neither uint16 nor uint32 ids of a vocabulary of {vocab_size}"
    )


def _table_borders(path: str, num_tokens: int) -> KnownBorders:
    """Borders from the rows ``start,end,...``; what lies behind the last row is a document too."""
    borders = array("q", [0])
    try:
        with gzip.open(path, "rt", encoding="utf-8") as rows:
            for number, row in enumerate(rows, 1):
                start, end = (int(cell) for cell in row.split(",", 2)[:2])
                if start != borders[-1] or not start <= end <= num_tokens:
                    raise DataError(
                        f"{path}: row {number} is tokens {start} to {end}; the row before ends at {borders[-1]}, the "
                        f"file has {num_tokens}"
                    )
                borders.append(end)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path}: not rows of start,end: {error}") from None
    if borders[-1] != num_tokens:
        borders.append(num_tokens)
    return KnownBorders(np.frombuffer(borders, dtype=np.int64))


class _FoundBorders(Borders):
    """Borders behind every ``eod_id``: near a position without an index, all together by reading everything once."""

    def __init__(self, tokens: NDArray[np.integer], eod_id: int, path: str) -> None:
        self.tokens, self.eod_id, self.path = tokens, eod_id, path

    def inside(self, start: int, stop: int) -> NDArray[np.int64]:
        return np.flatnonzero(self.tokens[start : stop - 1] == self.eod_id) + (start + 1)

    @cached_property
    def _known(self) -> KnownBorders:
        if len(self.tokens) > READ_TOKENS:
            log.info("%s: reading all of it to find where documents end", self.path)
        found = [np.zeros(1, dtype=np.int64)]
        for start in range(0, len(self.tokens), READ_TOKENS):
            found.append(self.inside(start, min(start + READ_TOKENS, len(self.tokens)) + 1))
        borders = np.concatenate(found)
        return KnownBorders(borders if borders[-1] == len(self.tokens) else np.append(borders, len(self.tokens)))

    @property
    def num_documents(self) -> int:
        return self._known.num_documents

    def starts(self, first: int, stop: int) -> NDArray[np.int64]:
        return self._known.starts(first, stop)

    def find(self, position: int) -> int:
        return self._known.find(position)
