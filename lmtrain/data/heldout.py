"""Held-out text as batches: every token of it a target once, and what is needed to turn nats into bits per byte."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch

from lmtrain.data.batch import Batch, make_batch
from lmtrain.data.catalog import Catalog
from lmtrain.data.config import DataConfig
from lmtrain.data.sources import Source, open_sources
from lmtrain.data.store.store import Store
from lmtrain.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class Heldout:
    """The held-out documents of every source that has some (a foreign pair has none): those of ``cfg``, and those that
    come during a run (``follow``).

    max_tokens: per source, the first tokens, at most this many; None: all.

    source_names: those with held-out text. By name: ``num_tokens``; ``num_unpredicted``, the first tokens of documents,
    never a target; and ``bytes_of_text``, the UTF-8 bytes that those tokens spell.
    """

    def __init__(self, cfg: DataConfig, max_tokens: int | None = None) -> None:
        tokenizer = Tokenizer.load(cfg.tokenizer)
        self.seq_len = cfg.seq_len
        self.vocab_size = tokenizer.vocab_size
        self.source_names: list[str] = []
        self.num_tokens: dict[str, int] = {}
        self.num_unpredicted: dict[str, int] = {}
        self.bytes_of_text: dict[str, int] = {}
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        self._sources: dict[str, tuple[int, Source]] = {}
        self._seen = set(cfg.sources)
        for source in open_sources(cfg, tokenizer):
            self._take(list(cfg.sources).index(source.name), source)
        self._first = list(self.source_names)  # what the total is of, so that it means the same all along

    def follow(self, catalog: Catalog) -> None:
        """Score from now on also what came to ``catalog`` since; of what cannot be scored, one warning."""
        for number, name in enumerate(catalog.blocks):
            if name in self._seen:
                continue
            self._seen.add(name)
            source = catalog.stored.get(name)
            if source is None or not self._take(number, source):
                log.warning("source %s has no held-out documents: its loss on unseen text is not measured", name)

    def _take(self, number: int, source: Source) -> bool:
        """Whether ``source`` has something held out. number: its id."""
        if source.heldout is None or source.manifest is None or source.heldout.num_tokens == 0:
            return False
        starts = source.heldout.document_starts
        limit = source.heldout.num_tokens if self._max_tokens is None else self._max_tokens
        whole = int(np.searchsorted(starts, limit, side="right")) - 1
        self.num_tokens[source.name] = int(starts[whole])
        self.bytes_of_text[source.name] = sum(source.manifest.heldout.bytes[:whole])
        if whole < source.heldout.num_documents:
            tokens, size = _head(source.heldout, self._tokenizer, int(starts[whole]), limit)
            self.num_tokens[source.name] += tokens
            self.bytes_of_text[source.name] += size
        used = starts[:-1] < self.num_tokens[source.name]
        self.num_unpredicted[source.name] = int((used & (np.diff(starts) > 0)).sum())
        self.source_names.append(source.name)
        self._sources[source.name] = (number, source)
        return True

    def batches(self, source: str, rows: int, dp_rank: int = 0, dp_size: int = 1) -> Iterator[Batch]:
        """This rank's batches of ``rows`` rows of seq_len; every rank has equally many.

        ``block`` is the row's number in the source, -1 for a row of padding; ``source`` is the id of training batches.
        """
        number, opened = self._sources[source]
        assert opened.heldout is not None
        store, total, length = opened.heldout, self.num_tokens[source], self.seq_len
        num_rows = -(-(total - 1) // length)
        for batch in range(-(-num_rows // (rows * dp_size))):
            tokens = np.zeros((rows, length + 1), dtype=np.int32)
            ids = np.zeros_like(tokens)
            padding = np.ones(tokens.shape, dtype=bool)
            block = np.full(rows, -1, dtype=np.int64)
            first = (batch * dp_size + dp_rank) * rows
            for row, index in enumerate(range(first, min(first + rows, num_rows))):
                start = index * length
                count = min(length + 1, total - start)
                tokens[row, :count] = store.tokens(start, count)
                ids[row, :count] = store.document_ids(start, count)
                ids[row, count:] = ids[row, count - 1] + 1
                padding[row, :count] = False
                block[row] = index
            yield make_batch(
                torch.from_numpy(tokens),
                torch.from_numpy(ids),
                source=torch.full((rows, length), number, dtype=torch.int32),
                block=torch.from_numpy(block),
                padding=torch.from_numpy(padding),
            )

    def bits_per_byte(self, nats: Mapping[str, float]) -> dict[str, float]:
        """``heldout_bpb.NAME`` of each source and ``heldout_bpb`` of all bytes together; nats: summed loss by source.

        Sources that came during the run are not in the total, which would jump with each: unless no other has text.
        A real code length: the first token of a document, which nothing predicts, is charged ``log2(vocab_size)`` bits.
        """
        bits = {
            name: nats[name] / math.log(2) + self.num_unpredicted[name] * math.log2(self.vocab_size)
            for name in self.source_names
        }
        values = {f"heldout_bpb.{name}": bits[name] / self.bytes_of_text[name] for name in self.source_names}
        total = self._first or self.source_names
        whole = sum(bits[name] for name in total) / sum(self.bytes_of_text[name] for name in total)
        return {"heldout_bpb": whole, **values}


def _head(store: Store, tokenizer: Tokenizer, start: int, stop: int) -> tuple[int, int]:
    """How many tokens of ``[start, stop)``, a part of one document, spell whole characters, and in how many bytes."""
    tokens = store.tokens(start, stop - start)
    while (text := tokenizer.decode(tokens)).endswith("\ufffd"):
        tokens = tokens[:-1]
    return len(tokens), len(text.encode())
