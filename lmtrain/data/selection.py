"""The first pass over all text: which documents are trained on, which are held out, which are left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import xxhash
from numpy.typing import NDArray

from lmtrain.data.overlap import shingles, text_digest
from lmtrain.data.progress import Progress
from lmtrain.data.reading import Document, SourceOptions, bytes_of_files, read_documents

MAX_HELDOUT_BYTES = 50_000
"""One document's part of the held-out text; the rest of it is used nowhere, or one large file would be the measure."""
RULE = "xxh3-64 of the id (else of the normalised text) below share * 2^64; first 50 kB of a document"


class Side(IntEnum):
    OUT = 0
    TRAIN = 1
    HELDOUT = 2


@dataclass
class Selection:
    """Of one source. sides: one byte per document read, in order. hashes: of the held-out documents, hex, in order.

    removed: documents by reason. train_bytes: UTF-8 bytes of the documents on the training side.
    """

    sides: bytearray = field(default_factory=bytearray)
    hashes: list[str] = field(default_factory=list)
    removed: Counter[str] = field(default_factory=Counter)
    train_bytes: int = 0


def select(sources: Mapping[str, SourceOptions], share: float) -> tuple[dict[str, Selection], NDArray[np.uint64]]:
    """Decide on every document of every source, and the sorted set of shingles of the held-out text.

    Of documents equal after normalisation the first stays, over all sources. Memory: about 80 B per document.
    """
    seen: set[bytes] = set()
    selections = {}
    heldout_shingles = [np.empty(0, dtype=np.uint64)]
    for name, options in sources.items():
        selection = selections[name] = Selection()
        with Progress(f"{name}: selecting", bytes_of_files(options)) as progress:
            for document in read_documents(options):
                digest = text_digest(document.text)
                side = _side(document, digest, share, seen, selection.removed)
                seen.add(digest)
                selection.sides.append(side)
                size = len(document.text.encode())
                progress.advance(size)
                if side == Side.HELDOUT:
                    selection.hashes.append(digest.hex())
                    heldout_shingles.append(np.unique(shingles(heldout_text(document.text))))
                elif side == Side.TRAIN:
                    selection.train_bytes += size
    return selections, np.unique(np.concatenate(heldout_shingles))


def selected(options: SourceOptions, selection: Selection, *sides: Side) -> Iterator[tuple[Document, Side]]:
    """The documents on one of ``sides``, read again in the same order."""
    for document, side in zip(read_documents(options), selection.sides, strict=True):
        if side in sides:
            yield document, Side(side)


def heldout_text(text: str) -> str:
    """The part of a held-out document that is used."""
    data = text.encode()
    return text if len(data) <= MAX_HELDOUT_BYTES else data[:MAX_HELDOUT_BYTES].decode("utf-8", errors="ignore")


def _side(document: Document, digest: bytes, share: float, seen: set[bytes], removed: Counter[str]) -> Side:
    if not document.text.strip():
        removed["empty"] += 1
        return Side.OUT
    if digest in seen:
        removed["duplicate"] += 1
        return Side.OUT
    # Without the source's name: what two sources know under one id falls on the same side.
    key = digest if document.id is None else document.id.encode()
    if xxhash.xxh3_64_intdigest(key) >= share * 2**64:
        return Side.TRAIN
    if document.train_only:
        removed["train_only_of_heldout"] += 1
        return Side.OUT
    return Side.HELDOUT
