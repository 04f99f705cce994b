"""The pattern string of a model: names, repetition ``n * name`` and groups ``n * (a b c)``."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lmtrain.errors import UsageError, nearest

_TOKEN = re.compile(r"\s*(?:(?P<number>\d+)\s*\*|(?P<name>[A-Za-z_]\w*)|(?P<open>\()|(?P<close>\)))")


def expand(pattern: str | list[str], known: Iterable[str]) -> list[str]:
    """Branch names in order.

    >>> expand("2 * (ssm mlp) local", ["ssm", "mlp", "local"])
    ['ssm', 'mlp', 'ssm', 'mlp', 'local']

    Raises UsageError that points at the character: an unknown name, an unclosed group, a repetition of nothing.
    """
    names = set(known)
    if isinstance(pattern, list):
        for index, name in enumerate(pattern):
            if name not in names:
                raise UsageError(f"model.pattern: entry {index}: no branch is named {name!r}{nearest(name, names)}")
        order = list(pattern)
    else:
        order, end = _sequence(pattern, 0, 0, names)
        if end != len(pattern):
            raise _error(pattern, end, "unmatched )")
    if not order:
        raise UsageError("model.pattern: no branches; expected names from model.branches, e.g. '2 * (ssm mlp)'")
    return order


def _sequence(text: str, at: int, depth: int, names: set[str]) -> tuple[list[str], int]:
    order: list[str] = []
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
            if match["name"] not in names:
                raise _error(text, start, f"no branch is named {match['name']!r}{nearest(match['name'], names)}")
            group = [match["name"]]
        order += group * (1 if repeat is None else repeat)
        repeat = None
    if repeat is not None:
        raise _error(text, repeat_at, "nothing to repeat")
    return order, len(text) if not text[at:].strip() else at


def _error(text: str, at: int, why: str) -> UsageError:
    return UsageError(f"model.pattern: character {at + 1}: {why}\n  {text}\n  {' ' * at}^")
