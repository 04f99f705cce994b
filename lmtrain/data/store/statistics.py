"""What is in a store, in numbers: lengths of documents, use of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.counted import counted
from lmtrain.data.store.store import Store
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import DataError

SAMPLE_TOKENS = 1 << 16
SHOWN_IDS = 8
BAR = 30


@dataclass(frozen=True)
class Statistics:
    """Of one store.

    documents, tokens: int64 ``[k]``: how many documents hold between 2^(i-1) and 2^i - 1 tokens, and how many tokens
    these hold; class 0 are the empty ones. uses: int64 ``[vocab_size]``, how often each id occurs. byte_share: share of
    the tokens that stand for less than a character. bytes_per_token: UTF-8 bytes; sampled: of the first tokens only.
    """

    documents: NDArray[np.int64]
    tokens: NDArray[np.int64]
    uses: NDArray[np.int64]
    byte_share: float
    bytes_per_token: float
    sampled: bool

    @classmethod
    def of(cls, store: Store, tokenizer: Tokenizer, bytes_of_text: int | None) -> Statistics:
        """Reads the whole store. bytes_of_text: of all of it, if known. DataError for an id outside the vocabulary."""
        documents, tokens = np.zeros(65, dtype=np.int64), np.zeros(65, dtype=np.int64)
        for _, lengths in store.document_lengths():
            classes = np.frexp(lengths.astype(np.float64))[1]  # exact: lengths are far below 2^53
            documents += np.bincount(classes, minlength=65)
            tokens += np.bincount(classes, weights=lengths, minlength=65).astype(np.int64)
        uses = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        for start, ids in store.pieces():
            wrong = (ids < 0) | (ids >= len(uses))
            if wrong.any():
                raise store.out_of_range(start + int(wrong.argmax()), len(uses))
            uses += np.bincount(ids, minlength=len(uses))
        if bytes_of_text is None:
            sample = store.tokens(0, min(store.num_tokens, SAMPLE_TOKENS))
            size, count = len(tokenizer.decode(sample).encode()), len(sample)
        else:
            size, count = bytes_of_text, store.num_tokens
        byte_share = float(uses[tokenizer.byte_tokens()].sum()) / max(store.num_tokens, 1)
        return cls(documents, tokens, uses, byte_share, size / max(count, 1), bytes_of_text is None)

    def lines(self) -> list[str]:
        """The numbers as text, a histogram below them."""
        unused = np.flatnonzero(self.uses == 0)
        shown = " ".join(map(str, unused[:SHOWN_IDS])) + (" ..." if len(unused) > SHOWN_IDS else "")
        sampled = f" (of the first {SAMPLE_TOKENS:,} tokens)" if self.sampled else ""
        lines = [
            f"{counted(int(self.documents.sum()), 'document')} ({self.documents[0]:,} empty), "
            f"{counted(int(self.tokens.sum()), 'token')}",
            f"{self.bytes_per_token:.2f} bytes per token{sampled}",
            f"{self.byte_share:.2%} of the tokens stand for less than a character",
            f"{len(unused):,} of {len(self.uses):,} ids are never used{': ' if len(unused) else ''}{shown}",
            f"{'tokens in a document':>23}  {'documents':>9}  {'':<{BAR}}  share of tokens",
        ]
        used = np.flatnonzero(self.documents)
        for i in range(int(used[0]), int(used[-1]) + 1) if len(used) else ():
            low, high = (0, 0) if i == 0 else (2 ** (i - 1), 2**i - 1)
            bar = "#" * round(BAR * self.documents[i] / self.documents.max())
            share = self.tokens[i] / max(self.tokens.sum(), 1)
            lines.append(f"{low:>10,} - {high:>10,}  {self.documents[i]:>9,}  {bar:<{BAR}}  {share:>15.1%}")
        return lines


def sample_lines(store: Store, tokenizer: Tokenizer, documents: list[int]) -> list[str]:
    """Some documents as text, a line with their borders before each; special tokens appear as their text.

    Raises DataError for a document that is not there, or an id outside the vocabulary.
    """
    lines = []
    for j in documents:
        if not 0 <= j < store.num_documents:
            raise DataError(f"{store.prefix}: document {j}; it has {store.num_documents:,}, counted from 0")
        start, stop = store.borders.starts(j, j + 2).tolist()
        ends = "with" if stop > start and int(store.tokens(stop - 1, 1)[0]) == tokenizer.eod_id else "without"
        lines.append(f"document {j}: tokens [{start:,}, {stop:,}), ends {ends} {tokenizer.eod}")
        lines += [f"    {line}" for line in _beginning_and_end(store, tokenizer, start, stop)]
    return lines


def _beginning_and_end(store: Store, tokenizer: Tokenizer, start: int, stop: int) -> list[str]:
    """The tokens ``[start, stop)`` decoded, an escaped line per line; of many the first and the last."""
    first, last = 120, 40
    parts = [(start, stop)] if stop - start <= first + last else [(start, start + first), (stop - last, stop)]
    lines: list[str] = []
    for low, high in parts:
        ids = store.tokens(low, high - low)
        wrong = (ids < 0) | (ids >= tokenizer.vocab_size)
        if wrong.any():
            raise store.out_of_range(low + int(wrong.argmax()), tokenizer.vocab_size)
        if low != start:
            lines.append(f"... {stop - start - first - last:,} tokens ...")
        text = tokenizer.decode(ids)
        lines += ["".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in text.split("\n")]
    return lines
