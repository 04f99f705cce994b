"""Documents from wherever text lies: plain files, JSON lines, anything HF ``datasets`` reads, locally or from the hub.

Text files and JSON lines are read here, so that an error can name file and line; the rest goes through ``datasets``.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from lmtrain.data.manifest import file_digest
from lmtrain.errors import DataError

JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
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


@dataclass(frozen=True)
class Document:
    """id: what the held-out split hashes, None: the text. train_only: never held out (its text is in another document
    that may be). where: file and line, for messages."""

    text: str
    id: str | None
    train_only: bool
    where: str


def read_documents(options: SourceOptions) -> Iterator[Document]:
    """The documents of a source, in sorted file order. Raises DataError naming file and line or byte offset."""
    files = find_files(options.path)
    if files is None:
        yield from _from_rows(_hub_rows(options), options, options.path)
        return
    root = Path(options.path) if os.path.isdir(options.path) else _fixed_part(options.path)
    for path in files:
        if path.name.endswith(JSON_LINES):
            yield from _json_lines(path, options)
        elif path.suffix in BUILDERS:
            yield from _from_rows(_file_rows(path), options, str(path))
        else:
            yield Document(_decode(path.read_bytes(), path, 0), path.relative_to(root).as_posix(), False, str(path))


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


def bytes_of_files(options: SourceOptions) -> int | None:
    """Bytes of the local input files; None for a hub dataset."""
    files = find_files(options.path)
    return None if files is None else sum(path.stat().st_size for path in files)


def inputs_digest(options: SourceOptions) -> str:
    """xxh3-128 over names and contents of the input files; of a hub dataset, over its name."""
    digest = xxhash.xxh3_128()
    for path in find_files(options.path) or []:
        digest.update(f"{path.as_posix()}\0{path.stat().st_size}\0{file_digest(path)}\n".encode())
    return digest.hexdigest()


def _fixed_part(path: str) -> Path:
    """The folder from which ids are counted: of a file, its own; of a glob, the part without wildcards."""
    parts = Path(path).parts
    plain = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return Path(*parts[:plain])


def _decode(data: bytes, path: Path, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {offset + error.start} (0x{data[error.start]:02x}) is not UTF-8; convert the file, or leave "
            "it out with a glob such as 'DIR/**/*.txt'"
        ) from None


def _json_lines(path: Path, options: SourceOptions) -> Iterator[Document]:
    offset = 0
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            text = _decode(line, path, offset)
            offset += len(line)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except ValueError as error:
                raise DataError(f"{where}: malformed JSON ({error}): {text[:80].strip()}") from None
            yield _document(row, options, where)


def _from_rows(rows: Iterable[Any], options: SourceOptions, where: str) -> Iterator[Document]:
    for number, row in enumerate(rows, 1):
        yield _document(row, options, f"{where}, record {number}")


def _document(row: Any, options: SourceOptions, where: str) -> Document:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with field {options.text_field}, found {type(row).__name__}")
    if options.text_field not in row:
        raise DataError(
            f"{where}: no field {options.text_field}; fields present: {', '.join(row) or 'none'} (set text_field)"
        )
    text = row[options.text_field]
    if text is None:
        text = ""
    if not isinstance(text, str):
        raise DataError(f"{where}: field {options.text_field} holds {type(text).__name__}, not text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: character {error.start} is half of a surrogate pair, not text") from None
    if options.id_field is not None and options.id_field not in row:
        raise DataError(f"{where}: no field {options.id_field}; fields present: {', '.join(row)} (set id_field)")
    name = row.get(options.id_field or "id")
    return Document(text, None if name is None else str(name), row.get("train_only") is True, where)


def _file_rows(path: Path) -> Iterator[Any]:
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
