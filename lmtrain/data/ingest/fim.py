"""Fill-in-the-middle: some documents are written as prefix, suffix, middle (Bavarian et al. 2022), cut at characters.

Which documents and where is a hash of seed and document: not of order, workers or a generator's state.
"""

from __future__ import annotations

from typing import NamedTuple

import xxhash

from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import DataError

NAMES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),
)
"""As Qwen, StarCoder and Code Llama call them; a tokenizer that is trained here gets the first three."""


class FimTokens(NamedTuple):
    """Ids of the three marks."""

    prefix: int
    suffix: int
    middle: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> FimTokens:
        """The marks a tokenizer knows. DataError if it has none, or makes them from text."""
        for names in NAMES:
            ids = [tokenizer.token_id(name) for name in names]
            if None not in ids:
                for name in names:
                    if tokenizer.token_id(name) in tokenizer.encode_batch([f"a{name}b"])[0]:
                        raise DataError(f"{tokenizer.path}: fim_rate: text that spells {name!r} becomes that token")
                return cls(*(number for number in ids if number is not None))
        raise DataError(
            f"{tokenizer.path}: fim_rate: it lacks the tokens {', '.join(NAMES[0])} (or StarCoder's, Code Llama's); "
            "train:N makes a tokenizer that has them"
        )


def rearranged(text: str, digest: bytes, rate: float, seed: int, marks: FimTokens) -> list[int | str] | None:
    """Marks and parts of the text in the order in which they are written; None: the document stays as it is.

    Half of them prefix, suffix, middle; half with the suffix first (SPM, the variant that keeps prefix and middle
    together). digest: of the document.
    """
    drawn = xxhash.xxh3_128_digest(seed.to_bytes(8, "little", signed=True) + digest)
    chosen, order, first, second = (int.from_bytes(drawn[i : i + 4], "little") / 2**32 for i in range(0, 16, 4))
    if chosen >= rate:
        return None
    low, high = sorted(int(part * (len(text) + 1)) for part in (first, second))
    prefix, middle, suffix = text[:low], text[low:high], text[high:]
    if order < 0.5:
        return [marks.prefix, prefix, marks.suffix, suffix, marks.middle, middle]
    return [marks.prefix, marks.suffix, suffix, marks.middle, prefix, middle]
