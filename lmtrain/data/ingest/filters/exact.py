"""Which documents are the same."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

import xxhash

PIECE = 1 << 20
"""Characters normalised at once: the words of a long document, all in memory, would be several times its size."""


def text_digest(text: str) -> bytes:
    """16 bytes, xxh3-128 of the text after NFC, lower-casing and collapsing of white space."""
    digest = xxhash.xxh3_128()
    between = ""
    for piece in _pieces(text):
        if words := unicodedata.normalize("NFC", piece).lower().split():
            digest.update((between + " ".join(words)).encode())
            between = " "
    return digest.digest()


def _pieces(text: str) -> Iterator[str]:
    """The text, cut before blanks and ends of lines: no rule of Unicode composes or lowers across these."""
    at = 0
    while len(text) - at > PIECE:
        cut = max(text.rfind(blank, at + 1, at + PIECE) for blank in " \n")
        if cut < 0:  # a word of a million characters
            cut = min((found for blank in " \n" if (found := text.find(blank, at + PIECE)) > 0), default=len(text))
        yield text[at:cut]
        at = cut
    yield text[at:]
