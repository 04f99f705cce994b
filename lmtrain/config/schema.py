"""What the settings dataclasses say about themselves: keys, types in words, defaults, and the sentence of each key."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from lmtrain.model.config import ModelConfig


@dataclass(frozen=True)
class Key:
    """One key of a settings class: its type, whether it must be given, its default, and what it means."""

    name: str
    type: Any
    required: bool
    default: Any
    doc: str


@cache
def keys_of(cls: type) -> dict[str, Key]:
    """The keys of a settings class in order. Raises KeyError for a field without a docstring."""
    hints = typing.get_type_hints(cls)
    docs = _docs(cls)
    found = {}
    for item in dataclasses.fields(cls):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        found[item.name] = Key(item.name, hints[item.name], required, None if required else default, docs[item.name])
    return found


def _docs(cls: type) -> dict[str, str]:
    """The string under each attribute, read from the source: what ``help=`` and the written recipe show."""
    docs: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in zip(tree.body, tree.body[1:], strict=False):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                    docs[name] = " ".join(doc.split())
    return docs


def settings_class(hint: Any) -> type | None:
    """The settings class an annotation holds (itself, or a dict's values), or None for a plain value."""
    for part in (hint, *typing.get_args(hint)):
        if isinstance(part, type) and dataclasses.is_dataclass(part):
            return part
    return None


def is_branches(cls: type, name: str) -> bool:
    """Whether a key holds branches: the one place where a value's class is chosen by its ``kind``."""
    return cls is ModelConfig and name == "branches"


def step(cls: type | None, hint: Any, name: str) -> tuple[type | None, Any]:
    """Settings class and annotation one key further down; (None, None) where the key is unknown."""
    if typing.get_origin(hint) is dict:
        value = typing.get_args(hint)[1]
        return settings_class(value), value
    if cls is None or name not in keys_of(cls):
        return None, None
    hint = keys_of(cls)[name].type
    return (None if typing.get_origin(hint) is dict else settings_class(hint)), hint


def words(hint: Any) -> str:
    """A type as a message or a help line names it: ``int or null``, ``cosine or wsd``, ``[float, float]``."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(words(arg) for arg in args)
    if origin is typing.Literal:
        return " or ".join(str(arg) for arg in args)
    if origin is tuple:
        return f"[{', '.join(words(arg) for arg in args)}]"
    if origin is list:
        return f"list of {words(args[0])}"
    if origin is dict:
        return f"NAME: {words(args[1])}"
    if hint is type(None):
        return "null"
    return "keys" if hint is Any or settings_class(hint) else str(hint.__name__)


def accepts(hint: Any, kind: type) -> bool:
    """Whether an annotation is, or has as an alternative, this plain type."""
    return hint is kind or kind in typing.get_args(hint)


def every_key(cls: type, kinds: dict[str, type], prefix: str = "") -> Iterator[tuple[str, Key]]:
    """Every key of a settings class and below, with its dotted name.

    Where the user chooses a name it reads NAME, and under ``model.branches`` the kind stands for it.
    """
    for key in keys_of(cls).values():
        name = f"{prefix}{key.name}"
        yield name, key
        if is_branches(cls, key.name):
            for kind, settings in kinds.items():
                yield from every_key(settings, kinds, f"{name}.{kind}.")
        elif inner := settings_class(key.type):
            yield from every_key(inner, kinds, f"{name}.NAME." if typing.get_origin(key.type) is dict else f"{name}.")
