"""Numbers, durations and nested facts as a person reads them."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmtrain.train.environment import redact


def quantity(value: float) -> str:
    """``742,213``, ``1.02 million``, ``20.5 billion``: below a million exact, above it three digits."""
    for limit, word in ((1e12, " trillion"), (1e9, " billion"), (1e6, " million")):
        if abs(value) >= 0.9995 * limit:
            return f"{significant(value / limit)}{word}"
    return f"{value:,.0f}"


def short(value: float) -> str:
    """The same for an axis: ``0``, ``250k``, ``1.5M``, ``0.002``, ``2e-5``."""
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * limit:
            return f"{value / limit:.4g}{letter}"
    return f"{value:.4g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.3g}".replace("e-0", "e-")


def significant(value: float) -> str:
    """Three digits that matter, never an exponent for what is near 1."""
    if value == 0 or not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def duration(seconds: float) -> str:
    """Two units at most: ``12 s``, ``5 min 8 s``, ``3 h 20 min``, ``1 d 4 h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if seconds >= 10 else f"{seconds:.1f} s"
    for size, word, smaller, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {word}" + (f" {rest} {part}" if rest else "")
    raise AssertionError("a minute at least")


def moment(time_unix: float | None) -> str:
    """A time in UTC, to the second."""
    if time_unix is None:
        return "unknown"
    return datetime.datetime.fromtimestamp(time_unix, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def listing(words: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def value_text(value: Any) -> str:
    """A leaf of a JSON file as text."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    return ", ".join(map(value_text, value)) if isinstance(value, list | tuple) else str(value)


@dataclass(frozen=True)
class Table:
    """Facts as text. ``columns`` is empty for rows of name and value. numbers: indices of columns set flush right."""

    title: str
    rows: list[list[str]]
    columns: list[str] = field(default_factory=list)
    numbers: Sequence[int] = ()


def tables(content: Mapping[str, Any], title: str = "") -> list[Table]:
    """Nested facts of any shape: names and values with dotted keys, and a table of its own per list of mappings."""
    rows: list[list[str]] = []
    apart: list[Table] = []
    _collect(content, "", title, rows, apart)
    return ([Table(title, rows)] if rows else []) + apart


def _collect(content: Mapping[str, Any], prefix: str, title: str, rows: list[list[str]], apart: list[Table]) -> None:
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            _collect(value, f"{name}.", title, rows, apart)
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            columns = list(dict.fromkeys(str(column) for item in value for column in item))
            cells = [[value_text(item.get(column)) for column in columns] for item in value]
            apart.append(Table(f"{title}: {name}" if title else name, cells, columns))
        elif name != "format_version":
            when = key == "time_unix" and isinstance(value, int | float)
            rows.append([name, moment(value) if when else "none" if value == {} else value_text(value)])


def cleaned(value: Any) -> Any:
    """``value`` with ``redact`` applied to every string in it."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {key: cleaned(part) for key, part in value.items()}
    return [cleaned(part) for part in value] if isinstance(value, list | tuple) else value
