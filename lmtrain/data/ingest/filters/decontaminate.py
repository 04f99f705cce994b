"""Which documents hold a piece of an evaluation text: a run of 13 words, compared without case and punctuation (GPT-3).

Read are the formats evaluations lie in: ``.csv`` (MMLU's layout: question, options, answer), ``.jsonl``, ``.parquet``
(every text of a row) and ``.txt``.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.ingest.filters.words import Hashes, Known, runs_of, words_of
from lmtrain.data.ingest.reading import file_rows
from lmtrain.errors import DataError

RUN = 13
SUFFIXES = (".csv", ".jsonl", ".parquet", ".txt")
UNREAD = (".arrow", ".bz2", ".gz", ".json", ".ndjson", ".tar", ".tsv", ".xz", ".zip", ".zst")
"""What may hold an evaluation and is not read: refused, for a silent hole in the filter would be taken for none."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluations:
    """runs: every run of 13 words of an evaluation text; item: int32 ``[len(runs)]``, a text it is in.

    files: the files, in order; file_of: int32 ``[texts]``, the file of each text. ``runs`` of a text shorter than 13
    words are none: it is not looked for.
    """

    runs: Known
    item: NDArray[np.int32]
    files: list[str]
    file_of: NDArray[np.int32]

    def file_of_text(self, item: int) -> str:
        return self.files[self.file_of[item]]

    def by_file(self, items: NDArray[np.int32]) -> dict[str, int]:
        """How many of ``items`` are texts of each file; all files."""
        counts = np.bincount(self.file_of[items], minlength=len(self.files))
        return dict(zip(self.files, counts.tolist(), strict=True))

    def found(self, runs: Hashes) -> NDArray[np.int32]:
        """The evaluation texts, ascending, of which one of a text's ``runs`` of 13 words is a piece."""
        return np.unique(self.item[self.runs.places(runs)[1]])


def evaluation_files(paths: str) -> list[Path]:
    """The files of a comma-separated list of files and folders, sorted inside a folder. DataError if there is none, or
    one of a format that is not read."""
    files: list[Path] = []
    for path in map(Path, filter(None, paths.split(","))):
        found = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES)
        if not found:
            raise DataError(f"decontaminate={path}: no {', '.join(SUFFIXES)} files there")
        files += found
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.suffix in UNREAD or (path.is_file() and file.suffix not in SUFFIXES):
                raise DataError(
                    f"decontaminate={path}: {file}: only {', '.join(SUFFIXES)} are read; convert it, or move it away"
                )
    return files


def read_evaluations(paths: str) -> Evaluations:
    """All texts of ``evaluation_files(paths)``. Raises DataError that names file and line."""
    files = evaluation_files(paths)
    runs, file_of, short = [], [], 0
    for number, path in enumerate(files):
        for text in _texts(path):
            own = np.unique(runs_of(words_of([text]), RUN).hashes)
            if own.size:
                runs.append(own)
                file_of.append(number)
            else:
                short += 1
    if short:
        log.info(
            "decontaminate: %d of %d texts have fewer than %d words; not looked for", short, short + len(runs), RUN
        )
    item = np.repeat(np.arange(len(runs), dtype=np.int32), [len(own) for own in runs])
    every, first = np.unique(np.concatenate([*runs, np.empty(0, dtype=np.uint64)]), return_index=True)
    return Evaluations(Known(every), item[first], [str(path) for path in files], np.array(file_of, dtype=np.int32))


def _texts(path: Path) -> Iterator[str]:
    try:
        if path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                for row in csv.reader(file, strict=True):
                    # The options are short; with the question before them they are what a leaked test looks like.
                    yield " ".join(row[:-1] if len(row) > 2 else row)
        elif path.suffix == ".jsonl":
            for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
                if line.strip():
                    try:
                        yield from _strings(json.loads(line))
                    except ValueError as error:
                        raise DataError(f"{path}:{number}: malformed JSON ({error})") from None
        elif path.suffix == ".parquet":
            for row in file_rows(path):
                yield from _strings(row)
        else:
            yield path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: {error}") from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
