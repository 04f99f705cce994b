"""What a person asks of a running mixture: ``control/mix.yaml``, or the words of launch/schedule.py; made an event.

YAML of one form: keys with a text or with one level of ``{name: text}``; a text is never taken for a date or a bool.

weights: {code: 0.3}      # shares of the blocks; sources that are not named keep their proportions to one another
skip: 2e6                 # tokens to pass over unread, rounded up to whole blocks
add: {news: data/news/news}    # new sources; read once they get a share
at: 40e6                  # tokens of the run at which it takes effect, or +20e6 from now; default: at once
reason: less code         # kept in the log
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lmtrain.data.order.sampler import Sampler
from lmtrain.data.order.schedule import AddedSource, Event
from lmtrain.data.order.weights import integer_weights
from lmtrain.data.sources import content_digest
from lmtrain.errors import UsageError, nearest

SCALES = {"k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
MAX_LENGTH = 1 << 16
"""Characters of a request."""
MAX_SHARE = 1e9
Given = str | dict[str, str]
"""The value of a key, as it is written."""


@dataclass(frozen=True)
class MixRequest:
    """weights: shares by source. skip: tokens. add: paths by name. at: tokens, and whether they count from now."""

    weights: dict[str, float] = field(default_factory=dict)
    skip: int = 0
    add: dict[str, str] = field(default_factory=dict)
    at: tuple[int, bool] | None = None
    reason: str = ""

    @classmethod
    def parse(cls, text: str) -> MixRequest:
        """Raises UsageError, naming the key, for what is not a request."""
        given = _read(text)
        for key in given:
            if key not in READ:
                raise UsageError(f"{_shown(key)}: unknown key{nearest(key, READ)}")
        request = cls(**{key: READ[key](key, value) for key, value in given.items()})
        if not (request.weights or request.skip or request.add):
            raise UsageError("nothing to do: give weights, skip or add")
        return request

    def event(self, sampler: Sampler, *, block_tokens: int, earliest: int, end: int, now: int, step: int) -> Event:
        """The event that does it. sampler: the order so far. earliest: the first block that may change; end: the first
        that the run does not read. now: tokens read so far. step: optimizer steps done.

        Raises UsageError or DataError for what cannot be done.
        """
        first = earliest
        if self.at is not None:
            tokens = self.at[0] + (now if self.at[1] else 0)
            first = -(-tokens // block_tokens)
            if first < earliest:
                raise UsageError(
                    f"at: {tokens:,} tokens is too early; the first that can still change are at "
                    f"{earliest * block_tokens:,}"
                )
        if first >= end:
            raise UsageError(
                f"nothing would change: it would take effect at {first * block_tokens:,} tokens, the run ends at "
                f"{end * block_tokens:,}"
            )
        for name in self.add:
            if name in sampler.names:
                raise UsageError(f"add.{name}: there is a source of that name; give the new one another")
            if not name.isidentifier():
                raise UsageError(f"add: {reprlib.repr(name)} is no name; use letters, digits and _")
        skip = -(-self.skip // block_tokens)
        if skip > end:
            raise UsageError(
                f"skip: {skip * block_tokens:,} tokens are more than the run reads in all, {end * block_tokens:,}"
            )
        sources = {name: AddedSource(path, content_digest(path)) for name, path in self.add.items()}
        shares = sampler.shares(first) | dict.fromkeys(sources, 0.0)
        weights = integer_weights(mixed(shares, self.weights)) if self.weights else {}
        return Event(first, "user", self.reason, weights, skip, sources, step)


def mixed(shares: Mapping[str, float], wanted: Mapping[str, float]) -> dict[str, float]:
    """``shares`` by source with those of ``wanted``; the others keep their proportions and fill the rest.

    If nothing else is read, ``wanted`` are relative weights. Raises UsageError for unknown names and impossible shares.
    """
    for name, share in wanted.items():
        if name not in shares:
            raise UsageError(f"weights.{_shown(name)}: no source of this run{nearest(name, shares)}")
        if not 0 <= share <= MAX_SHARE:
            raise UsageError(f"weights.{name}: expected a share from 0 to {MAX_SHARE:g}, got {share}")
    others = {name: share for name, share in shares.items() if name not in wanted and share > 0}
    total = math.fsum(wanted.values())
    if not others:
        if total == 0:
            raise UsageError(
                f"weights: nothing would be read: {', '.join(wanted)} get 0 and no other source has a share"
            )
        return dict(wanted)
    if total > 1:
        raise UsageError(
            f"weights: shares of {', '.join(wanted)} sum to {total:g}, more than the whole; {', '.join(others)} are "
            "read too (give them a share of 0, or all sources one)"
        )
    rest = (1 - total) / math.fsum(others.values())
    return dict(wanted) | {name: share * rest for name, share in others.items()}


def tokens_of(key: str, value: Given) -> int:
    """A number of tokens: 2000000, 2e6 or 2M."""
    text = _text(key, value).replace("_", "").replace(",", "").strip()
    scale = SCALES.get(text[-1:].lower(), 1)
    try:
        number = float(text[:-1] if scale > 1 else text) * scale
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number < 0 or number != int(number):
        raise UsageError(f"{key}: expected a number of tokens (2000000, 2e6, 2M), got {reprlib.repr(value)}")
    return int(number)


def _at(key: str, value: Given) -> tuple[int, bool]:
    text = _text(key, value)
    return tokens_of(key, text.removeprefix("+")), text.startswith("+")


def _shares(key: str, value: Given) -> dict[str, float]:
    shares = {}
    for name, share in _mapping(key, value).items():
        try:
            shares[name] = float(share)
        except ValueError:
            raise UsageError(f"{key}.{_shown(name)}: expected a share, got {reprlib.repr(share)}") from None
    return shares


def _paths(key: str, value: Given) -> dict[str, str]:
    """Absolute: other processes, and later attempts, may have another working folder."""
    paths = _mapping(key, value)
    for name, path in paths.items():
        if not path or not path.isprintable():
            raise UsageError(f"{key}.{_shown(name)}: expected a path, got {reprlib.repr(path)}")
    return {name: str(Path(path).absolute()) for name, path in paths.items()}


def _mapping(key: str, value: Given) -> dict[str, str]:
    if not isinstance(value, dict) or not value:
        raise UsageError(f"{key}: expected {{source: value}}, got {reprlib.repr(value)}")
    return value


def _text(key: str, value: Given) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{key}: expected text, got {reprlib.repr(value)}")
    return value


def _shown(name: str) -> str:
    """For a message of one line."""
    return name if name.isidentifier() else reprlib.repr(name)


def _read(text: str) -> dict[str, Given]:
    """The keys of ``text`` and their values. Raises UsageError for anything else, before it costs time or memory."""
    if len(text) > MAX_LENGTH:
        raise UsageError(f"expected at most {MAX_LENGTH:,} characters, got {len(text):,}")
    events = _events(text)
    first = next(event for event in events if not isinstance(event, (yaml.StreamStartEvent, yaml.DocumentStartEvent)))
    if not isinstance(first, yaml.MappingStartEvent):
        raise UsageError(f"expected keys ({', '.join(READ)}) and values, got {reprlib.repr(text)}")
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
            raise UsageError(f"{_place(key)}: {_shown(key.value)} is given twice")
        pairs[key.value] = read
    return pairs


READ: dict[str, Callable[[str, Any], Any]] = {
    "weights": _shares,
    "skip": tokens_of,
    "add": _paths,
    "at": _at,
    "reason": _text,
}
"""The keys of a request, each with what reads its value."""
