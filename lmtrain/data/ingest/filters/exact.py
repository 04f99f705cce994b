"""Which documents are the same."""

from __future__ import annotations

import unicodedata

import xxhash


def text_digest(text: str) -> bytes:
    """16 bytes, xxh3-128 of the text after NFC, lower-casing and collapsing of white space."""
    return xxhash.xxh3_128_digest(" ".join(unicodedata.normalize("NFC", text).lower().split()).encode())
