"""The same byte-level BPE as a tokenizer.json, run by tiktoken where it is installed: several times as fast.

Not every tokenizer.json can be run so, and that the ids are the same is shown on text (``Tokenizer.accelerate``).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What ByteLevel(use_regex=True) splits by."""
BLANKS = 10_000
"""On longer runs of white space tiktoken's pattern engine overflows its stack (it backtracks)."""


class NotSupported(Exception):
    """Why tiktoken cannot run this tokenizer, as a clause."""


class TiktokenEngine:
    """spec: the content of a tokenizer.json. Raises NotSupported."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        try:
            import tiktoken
        except ImportError:
            raise NotSupported("tiktoken is not installed") from None
        pattern, model = _pattern(spec), spec["model"]
        ordinary = [token["content"] for token in spec.get("added_tokens", []) if not token["special"]]
        if spec.get("normalizer") is not None:
            raise NotSupported("it has a normalizer")
        if model.get("type") != "BPE" or model.get("dropout") or model.get("byte_fallback"):
            raise NotSupported("its model is not plain byte-level BPE")
        if ordinary:
            raise NotSupported(f"it has added tokens that are not special ({ordinary[0]!r})")
        special = {token["content"] for token in spec.get("added_tokens", [])}
        known = byte_of_character()
        ranks = {}
        for token, number in model["vocab"].items():
            if token not in special:
                if not set(token) <= known.keys():
                    raise NotSupported(f"its token {token!r} does not stand for bytes")
                ranks[bytes(known[character] for character in token)] = number
        if not all(bytes([byte]) in ranks for byte in range(256)):
            raise NotSupported("it lacks tokens of single bytes")
        # Never made, since it is never allowed; with no special token at all tiktoken looks for "" at every byte.
        special_tokens = {"<|special|>": max(ranks.values()) + 1}
        try:
            self._encoding = tiktoken.Encoding(
                "lmtrain", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens
            )
        except ValueError as error:
            raise NotSupported(f"tiktoken refuses it: {error}") from None

    def encode(self, text: str) -> NDArray[np.integer] | None:
        """Ids of a text; None where it holds what tiktoken cannot take."""
        if _long_blank(text):
            return None
        return self._encoding.encode_to_numpy(text, disallowed_special=())


def _pattern(spec: Mapping[str, Any]) -> str:
    """The regular expression that cuts text into what BPE is run on."""
    first = spec.get("pre_tokenizer") or {}
    steps = first.get("pretokenizers", [first])
    last = steps[-1]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if len(steps) == 1 and last.get("use_regex", True):
            return GPT2
        split = steps[0]
        cuts = len(steps) == 2 and not last.get("use_regex", True) and split.get("type") == "Split"
        if cuts and split["behavior"] == "Isolated" and not split["invert"] and "Regex" in split["pattern"]:
            return str(split["pattern"]["Regex"])
    raise NotSupported("its pre-tokenizer is not one split followed by bytes")


def _long_blank(text: str) -> bool:
    """Whether there is a run of BLANKS blanks; now and then true of a shorter one, which costs only time."""
    step = BLANKS // 2
    blank = [character.isspace() for character in text[::step]]
    return any(
        here and after and text[i * step : (i + 1) * step].isspace() for i, (here, after) in enumerate(pairwise(blank))
    )


@cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's table of printable characters that stand for bytes: 188 for themselves, the rest from U+0100 on."""
    own = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): byte for i, byte in enumerate(rest)}
