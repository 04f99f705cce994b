"""The first pass over all text: what each document is, found by several processes, kept shard by shard.

What is decided about it is a function of all these facts together (lmtrain/data/ingest/selection.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from lmtrain.data.ingest.filters import decontaminate, minhash
from lmtrain.data.ingest.filters.decontaminate import Evaluations
from lmtrain.data.ingest.filters.exact import text_digest
from lmtrain.data.ingest.filters.quality import RULES, broken_rule
from lmtrain.data.ingest.filters.words import Hashes, Runs, runs_of, words_of
from lmtrain.data.ingest.overlap import SHINGLE, heldout_text, wholes
from lmtrain.data.ingest.reading import Chunk, SourceOptions, total_bytes
from lmtrain.data.ingest.shards import made_durably, run_pass
from lmtrain.data.processes import Workers
from lmtrain.data.progress import Progress

ROW = np.dtype(
    [
        ("digest", np.uint64, 2),  # of the normalised text
        ("id", np.uint64),  # hash of the document's id, 0: it has none
        ("bytes", np.int64),  # UTF-8
        ("empty", np.bool_),
        ("chosen", np.bool_),  # for the held-out side, by the hash of id or text
        ("train_only", np.bool_),
        ("rule", np.int8),  # of quality.RULES, -1: none broken
        ("evaluation", np.int32),  # the first evaluation text that it holds a chunk of, -1: none
        ("shingles", np.int32),  # how many of Facts.shingles are its own
        ("whole", np.uint64),  # likewise chosen: a hash of all its words, 0: it has none
    ]
)


class Facts(NamedTuple):
    """rows: ROW ``[documents]``. bands: uint64 ``[documents, 14]`` or ``[documents, 0]``. shingles: uint64, of the
    documents chosen for the held-out side, in order. evaluations: int32, all evaluation texts that were found."""

    rows: NDArray[np.void]
    bands: Hashes
    shingles: Hashes
    evaluations: NDArray[np.int32]


@dataclass(frozen=True)
class Surveyor:
    """Facts of the documents of a chunk. heldout: share of documents chosen for the held-out side."""

    sources: Mapping[str, SourceOptions]
    heldout: float
    evaluations: Evaluations

    def __call__(self, chunk: Chunk) -> Facts:
        documents = chunk.documents()
        options, texts = self.sources[chunk.source], [document.text for document in documents]
        rows = np.zeros(len(texts), dtype=ROW)
        digests = [text_digest(text) for text in texts]
        rows["digest"] = np.frombuffer(b"".join(digests), dtype=">u8").reshape(-1, 2)
        rows["bytes"] = [len(text.encode()) for text in texts]
        rows["empty"] = [not text or text.isspace() for text in texts]
        rows["train_only"] = [document.train_only for document in documents]
        rows["id"] = [0 if each.id is None else xxhash.xxh3_64_intdigest(each.id.encode()) for each in documents]
        # Without the source's name: what two sources know under one id falls on the same side.
        by_text = np.array([xxhash.xxh3_64_intdigest(digest) for digest in digests], dtype=np.uint64)
        drawn = np.where(rows["id"] != 0, rows["id"], by_text).tolist()
        rows["chosen"] = [number < self.heldout * 2**64 for number in drawn]
        rows["rule"] = rows["evaluation"] = -1
        if options.quality:
            broken = [broken_rule(text) for text in texts]
            rows["rule"] = [-1 if rule is None else RULES.index(rule) for rule in broken]
        compared = (rows["chosen"] & ~rows["train_only"]).tolist()
        chosen = words_of([heldout_text(text) if here else "" for text, here in zip(texts, compared, strict=True)])
        own = runs_of(chosen, SHINGLE)
        rows["shingles"], rows["whole"] = np.diff(own.starts), wholes(chosen)
        bands, found = np.zeros((len(rows), 0), dtype=np.uint64), np.empty(0, dtype=np.int32)
        if options.near_duplicates or len(self.evaluations.runs):
            words = words_of(texts)
            if options.near_duplicates:
                runs = runs_of(words, minhash.RUN)
                bands = np.stack([minhash.band_keys(runs.of(i)) for i in range(len(texts))])
            found = self._find_evaluations(rows, runs_of(words, decontaminate.RUN))
        return Facts(rows, bands, own.hashes, found)

    def _find_evaluations(self, rows: NDArray[np.void], runs: Runs) -> NDArray[np.int32]:
        found = [np.empty(0, dtype=np.int32)]
        for i, row in enumerate(rows):
            hits = self.evaluations.found(runs.of(i))
            if hits.size:
                row["evaluation"] = hits[0]
                found.append(hits)
        return np.unique(np.concatenate(found))


def survey(
    sources: Mapping[str, SourceOptions], heldout: float, evaluations: Evaluations, workers: Workers, folder: Path
) -> dict[str, Facts]:
    """The facts of every source; ``folder`` keeps them for a later run."""
    surveyor = Surveyor(sources, heldout, evaluations)
    with Progress("selecting", total_bytes(sources)) as progress:

        def finish(path: Path, source: str, results: Iterator[Facts]) -> None:
            parts = []
            for facts in results:
                progress.advance(int(facts.rows["bytes"].sum()))
                parts.append(facts)
            with made_durably(path) as file:
                np.savez(file, allow_pickle=False, **_joined(parts)._asdict())

        paths = run_pass(folder, ".npz", sources, lambda chunk: chunk, surveyor, workers, finish)
    return {name: _joined([_read(path) for path in found]) for name, found in paths.items()}


def _joined(parts: list[Facts]) -> Facts:
    rows, bands, own, found = zip(*parts, strict=True) if parts else ([], [], [], [])
    return Facts(
        np.concatenate([np.zeros(0, dtype=ROW), *rows]),
        np.concatenate(bands) if bands else np.zeros((0, 0), dtype=np.uint64),
        np.concatenate([np.empty(0, dtype=np.uint64), *own]),
        np.unique(np.concatenate([np.empty(0, dtype=np.int32), *found])),
    )


def _read(path: Path) -> Facts:
    with np.load(path) as arrays:
        return Facts(**arrays)
