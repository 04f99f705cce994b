"""The YAML of a request: keys with a text or one level of ``{name: text}``, and nothing else that YAML can do."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Iterator
from typing import Any

import yaml

from lmtrain.errors import UsageError

MAX_LENGTH = 1 << 16
"""Characters of a request."""
Given = str | dict[str, str]
"""The value of a key, as it is written."""


def shown(name: str) -> str:
    """For a message of one line."""
    return name if name.isidentifier() else reprlib.repr(name)


def pairs_of(text: str, known: Iterable[str]) -> dict[str, Given]:
    """The keys of ``text`` and their values; those ``known`` are named in errors. Raises UsageError for anything else,
    before it costs time or memory.
    """
    if len(text) > MAX_LENGTH:
        raise UsageError(f"expected at most {MAX_LENGTH:,} characters, got {len(text):,}")
    events = _events(text)
    first = next(event for event in events if not isinstance(event, (yaml.StreamStartEvent, yaml.DocumentStartEvent)))
    if not isinstance(first, yaml.MappingStartEvent):
        raise UsageError(f"expected keys ({', '.join(known)}) and values, got {reprlib.repr(text)}")
    pairs = _pairs(events, nested=False)
    if not isinstance(next(events), yaml.DocumentEndEvent) or not isinstance(next(events), yaml.StreamEndEvent):
        raise UsageError("expected one YAML document, got more")
    return pairs


def _events(text: str) -> Iterator[Any]:
    """Of the parser, which unlike yaml.load neither nests calls, follows aliases nor makes values of what it reads."""
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if getattr(event, "tag", None) or getattr(event, "anchor", None):
                line = event.start_mark.line + 1 if event.start_mark else 0
                raise UsageError(f"line {line}: YAML tags, anchors and aliases are not read here")
            yield event
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # chr() and int() of escapes and directives
        raise UsageError(f"not YAML: {' '.join(str(error).split())}") from None


def _place(event: Any) -> str:
    return f"line {event.start_mark.line + 1}"


def _pairs(events: Iterator[Any], *, nested: bool) -> dict[str, Any]:
    """The mapping that has begun."""
    pairs: dict[str, Any] = {}
    while not isinstance(key := next(events), yaml.MappingEndEvent):
        value = next(events) if isinstance(key, yaml.ScalarEvent) else key
        if isinstance(value, yaml.ScalarEvent):
            read: Any = value.value
        elif isinstance(value, yaml.MappingStartEvent) and value is not key and not nested:
            read = _pairs(events, nested=True)
        else:
            raise UsageError(f"{_place(value)}: expected KEY: TEXT or KEY: {{NAME: TEXT}}, got a list or deeper levels")
        if key.value in pairs:
            raise UsageError(f"{_place(key)}: {shown(key.value)} is given twice")
        pairs[key.value] = read
    return pairs
