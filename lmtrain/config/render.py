"""A resolved recipe as YAML in which every line says what it means: the ``recipe.yaml`` of a run folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from lmtrain.config.recipe import Recipe
from lmtrain.config.schema import keys_of


def render(recipe: Recipe) -> str:
    """The YAML text; loading it gives an equal recipe."""
    return "\n".join(_lines(recipe, "")) + "\n"


def _lines(settings: Any, indent: str) -> Iterator[str]:
    cls: type = type(settings)
    for key in keys_of(cls).values():
        value = getattr(settings, key.name)
        doc = f"  # {key.doc}"
        named = value if isinstance(value, dict) else {}
        if dataclasses.is_dataclass(value) or named:
            yield f"{indent}{key.name}:{doc}"
        else:
            yield f"{indent}{key.name}: {scalar(value)}{doc}"
        if dataclasses.is_dataclass(value):
            yield from _lines(value, f"{indent}  ")
        for name, part in named.items():
            if dataclasses.is_dataclass(part):
                yield f"{indent}  {scalar(name)}:"
                yield from _lines(part, f"{indent}    ")
            else:
                yield f"{indent}  {scalar(name)}: {scalar(part)}"


def scalar(value: Any) -> str:
    """A value in YAML's flow form, which every YAML reader takes for the same type."""
    if isinstance(value, float):
        mantissa, e, exponent = repr(value).partition("e")
        return f"{mantissa}{'.0' if e and '.' not in mantissa else ''}{e}{exponent}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(scalar(part) for part in value)}]"
    text = json.dumps(value, ensure_ascii=False)
    return text.replace("${", "\\\\${")  # else an interpolation when the file is read again
