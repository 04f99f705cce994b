"""The second pass over all text: the documents that stay become tokens, in stores of a shard each."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.ingest.fim import FimTokens, rearranged
from lmtrain.data.ingest.overlap import Comparison, HeldoutText, heldout_text
from lmtrain.data.ingest.reading import Chunk, Document
from lmtrain.data.ingest.selection import HELDOUT, TRAIN, VERDICTS, Selection
from lmtrain.data.ingest.shards import made_durably
from lmtrain.data.store.store import StoreWriter
from lmtrain.data.tokenizer import Tokenizer

ROUND_TRIPS, ROUND_TRIP_TOKENS = 1000, 2000
"""Documents of a source, about, and first tokens of each, that are decoded and compared."""
NEAR_HELDOUT = "near_duplicate_of_heldout"
EXAMPLES, EXAMPLE_LENGTH = 5, 300
"""Documents per reason that filters.jsonl shows, and characters of each."""


class Marked(NamedTuple):
    """A chunk, and of its documents the verdicts uint8 ``[n]``, the digests uint64 ``[n, 2]`` and, by number in the
    source, what some were left out for."""

    chunk: Chunk
    verdicts: NDArray[np.uint8]
    digests: NDArray[np.uint64]
    because: dict[int, str]


def marked(chunk: Chunk, selection: Selection) -> Marked:
    """The chunk with what was decided about its documents."""
    here = range(chunk.first, chunk.first + len(chunk.rows))
    because = {number: selection.because[number] for number in here if number in selection.because}
    where = slice(here.start, here.stop)
    return Marked(chunk, selection.verdicts[where], selection.digests[where], because)


@dataclass
class Counts:
    """What a shard, or a source, amounts to. train_bytes, heldout_bytes: UTF-8, the latter per document. checked,
    differ: documents decoded again, and those that were not the same. byte_tokens: of all tokens, those for a part of a
    character. rearranged: documents with prefix, suffix and middle. examples: of what was left out."""

    train_bytes: int = 0
    heldout_bytes: list[int] = field(default_factory=list)
    tokens: int = 0
    near: int = 0
    checked: int = 0
    differ: int = 0
    byte_tokens: int = 0
    rearranged: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, other: Counts) -> None:
        for name, value in asdict(other).items():
            if name != "examples":
                setattr(self, name, getattr(self, name) + value)
        for example in other.examples:
            if self._wants(example["reason"]):
                self.examples.append(example)

    def show(self, reason: str, document: Document, number: int, because: Mapping[int, str]) -> None:
        """Add a document that is left out to ``examples``, unless there are enough for the ``reason``."""
        if self._wants(reason):
            row = {"reason": reason, "document": number, "where": document.where}
            why = {"because": because[number]} if number in because else {}
            self.examples.append(row | why | {"text": document.text[:EXAMPLE_LENGTH]})

    def _wants(self, reason: str) -> bool:
        return sum(known["reason"] == reason for known in self.examples) < EXAMPLES


class Documents(NamedTuple):
    """tokens: int32, of all documents, eod included; lengths: int64 ``[documents]``."""

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int64]

    @classmethod
    def joined(cls, parts: list[list[NDArray[np.int32]]]) -> Documents:
        lengths = np.array([sum(map(len, own)) for own in parts], dtype=np.int64)
        return cls(np.concatenate([np.empty(0, dtype=np.int32), *(part for own in parts for part in own)]), lengths)


class Encoded(NamedTuple):
    """The documents of a chunk that stay."""

    train: Documents
    heldout: Documents
    counts: Counts


@dataclass(frozen=True)
class EncoderSettings:
    """tokenizer, eod: to load. fast: by its faster engine. heldout: folder of the HeldoutText. fim: share
    of the documents of a source, by name. checked: likewise, share of the documents that are decoded and compared."""

    tokenizer: str
    eod: str
    fast: bool
    heldout: str
    fim: Mapping[str, float]
    checked: Mapping[str, float]
    seed: int


class Encoder:
    """Tokens of the documents of a chunk; a training document that nearly equals held-out text is left out."""

    def __init__(self, settings: EncoderSettings, tokenizer: Tokenizer | None = None) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per process: `workers` says how many cores are used
        self.settings = settings
        self.tokenizer = tokenizer or Tokenizer.load(settings.tokenizer, settings.eod)
        if settings.fast and tokenizer is None:
            self.tokenizer.accelerate()
        self.marks = FimTokens.of(self.tokenizer) if any(settings.fim.values()) else None
        self.comparison = Comparison(HeldoutText.read(Path(settings.heldout)))
        self.byte_tokens = self.tokenizer.byte_tokens()

    def __reduce__(self) -> tuple[type[Encoder], tuple[EncoderSettings]]:
        return Encoder, (self.settings,)  # a worker process loads the files itself

    def __call__(self, task: Marked) -> Encoded:
        counts, documents = Counts(), task.chunk.documents()
        staying = self._staying(task, documents, counts)
        parts = [self._parts(task, documents[number].text, number) for number in staying]
        encoded = iter(self.tokenizer.encode_batch([part for own in parts for part in own if isinstance(part, str)]))
        sides: dict[bool, list[list[NDArray[np.int32]]]] = {True: [], False: []}
        for number, own in zip(staying, parts, strict=True):
            tokens = [next(encoded) if isinstance(part, str) else np.array([part], dtype=np.int32) for part in own]
            sides[task.verdicts[number] == TRAIN].append(tokens)
            self._count(counts, task, number, own, tokens[0])
        train, heldout = Documents.joined(sides[True]), Documents.joined(sides[False])
        counts.tokens = len(train.tokens) + len(heldout.tokens)
        counts.byte_tokens = int(sum(self.byte_tokens[side.tokens].sum() for side in (train, heldout)))
        return Encoded(train, heldout, counts)

    def _staying(self, task: Marked, documents: list[Document], counts: Counts) -> list[int]:
        """Numbers of the documents that become tokens; examples of the others go to ``counts``."""
        train = np.flatnonzero(task.verdicts == TRAIN).tolist()
        found = self.comparison.near([documents[number].text for number in train])
        near = {train[i] for i in np.flatnonzero(found)}
        counts.near = len(near)
        left_out = [(number, NEAR_HELDOUT) for number in sorted(near)]
        left_out += [(i, VERDICTS[task.verdicts[i]]) for i in np.flatnonzero(task.verdicts > HELDOUT).tolist()]
        for number, reason in left_out:
            counts.show(reason, documents[number], task.chunk.first + number, task.because)
        return [number for number, verdict in enumerate(task.verdicts) if verdict <= HELDOUT and number not in near]

    def _parts(self, task: Marked, text: str, number: int) -> list[int | str]:
        """Text and ids that make up a document, eod included where the whole text is kept."""
        if task.verdicts[number] == HELDOUT:
            kept = heldout_text(text)
            return [kept, self.tokenizer.eod_id] if len(kept) == len(text) else [kept]
        parts = None
        if self.marks is not None:
            digest = task.digests[number].astype(">u8").tobytes()
            parts = rearranged(text, digest, self.settings.fim[task.chunk.source], self.settings.seed, self.marks)
        return [*(parts or [text]), self.tokenizer.eod_id]

    def _count(
        self, counts: Counts, task: Marked, number: int, parts: list[int | str], tokens: NDArray[np.int32]
    ) -> None:
        """Add a document to ``counts``; tokens: of its first part."""
        strings = [part for part in parts if isinstance(part, str)]
        size = sum(len(part.encode()) for part in strings)
        if task.verdicts[number] == TRAIN:
            counts.train_bytes += size
        else:
            counts.heldout_bytes.append(size)
        if len(strings) > 1:
            counts.rearranged += 1
        elif task.digests[number, 1] < self.settings.checked[task.chunk.source] * 2**64:
            counts.checked += 1
            text = self.tokenizer.decode(tokens[:ROUND_TRIP_TOKENS])
            if len(tokens) <= ROUND_TRIP_TOKENS:
                counts.differ += text != strings[0]
            else:  # the last of them may be a part of a character
                counts.differ += not strings[0].startswith(text.rstrip("\ufffd"))


def write_shard(path: Path, results: Iterator[Encoded], vocab_size: int) -> None:
    """The stores of a shard, and at last ``path``, its Counts as JSON: when that is there, all is."""
    counts = Counts()
    with (
        StoreWriter(path.with_suffix(".train"), vocab_size) as train,
        StoreWriter(path.with_suffix(".heldout"), vocab_size) as heldout,
    ):
        for result in results:
            train.extend(*result.train)
            heldout.extend(*result.heldout)
            counts.add(result.counts)
    with made_durably(path) as file:
        file.write(json.dumps(asdict(counts)).encode())


def read_counts(paths: list[Path]) -> Counts:
    """The Counts of a source, from those of its shards."""
    counts = Counts()
    for path in paths:
        counts.add(Counts(**json.loads(path.read_bytes())))
    return counts
