"""What a person asks of a running mixture: ``control/mix.yaml``, or the words of launch/schedule.py; made an event.

Its text is read as in request_text.py: a text is never taken for a date or a bool.

weights: {code: 0.3}      # shares of the blocks; sources that are not named keep their proportions to one another
skip: 2e6                 # tokens to pass over unread, rounded up to whole blocks
add: {news: data/news/news, recall: lmtrain.eval.probes.mqar:mqar}    # new sources; read once they get a share
arguments: {recall.pairs: 4, recall.length: 64}    # of a source that is a function: SOURCE.ARGUMENT
at: 40e6                  # tokens of the run at which it takes effect, or +20e6 from now; default: at once
reason: less code         # kept in the log
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmtrain.data.catalog import added_source, is_function
from lmtrain.data.order.request_text import Given, pairs_of, shown
from lmtrain.data.order.sampler import Sampler
from lmtrain.data.order.schedule import Event
from lmtrain.data.order.weights import integer_weights
from lmtrain.errors import UsageError, nearest

SCALES = {"k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
MAX_SHARE = 1e9
Value = int | float | str | bool
"""Of a function's argument."""


@dataclass(frozen=True)
class MixRequest:
    """weights: shares by source. skip: tokens. add: paths, or functions (package.module:function), by name. at: tokens,
    and whether they count from now. arguments: of the functions, by source and argument.
    """

    weights: dict[str, float] = field(default_factory=dict)
    skip: int = 0
    add: dict[str, str] = field(default_factory=dict)
    at: tuple[int, bool] | None = None
    reason: str = ""
    arguments: dict[str, dict[str, Value]] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> MixRequest:
        """Raises UsageError, naming the key, for what is not a request."""
        given = pairs_of(text, READ)
        for key in given:
            if key not in READ:
                raise UsageError(f"{shown(key)}: unknown key{nearest(key, READ)}")
        request = cls(**{key: READ[key](key, value) for key, value in given.items()})
        if not (request.weights or request.skip or request.add):
            raise UsageError("nothing to do: give weights, skip or add")
        functions = [name for name, where in request.add.items() if is_function(where)]
        for name in request.arguments:
            if name not in functions:
                raise UsageError(
                    f"arguments.{shown(name)}: add names no function of that name{nearest(name, functions)}"
                )
        return request

    def event(self, sampler: Sampler, *, block_tokens: int, earliest: int, end: int, now: int, step: int) -> Event:
        """The event that does it. sampler: the order so far. earliest: the first block that may change; end: the first
        that the run does not read. now: tokens read so far. step: optimizer steps done.

        Raises UsageError or DataError for what cannot be done.
        """
        first = earliest
        if self.at is not None:
            tokens = self.at[0] + (now if self.at[1] else 0)
            first = sampler.next_change(-(-tokens // block_tokens))
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
        sources = {name: added_source(name, where, self.arguments.get(name, {})) for name, where in self.add.items()}
        shares = sampler.shares(first) | dict.fromkeys(sources, 0.0)
        weights = integer_weights(mixed(shares, self.weights)) if self.weights else {}
        return Event(first, "user", self.reason, weights, skip, sources, step)


def mixed(shares: Mapping[str, float], wanted: Mapping[str, float]) -> dict[str, float]:
    """``shares`` by source with those of ``wanted``; the others keep their proportions and fill the rest.

    If nothing else is read, ``wanted`` are relative weights. Raises UsageError for unknown names and impossible shares.
    """
    for name, share in wanted.items():
        if name not in shares:
            raise UsageError(f"weights.{shown(name)}: no source of this run{nearest(name, shares)}")
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
            raise UsageError(f"{key}.{shown(name)}: expected a share, got {reprlib.repr(share)}") from None
    return shares


def located(where: str) -> str:
    """A function as it is, a path absolute: other processes, and later attempts, may have another working folder."""
    return where if is_function(where) else str(Path(where).absolute())


def _places(key: str, value: Given) -> dict[str, str]:
    places = _mapping(key, value)
    for name, where in places.items():
        if not where or not where.isprintable():
            raise UsageError(
                f"{key}.{shown(name)}: expected a path or package.module:function, got {reprlib.repr(where)}"
            )
    return {name: located(where) for name, where in places.items()}


def _arguments(key: str, value: Given) -> dict[str, dict[str, Value]]:
    arguments: dict[str, dict[str, Value]] = {}
    for name, text in _mapping(key, value).items():
        source, _, argument = name.partition(".")
        if not (source.isidentifier() and argument.isidentifier()):
            raise UsageError(f"{key}: expected {{SOURCE.ARGUMENT: value}}, got {reprlib.repr(name)}")
        arguments.setdefault(source, {})[argument] = _value(text)
    return arguments


def _value(text: str) -> Value:
    """A number or true or false, written as in JSON; else the text itself."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)) else text


def _mapping(key: str, value: Given) -> dict[str, str]:
    if not isinstance(value, dict) or not value:
        raise UsageError(f"{key}: expected {{source: value}}, got {reprlib.repr(value)}")
    return value


def _text(key: str, value: Given) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{key}: expected text, got {reprlib.repr(value)}")
    return value


READ: dict[str, Callable[[str, Any], Any]] = {
    "weights": _shares,
    "skip": tokens_of,
    "add": _places,
    "arguments": _arguments,
    "at": _at,
    "reason": _text,
}
"""The keys of a request, each with what reads its value."""
