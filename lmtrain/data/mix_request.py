"""What a person asks of a running mixture: ``control/mix.yaml``, or the words of launch/schedule.py; made an event.

weights: {code: 0.3}      # shares of the blocks; sources that are not named keep their proportions to one another
skip: 2e6                 # tokens to pass over unread, rounded up to whole blocks
add: {news: data/news}    # new sources; read once they get a share
at: 40e6                  # tokens of the run at which it takes effect, or +20e6 from now; default: at once
reason: less code         # kept in the log
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from lmtrain.data.sampler import Sampler
from lmtrain.data.schedule import AddedSource, Event
from lmtrain.data.sources import content_digest
from lmtrain.data.weights import integer_weights
from lmtrain.errors import UsageError, nearest

SCALES = {"k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}


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
        try:
            given = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(given, dict) or not given:
            raise UsageError(f"expected keys ({', '.join(READ)}) and values, got {str(given)[:60]!r}")
        for key in given:
            if key not in READ:
                raise UsageError(f"{key}: unknown key{nearest(str(key), READ)}")
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
                raise UsageError(f"add: {name!r} is no name; use letters, digits and _")
        sources = {name: AddedSource(path, content_digest(path)) for name, path in self.add.items()}
        shares = sampler.shares(first) | dict.fromkeys(sources, 0.0)
        weights = integer_weights(mixed(shares, self.weights)) if self.weights else {}
        return Event(first, "user", self.reason, weights, -(-self.skip // block_tokens), sources, step)


def mixed(shares: Mapping[str, float], wanted: Mapping[str, float]) -> dict[str, float]:
    """``shares`` by source with those of ``wanted``; the others keep their proportions and fill the rest.

    If nothing else is read, ``wanted`` are relative weights. Raises UsageError for unknown names and impossible shares.
    """
    for name, share in wanted.items():
        if name not in shares:
            raise UsageError(f"weights.{name}: no source of this run{nearest(name, shares)}")
        if not (math.isfinite(share) and share >= 0):
            raise UsageError(f"weights.{name}: expected a share of at least 0, got {share}")
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


def tokens_of(key: str, value: Any) -> int:
    """A number of tokens: 2000000, 2e6 or 2M."""
    text = str(value).replace("_", "").replace(",", "").strip()
    scale = SCALES.get(text[-1:].lower(), 1)
    try:
        number = float(text[:-1] if scale > 1 else text) * scale
    except ValueError:
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number) or number < 0 or number != int(number):
        raise UsageError(f"{key}: expected a number of tokens (2000000, 2e6, 2M), got {value!r}")
    return int(number)


def _at(key: str, value: Any) -> tuple[int, bool]:
    relative = isinstance(value, str) and value.startswith("+")
    return tokens_of(key, value[1:] if relative else value), relative


def _shares(key: str, value: Any) -> dict[str, float]:
    shares = {}
    for name, share in _mapping(key, value).items():
        try:
            shares[name] = float(share)
        except (TypeError, ValueError):
            raise UsageError(f"{key}.{name}: expected a share, got {share!r}") from None
    return shares


def _paths(key: str, value: Any) -> dict[str, str]:
    paths = _mapping(key, value)
    for name, path in paths.items():
        if not isinstance(path, str):
            raise UsageError(f"{key}.{name}: expected a path, got {path!r}")
    return paths


def _mapping(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise UsageError(f"{key}: expected {{source: value}}, got {value!r}")
    return {str(name): part for name, part in value.items()}


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{key}: expected text, got {value!r}")
    return value


READ: dict[str, Callable[[str, Any], Any]] = {
    "weights": _shares,
    "skip": tokens_of,
    "add": _paths,
    "at": _at,
    "reason": _text,
}
"""The keys of a request, each with what reads its value."""
