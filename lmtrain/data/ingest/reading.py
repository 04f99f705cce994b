"""Documents from wherever text lies: plain files, JSON lines, anything HF ``datasets`` reads, locally or from the hub.

Text files and JSON lines are read here, so that an error can name file and line; the rest goes through ``datasets``.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from lmtrain.data.store.manifest import file_digest
from lmtrain.errors import DataError, UsageError

JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
MAX_DOCUMENT_BYTES = 1 << 28
"""A larger document is refused before it is read: it is a corpus in one file, or a mistake."""
CHUNK_BYTES = 1 << 20
"""Text that one process works on at a time."""
CHUNKS_PER_SHARD = 128
"""What is lost when a run is cut short: at most a shard per pass."""
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".tsv": "csv", ".json": "json"}
"""Suffix -> builder of HF ``datasets``; every other suffix is one plain text document per file."""


@dataclass(frozen=True)
class SourceOptions:
    """One source of text."""

    path: str
    """A file, a folder, a glob (quote it), or the name of a dataset on the Hugging Face hub."""
    text_field: str = "text"
    """Field (column) that holds the text; plain text files have none."""
    id_field: str | None = None
    """Field that names a document for the held-out split; default: `id` where a record has one, else the text."""
    config: str | None = None
    """Configuration (subset) of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset."""
    near_duplicates: bool = False
    """Leave out documents that nearly equal an earlier one, of any source that says so (MinHash, similarity ~0.75)."""
    quality: bool = False
    """Leave out what does not read like English prose (Gopher's rules); not for code, tables, other languages."""
    fim_rate: float = 0.0
    """Share of the documents written as prefix, suffix, middle, so that a model learns to fill in."""

    def __post_init__(self) -> None:
        if not 0 <= self.fim_rate <= 1:
            raise UsageError(f"fim_rate: must be between 0 and 1, got {self.fim_rate}")


@dataclass(frozen=True)
class Document:
    """id: what the held-out split hashes, None: the text. train_only: never held out (its text is in another document
    that may be). where: file and line, for messages."""

    text: str
    id: str | None
    train_only: bool
    where: str


class Line(NamedTuple):
    """A line of a JSON lines file, not parsed: half the work of reading is left to who needs the document. number:
    from 1; offset: of its first byte in the file."""

    data: bytes
    path: str
    number: int
    offset: int


def read_documents(options: SourceOptions) -> Iterator[Document]:
    """The documents of a source, in sorted file order. Raises DataError naming file and line or byte offset."""
    for row in _rows(options):
        yield _parsed(row, options)


def _rows(options: SourceOptions) -> Iterator[Document | Line]:
    files = find_files(options.path)
    if files is None:
        yield from _from_rows(_hub_rows(options), options, options.path)
        return
    root = _root(options.path)
    for path in files:
        if path.name.endswith(JSON_LINES):
            yield from _json_lines(path)
        elif path.suffix in BUILDERS:
            yield from _from_rows(file_rows(path), options, str(path))
        else:
            _check_size(path.stat().st_size, str(path))
            yield Document(_decode(path.read_bytes(), path, 0), path.relative_to(root).as_posix(), False, str(path))


class Chunk(NamedTuple):
    """Consecutive documents of a source, about a megabyte. shard: of CHUNKS_PER_SHARD chunks; first: number of the
    first document; rows: one per document."""

    source: str
    options: SourceOptions
    shard: int
    first: int
    rows: list[Document | Line]

    def documents(self) -> list[Document]:
        """Parsed anew at every call. Raises DataError naming file and line."""
        return [_parsed(row, self.options) for row in self.rows]


def read_chunks(source: str, options: SourceOptions) -> Iterator[Chunk]:
    """All documents of a source; where chunks and shards begin depends on the text alone."""
    rows: list[Document | Line] = []
    number = first = size = 0
    for row in _rows(options):
        rows.append(row)
        size += len(row.data if isinstance(row, Line) else row.text)
        if size >= CHUNK_BYTES:
            yield Chunk(source, options, number // CHUNKS_PER_SHARD, first, rows)
            number, first = number + 1, first + len(rows)
            rows, size = [], 0
    if rows:
        yield Chunk(source, options, number // CHUNKS_PER_SHARD, first, rows)


def find_files(path: str) -> list[Path] | None:
    """The files of a local path, sorted; None if it names a hub dataset. Hidden files and folders are left out."""
    if os.path.isfile(path):
        return [Path(path)]
    if os.path.isdir(path):
        found = (Path(folder) / name for folder, _, names in os.walk(path) for name in names)
        root = Path(path)
    elif glob.has_magic(path):
        found = (Path(name) for name in glob.glob(path, recursive=True) if os.path.isfile(name))
        root = _fixed_part(path)
    elif path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith((*JSON_LINES, *BUILDERS, ".txt")):
        raise DataError(f"{path}: no such file or folder")
    else:
        return None
    files = sorted(
        (file for file in found if not any(part.startswith(".") for part in file.relative_to(root).parts)),
        key=lambda file: file.as_posix(),
    )
    if not files:
        raise DataError(f"{path}: no files there")
    return files


def total_bytes(sources: Mapping[str, SourceOptions]) -> int | None:
    """Bytes of the local input files of all sources; None where one is a hub dataset."""
    found = [find_files(options.path) for options in sources.values()]
    return None if None in found else sum(path.stat().st_size for files in found for path in files or [])


def inputs_digest(options: SourceOptions) -> str:
    """xxh3-128 over names, as ids count them, and contents of the input files; of a hub dataset, over its name."""
    files = find_files(options.path)
    digest = xxhash.xxh3_128(options.path.encode() if files is None else b"")
    for path in files or []:
        name = path.relative_to(_root(options.path)).as_posix()
        digest.update(f"{name}\0{path.stat().st_size}\0{file_digest(path)}\n".encode())
    return digest.hexdigest()


def _root(path: str) -> Path:
    """The folder from which ids are counted."""
    return Path(path) if os.path.isdir(path) else _fixed_part(path)


def _fixed_part(path: str) -> Path:
    """Of a file, its folder; of a glob, the part without wildcards."""
    parts = Path(path).parts
    plain = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return Path(*parts[:plain])


def _decode(data: bytes, path: str | Path, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {offset + error.start} (0x{data[error.start]:02x}) is not UTF-8; convert the file: "
            f"iconv -f LATIN1 -t UTF-8 {path} > NEW (or whichever encoding it has), or move it out of the source"
        ) from None


def _check_size(size: int, where: str) -> None:
    if size > MAX_DOCUMENT_BYTES:
        raise DataError(
            f"{where}: a document of more than {MAX_DOCUMENT_BYTES:,} bytes; split it (a plain text file is one "
            "document: split -C 100M FILE PREFIX cuts it at line ends)"
        )


def _json_lines(path: Path) -> Iterator[Line]:
    """The lines that are not blank."""
    offset, name = 0, str(path)
    for number, line in enumerate(_lines(path), 1):
        if b'"' in line or _decode(line, name, offset).strip():
            yield Line(line, name, number, offset)
        offset += len(line)


def _parsed(row: Document | Line, options: SourceOptions) -> Document:
    if isinstance(row, Document):
        return row
    where, text = f"{row.path}:{row.number}", _decode(row.data, row.path, row.offset)
    try:
        content = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where}: malformed JSON ({error}): {text[:80].strip()}") from None
    return _document(content, options, where)


def _lines(path: Path) -> Iterator[bytes]:
    """Lines of a file, unpacked if it ends in .gz; none longer than a document may be."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            number = 1
            while line := file.readline(MAX_DOCUMENT_BYTES + 1):
                if len(line) > MAX_DOCUMENT_BYTES:
                    _check_size(len(line), f"{path}:{number}")
                yield line
                number += 1
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: not readable as gzip, cut short or damaged: {error}") from None


def _from_rows(rows: Iterable[Any], options: SourceOptions, where: str) -> Iterator[Document]:
    for number, row in enumerate(rows, 1):
        yield _document(row, options, f"{where}, record {number}")


def _document(row: Any, options: SourceOptions, where: str) -> Document:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with field {options.text_field}, found {type(row).__name__}")
    if options.text_field not in row:
        raise DataError(
            f"{where}: no field {options.text_field}; fields present: {', '.join(row) or 'none'} (set "
            f"sources.NAME.text_field={_longest(row)})"
        )
    text = row[options.text_field]
    if text is None:
        text = ""
    if not isinstance(text, str):
        raise DataError(f"{where}: field {options.text_field} holds {type(text).__name__}, not text")
    try:
        _check_size(len(text.encode("utf-8")), where)
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: character {error.start} is half of a surrogate pair, not text") from None
    if options.id_field is not None and options.id_field not in row:
        raise DataError(
            f"{where}: no field {options.id_field}; fields present: {', '.join(row)} (set sources.NAME.id_field)"
        )
    name = row.get(options.id_field or "id")
    return Document(text, None if name is None else str(name), row.get("train_only") is True, where)


def _longest(row: dict[str, Any]) -> str:
    """The field with the longest text: likely the one that is meant."""
    texts = {name: len(value) for name, value in row.items() if isinstance(value, str)}
    return max(texts, key=texts.__getitem__) if texts else "FIELD"


def file_rows(path: Path) -> Iterator[Any]:
    """The records of a parquet, arrow, csv or JSON file, as HF ``datasets`` reads it. Raises DataError."""
    from datasets import load_dataset  # seconds to import; text and JSON lines need none of it

    extra = {"sep": "\t"} if path.suffix == ".tsv" else {}
    try:
        yield from load_dataset(BUILDERS[path.suffix], data_files=str(path), split="train", streaming=True, **extra)
    except Exception as error:  # each builder has its own kinds
        raise DataError(f"{path}: not readable as {BUILDERS[path.suffix]}: {_reason(error)}") from None


def _hub_rows(options: SourceOptions) -> Iterator[Any]:
    from datasets import load_dataset

    try:
        yield from load_dataset(options.path, options.config, split=options.split, streaming=True)
    except Exception as error:
        raise DataError(
            f"{options.path}: neither a local path nor a dataset the hub gives ({_reason(error)}); give a local path: "
            "sources.NAME.path=FILE_OR_FOLDER (text, jsonl, parquet, arrow or csv)"
        ) from None


def _reason(error: Exception) -> str:
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {(str(cause).splitlines() or [''])[0][:200]}"
