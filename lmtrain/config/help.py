"""What ``--help`` and ``help=KEY`` print. Every sentence about a key is the string under it in its dataclass."""

from __future__ import annotations

import textwrap
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from lmtrain.config.files import folder, names, show
from lmtrain.config.recipe import SECTIONS, branch_kinds
from lmtrain.config.render import scalar
from lmtrain.config.schema import Key, every_key, keys_of, words
from lmtrain.errors import UsageError, nearest

_INTRO = """\
lmtrain pretrains language models from one recipe, on a laptop or a cluster.

    python launch/pretrain.py recipe=demo cluster=laptop
    torchrun --nproc-per-node 8 launch/pretrain.py recipe=demo mesh.sp=2 train.lr=3e-3

A recipe says what is trained, a cluster profile where. Any key of either can be set on the command line.
dry_run=true prints parameters, FLOPs, memory and mesh, and stops.
help=KEY explains a key and what is below it, e.g. help=train.optimizer, help=model.branches.mamba2, help=mesh."""
_TITLES = {"recipe": "Keys of a recipe", "cluster": "Keys of a cluster profile", "launch": "Only on the command line"}


def answer(argv: list[str]) -> str | None:
    """The text a command line asks for with ``--help``, ``-h``, ``help`` or ``help=KEY``; None if it does not.

    Raises UsageError for ``help=KEY`` of an unknown key.
    """
    for argument in argv:
        if argument in ("--help", "-h", "help", "help="):
            return overview()
        if argument.startswith("help="):
            return explain(argument.removeprefix("help="))
    return None


def overview() -> str:
    """The page of ``--help``."""
    parts = [_INTRO]
    for section, title in (("recipe", "Recipes"), ("cluster", "Cluster profiles")):
        where = folder(section)
        rows = [(f"{section}={name}", _first_comment(where / f"{name}.yaml")) for name in names(section)]
        parts.append(_table(f"{title} in {show(where)}/", rows))
    for section, title in _TITLES.items():
        parts.append(_table(title, [(key.name, key.doc) for key in keys_of(SECTIONS[section]).values()]))
    return "\n\n".join(parts)


def explain(name: str) -> str:
    """The page of ``help=NAME``: the key and everything below it. Raises UsageError with the nearest key."""
    kinds = branch_kinds()
    found = {dotted: key for cls in SECTIONS.values() for dotted, key in every_key(cls, kinds)}
    branches = {f"model.branches.{kind}": settings for kind, settings in kinds.items()}
    if name not in found and name not in branches:
        close = nearest(name, [*found, *branches])
        hint = close if "did you mean" in close else "; --help lists the top level"
        raise UsageError(f"help={name}: unknown key{hint}")
    doc = found[name].doc if name in found else (branches[name].__doc__ or "").strip().splitlines()[0]
    rows = [(f"{name}{_type(found[name])}" if name in found else name, doc)]
    rows += [(f"{dotted}{_type(key)}", key.doc) for dotted, key in found.items() if dotted.startswith(f"{name}.")]
    return "\n\n".join(_entry(*row) for row in rows)


def _type(key: Key) -> str:
    default = "required" if key.required else f"default {_default(key.default)}"
    return f": {words(key.type)}, {default}"


def _default(value: Any) -> str:
    return "below" if is_dataclass(value) else scalar(value)


def _entry(head: str, doc: str) -> str:
    return f"{head}\n{textwrap.fill(doc, 112, initial_indent='    ', subsequent_indent='    ')}"


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    width = max((len(left) for left, _ in rows), default=0)
    return "\n".join([f"{title}:", *(f"    {left:<{width}}  {right}".rstrip() for left, right in rows)])


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""
