"""From a plain tree to settings: strict types by pydantic, and one sentence for the first thing that is wrong."""

from __future__ import annotations

import difflib
import json
import math
import typing
from collections.abc import Iterable
from functools import cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from lmtrain.config.files import Tree
from lmtrain.config.recipe import RENAMED, SECTIONS, Recipe, branch_kinds, keys
from lmtrain.config.schema import accepts, keys_of, step, words
from lmtrain.errors import UsageError, nearest

_ORDER = ("unexpected_keyword_argument", "", "missing", "value_error")
"""What is told first: a misspelt key explains a missing one, and rules between keys come last."""


@cache
def _adapter(cls: type) -> TypeAdapter[Any]:
    # Behind a dict, because a TypeAdapter refuses a config for a dataclass itself; it reaches nested ones this way.
    return TypeAdapter(dict[str, cls], config=ConfigDict(extra="forbid"))  # type: ignore[valid-type]


def build(tree: Tree, raw: dict[str, Any]) -> Any:
    """The section's settings of a resolved tree. Raises UsageError citing key, origin, expected and given value."""
    plain = _plain(tree, raw, "")
    branches = plain.get("model", {}).get("branches") if isinstance(plain.get("model"), dict) else None
    settings = _build(tree, SECTIONS[tree.section], plain, "")
    if isinstance(settings, Recipe) and isinstance(branches, dict):
        for name in branches:
            settings.model.branches[name] = _branch(tree, name, branches)
    return settings


def _branch(tree: Tree, name: str, branches: dict[str, Any]) -> Any:
    key, raw, kinds = f"model.branches.{name}", branches[name], branch_kinds()
    kind = raw.get("kind") if isinstance(raw, dict) else None
    if not isinstance(kind, str):
        wanted = f"expected a kind and its settings, e.g. {{kind: {next(iter(kinds))}}}"
        raise tree.error(key, f"{wanted}, got {_show(raw)}{_misspelt(name, branches)}")
    if kind not in kinds:
        raise tree.error(f"{key}.kind", f"unknown kind {kind}{nearest(kind, kinds)}")
    return _build(tree, kinds[kind], raw, f"{key}.")


def _build(tree: Tree, cls: type, raw: dict[str, Any], prefix: str) -> Any:
    found: list[_Wrong] = []
    try:
        # Through JSON, where a list is a tuple and nothing else is converted under strict.
        return _adapter(cls).validate_json(json.dumps({"": raw}), strict=True)[""]
    except ValidationError as error:
        found = [_Wrong(cls, details) for details in error.errors()]
    except UsageError as error:  # a rule of a branch's settings, told as "kind: field: what is wrong"
        where, message = _field(cls, str(error).removeprefix(f"{raw.get('kind')}: "))
        raise tree.error((prefix + where).rstrip("."), message) from None
    first = min(found, key=lambda wrong: wrong.rank)
    raise tree.error((prefix + first.key).rstrip("."), first.sentence(prefix) + first.misspelt(raw)) from None


def _plain(tree: Tree, value: Any, key: str) -> Any:
    """Numbers without a fraction become integers (100e9), what JSON cannot say is refused."""
    if isinstance(value, dict):
        for name in value:
            if not isinstance(name, str) or not name:
                raise tree.error(f"{key}.{name}".lstrip("."), "a key must be a word; put quotes around it")
        return {name: _plain(tree, part, f"{key}.{name}".lstrip(".")) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain(tree, part, key) for part in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            raise tree.error(key, f"expected a finite number, got {value}")
        value = int(value) if value.is_integer() and abs(value) < 2**63 else value
    if isinstance(value, int) and abs(value) >= 2**63:
        raise tree.error(key, f"expected a number of at most 63 bits, got {_show(value)}")
    return value


def _field(cls: type | None, message: str) -> tuple[str, str]:
    """A rule's message parted into the key it begins with, if it does, and the rest."""
    field, _, rest = message.partition(": ")
    return (field, rest) if cls is not None and field in keys_of(cls) else ("", message)


class _Wrong:
    """One pydantic error in the words of the recipe."""

    def __init__(self, cls: type, details: ErrorDetails) -> None:
        self.kind, self.input, self.rule = details["type"], details["input"], ""
        self.path: list[str] = []
        self.parent: type | None = None
        self.hint: Any = cls
        self.entry: int | None = None
        inside = False
        here: type | None = cls
        for part in details["loc"][1:]:
            into_dict = typing.get_origin(self.hint) is dict
            inside = not into_dict and here is None
            if inside:
                break  # an alternative of a union, an item of a list
            self.parent = None if into_dict else here
            self.entry = len(self.path) if into_dict else self.entry
            here, self.hint = step(here, self.hint, str(part))
            self.path.append(str(part))
        if self.kind == "value_error":  # a rule of a settings class: "field: what is wrong", or a rule between fields
            field, self.rule = _field(here, str(details["ctx"]["error"]))
            self.path += [field] if field else []
        self.key = ".".join(self.path)
        self.kind = "" if inside or self.kind not in _ORDER else self.kind
        self.rank = _ORDER.index(self.kind)

    def sentence(self, prefix: str) -> str:
        """What is wrong, and what would be right."""
        if self.kind == "unexpected_keyword_argument":
            new = RENAMED.get(prefix + self.key)
            if new is not None:
                return f"was renamed to {new}"
            known = list(keys_of(self.parent)) if self.parent is not None else []
            if not prefix and len(self.path) == 1:
                known = [key for section in SECTIONS for key in keys(section) if self.parent is SECTIONS[section]]
            return f"unknown key{nearest(self.path[-1], known)}"
        if self.kind == "missing" and self.parent is not None:
            key = keys_of(self.parent)[self.path[-1]]
            return f"missing ({words(key.type)}): {key.doc}"
        if self.kind == "value_error":
            return self.rule
        return f"expected {words(self.hint)}, got {_show(self.input)}{_fix(self.hint, self.input)}"

    def misspelt(self, raw: Any) -> str:
        """The entry that is there, where one that lacks a key may be that one with a mistake in its name."""
        if self.entry is None or self.entry != len(self.path) - 2:
            return ""
        for part in self.path[: self.entry]:
            raw = raw[part]
        *_, name, key = self.path
        return "" if key in raw[name] else _misspelt(name, raw)


def _misspelt(name: str, entries: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, [other for other in entries if other != name], n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _fix(hint: Any, value: Any) -> str:
    """How to write what was probably meant."""
    number = accepts(hint, int) or accepts(hint, float)
    if number and isinstance(value, str):
        meant = _number(value)
        if meant is not None and (meant.is_integer() or accepts(hint, float)):
            return f" (write {int(meant) if meant.is_integer() else meant})"
    if accepts(hint, bool) and value in (0, 1, "true", "false"):
        return f" (write {'true' if value in (1, 'true') else 'false'})"
    if accepts(hint, str) and isinstance(value, int | float):
        return f" (write '\"{json.dumps(value)}\"')"
    return ""


def _number(text: str) -> float | None:
    """The number in "50k", "1.5M", "100e9" or "10 000"."""
    text = text.replace("_", "").replace(",", "").replace(" ", "")
    scale = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}.get(text[-1:].lower())
    try:
        number = float(text[:-1]) * scale if scale else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
