"""The pattern string of a model: names, ``a + b`` side by side, repetition ``n * name``, groups ``n * (a b c)``."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lmtrain.errors import UsageError, nearest

_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+)\s*\*|(?P<name>[A-Za-z_]\w*(?:\s*\+\s*[A-Za-z_]\w*)*)|(?P<open>\()|(?P<close>\)))"
)
Blocks = list[tuple[str, ...]]


def expand(pattern: str | list[str], known: Iterable[str]) -> Blocks:
    """The blocks in order: names of one branch each, or of several side by side.

    >>> expand("2 * (ssm mlp) ssm + local", ["ssm", "mlp", "local"])
    [('ssm',), ('mlp',), ('ssm',), ('mlp',), ('ssm', 'local')]

    Raises UsageError that points at the character: an unknown name, an unclosed group, a repetition of nothing.
    """
    names = set(known)
    if isinstance(pattern, list):
        order = [tuple(_names(entry)) for entry in pattern]
        for index, block in enumerate(order):
            if unknown := [name for name in block if name not in names]:
                told = f"no branch is named {unknown[0]!r}{nearest(unknown[0], names)}"
                raise UsageError(f"model.pattern: entry {index}: {told}")
    else:
        order, end = _sequence(pattern, 0, 0, names)
        if end != len(pattern):
            raise _error(pattern, end, "unmatched )")
    if not order:
        raise UsageError("model.pattern: no branches; expected names from model.branches, e.g. '2 * (ssm mlp)'")
    return order


def _names(entry: str) -> list[str]:
    return [name.strip() for name in entry.split("+")]


def _sequence(text: str, at: int, depth: int, names: set[str]) -> tuple[Blocks, int]:
    order: Blocks = []
    repeat: int | None = None
    repeat_at = at
    while text[at:].strip():
        match = _TOKEN.match(text, at)
        if match is None:
            raise _error(text, at + len(text[at:]) - len(text[at:].lstrip()), "expected a name, 'n *' or '('")
        start, at = match.start(match.lastgroup or 0), match.end()
        if match["close"]:
            if depth == 0:
                raise _error(text, start, "unmatched )")
            at = start
            break
        if match["number"]:
            if repeat is not None:
                raise _error(text, start, "a repetition of a repetition")
            repeat, repeat_at = int(match["number"]), start
            continue
        if match["open"]:
            group, at = _sequence(text, at, depth + 1, names)
            if at >= len(text) or text[at] != ")":
                raise _error(text, start, "this ( is not closed")
            at += 1
        else:
            block = _names(match["name"])
            for name in block:
                if name not in names:
                    place = start + match["name"].index(name)
                    raise _error(text, place, f"no branch is named {name!r}{nearest(name, names)}")
            group = [tuple(block)]
        order += group * (1 if repeat is None else repeat)
        repeat = None
    if repeat is not None:
        raise _error(text, repeat_at, "nothing to repeat")
    return order, len(text) if not text[at:].strip() else at


def _error(text: str, at: int, why: str) -> UsageError:
    return UsageError(f"model.pattern: character {at + 1}: {why}\n  {text}\n  {' ' * at}^")
