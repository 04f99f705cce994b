"""manifest.json of a prepared source: what lies in its folder, how it was made, with which tokenizer."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lmtrain.data.store.index import WHOLE, Index
from lmtrain.data.store.pieces import WHAT_NOW, PieceCheck, digests
from lmtrain.data.store.store import Store, file_size, sync_folder
from lmtrain.errors import DataError

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
NAME = "manifest.json"
SPLITS = ("train", "heldout")
LAZY_BYTES = 1 << 36
"""Files up to this size are compared with the digests of their pieces as they are read. Beyond what a machine keeps in
memory, every process reading every piece once more would cost more than the training itself."""


@dataclass(frozen=True)
class FileEntry:
    """One file. tokens, documents, dtype: of the store it belongs to. pieces: xxh3-128 of each 64 MiB (pieces.py)."""

    path: str
    bytes: int
    xxh3_128: str
    tokens: int
    documents: int
    dtype: str
    pieces: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TokenizerEntry:
    """The tokenizer that made the ids; ``name`` is where it was when the data was made."""

    name: str
    fingerprint: str
    vocab_size: int
    eod: str
    eod_id: int


@dataclass(frozen=True)
class HeldoutEntry:
    """Which documents were held out. Per document of heldout.idx, in its order: ``hashes`` (xxh3-128 of the normalised
    whole text, hex) and ``bytes`` (UTF-8, of the text kept)."""

    rule: str
    share: float
    hashes: list[str] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Manifest:
    """inputs: digest of the settings and of all input files; equal inputs give equal output. bytes_of_text: UTF-8 bytes
    of the documents in ``train`` and ``heldout``. pipeline: steps in order, each with what it removed or counted."""

    source: str
    uri: str
    created_by: str
    inputs: str
    tokenizer: TokenizerEntry
    files: list[FileEntry]
    bytes_of_text: dict[str, int]
    heldout: HeldoutEntry
    pipeline: list[dict[str, Any]]
    eod_appended: bool = True
    format_version: int = FORMAT_VERSION

    @classmethod
    def read(cls, folder: str | Path) -> Manifest:
        """The manifest of a prepared folder. DataError in one line if it is missing, damaged or newer."""
        path = Path(folder) / NAME
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
            if row["format_version"] > FORMAT_VERSION:
                raise DataError(
                    f"{path}: format_version {row['format_version']}, this version of lmtrain reads {FORMAT_VERSION}"
                )
            row["tokenizer"] = TokenizerEntry(**row["tokenizer"])
            row["files"] = [FileEntry(**entry) for entry in row["files"]]
            row["heldout"] = HeldoutEntry(**row["heldout"])
            return cls(**row)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a manifest: {error}") from None

    def write(self, folder: str | Path) -> None:
        """Write manifest.json, durably and by rename."""
        path = Path(folder) / NAME
        partial = path.with_suffix(".partial")
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(asdict(self), file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)

    def file(self, path: str) -> FileEntry:
        for entry in self.files:
            if entry.path == path:
                return entry
        raise DataError(f"{NAME} of {self.source}: no entry for {path}")


def file_entries(folder: Path, split: str) -> list[FileEntry]:
    """Entries of ``split``.bin and ``split``.idx, read from the files."""
    store = Store(folder / split)
    counts = (store.num_tokens, store.num_documents, store.dtype.name)
    entries = []
    for path in (folder / f"{split}.bin", folder / f"{split}.idx"):
        whole, pieces = digests(path)
        entries.append(FileEntry(path.name, path.stat().st_size, whole, *counts, pieces))
    return entries


def open_split(folder: str | Path, split: str, manifest: Manifest) -> Store:
    """The store ``split`` of a prepared folder, held to its manifest: a small index whole and now, everything else
    piece by piece as it is read. Raises DataError naming the file that differs.
    """
    prefix = Path(folder) / split
    tokens, index = manifest.file(f"{split}.bin"), manifest.file(f"{split}.idx")
    path = f"{prefix}.idx"
    file_size(path)  # refuses what is not there
    if (index.bytes <= WHOLE or not index.pieces) and file_digest(path) != index.xxh3_128:
        # Else a damaged border between documents would go unseen.
        raise DataError(f"{path}: differs from the manifest; {WHAT_NOW}")
    if tokens.bytes > LAZY_BYTES:
        log.warning(
            "%s.bin: %.0f GB, too large to be compared with its digests while it is read; python launch/prepare.py "
            "verify %s does it once", prefix, tokens.bytes / 1e9, folder,
        )  # fmt: skip
        return Store(prefix, idx_pieces=index.pieces)
    return Store(prefix, tokens.pieces, index.pieces)


def file_digest(path: str | Path) -> str:
    """xxh3-128 of a file, hex."""
    return digests(path)[0]


def verify(folder: str | Path) -> Manifest:
    """Read everything: sizes and digests of all files, layout of the indices, range of every token id.

    Raises DataError at the first difference, naming the file (the 64 MiB piece), what was expected and what was found.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    for entry in manifest.files:
        path = folder / entry.path
        if not path.is_file():
            raise DataError(f"{path}: missing, the manifest lists it; {WHAT_NOW}")
        if path.stat().st_size != entry.bytes:
            size = path.stat().st_size
            raise DataError(f"{path}: expected {entry.bytes:,} bytes, found {size:,}; {WHAT_NOW}")
        if entry.pieces:
            PieceCheck(path, entry.pieces).all()
        elif (found := file_digest(path)) != entry.xxh3_128:
            raise DataError(f"{path}: expected xxh3-128 {entry.xxh3_128}, found {found}; {WHAT_NOW}")
    for split in SPLITS:
        Index.open(f"{folder / split}.idx").check()
        store = Store(folder / split)
        entry = manifest.file(f"{split}.bin")
        if (store.num_tokens, store.num_documents) != (entry.tokens, entry.documents):
            raise DataError(
                f"{folder / split}: expected {entry.tokens:,} tokens in {entry.documents:,} documents, found "
                f"{store.num_tokens:,} in {store.num_documents:,}"
            )
        store.check_range(manifest.tokenizer.vocab_size)
    return manifest
