"""Rules by which running English prose is told from the rest (Gopher, Rae et al. 2021, table A1).

They delete code, tables, man pages and other languages: a switch per source, off by default.
"""

from __future__ import annotations

import re
from collections import Counter

STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
RULES = (
    "words", "word_length", "symbols", "bullets", "ellipses", "letters", "stop_words", "duplicate_lines",
    "duplicate_paragraphs", "top_2_gram", "top_3_gram", "top_4_gram", "duplicate_5_gram", "duplicate_6_gram",
    "duplicate_7_gram", "duplicate_8_gram", "duplicate_9_gram", "duplicate_10_gram",
)  # fmt: skip
"""Names of the rules, in the order in which they are tried."""
TOP = {2: 0.20, 3: 0.18, 4: 0.16}
"""Characters of the most frequent n-gram, as a share of the characters of all words."""
DUPLICATE = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
"""Characters inside n-grams that occurred before, as a share of the characters of all words."""


def broken_rule(text: str) -> str | None:
    """The first of ``RULES`` that the text breaks; None: it reads like prose."""
    words = text.split()
    if not 50 <= len(words) <= 100_000:
        return "words"
    characters = sum(map(len, words))
    if not 3 <= characters / len(words) <= 10:
        return "word_length"
    if (text.count("#") + text.count("...") + text.count("\u2026")) / len(words) > 0.1:
        return "symbols"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if sum(line.startswith(("\u2022", "-", "*")) for line in lines) > 0.9 * len(lines):
        return "bullets"
    if sum(line.endswith(("...", "\u2026")) for line in lines) > 0.3 * len(lines):
        return "ellipses"
    if sum(any(map(str.isalpha, word)) for word in words) < 0.8 * len(words):
        return "letters"
    if len(STOP_WORDS & set(re.findall(r"\w+", text.lower()))) < 2:
        return "stop_words"
    if _repeated(lines) > 0.3:
        return "duplicate_lines"
    if _repeated([part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]) > 0.3:
        return "duplicate_paragraphs"
    return _repetition(words, characters)


def _repeated(parts: list[str]) -> float:
    """Share of the parts that equal an earlier one."""
    return 1 - len(set(parts)) / len(parts)


def _repetition(words: list[str], characters: int) -> str | None:
    for n, limit in TOP.items():
        grams = Counter(zip(*(words[i:] for i in range(n)), strict=False))
        gram, count = grams.most_common(1)[0]
        if count > 1 and count * sum(map(len, gram)) > limit * characters:
            return f"top_{n}_gram"
    for n, limit in DUPLICATE.items():
        if _characters_seen_before(words, n) > limit * characters:
            return f"duplicate_{n}_gram"
    return None


def _characters_seen_before(words: list[str], n: int) -> int:
    """Characters of the words inside an n-gram that occurred before; each word counts once."""
    seen: set[tuple[str, ...]] = set()
    total = covered = 0
    for i, gram in enumerate(zip(*(words[j:] for j in range(n)), strict=False)):
        if gram in seen:
            total += sum(map(len, words[max(i, covered) : i + n]))
            covered = i + n
        seen.add(gram)
    return total
