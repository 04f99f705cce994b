"""Recipe and cluster files: where they lie, how they are read, and how a file and its bases become one tree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lmtrain import shipped
from lmtrain.config.recipe import HOME, owner
from lmtrain.errors import UsageError, nearest

COMMAND_LINE = "command line"


def folder(section: str) -> Path:
    """The folder of shipped recipes or cluster profiles: package data of a wheel, else the checkout's."""
    root = shipped.folder("recipes")
    return root / "cluster" if section == "cluster" else root


def names(section: str) -> list[str]:
    """Names of the shipped recipes or cluster profiles."""
    return sorted(path.stem for path in folder(section).glob("*.yaml"))


def find(section: str, name: str, beside: Path | None = None) -> Path:
    """The file of a name in the shipped folder, or of a path (relative to ``beside`` if given).

    Raises UsageError with the nearest name and the folder, or with the path that does not exist.
    """
    if "/" in name or name.endswith((".yaml", ".yml")):
        path = (beside or Path()) / name
        if not path.is_file():
            raise UsageError(f"{section} error: {show(path)}: no such file")
        return path
    path = folder(section) / f"{name}.yaml"
    if not path.is_file():
        hint = nearest(name, names(section))
        raise UsageError(f"{section} error: no {section} is named {name} in {show(folder(section))}{hint}")
    return path


def show(path: Path) -> str:
    """A path as messages cite it: relative to the working directory where it lies below."""
    absolute = path.resolve()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)


def read(path: Path, section: str) -> dict[str, Any]:
    """The plain tree of one YAML file, interpolations unresolved. Raises UsageError where it cannot be one."""
    try:
        config = OmegaConf.load(path)
        tree = OmegaConf.to_container(config) if isinstance(config, DictConfig) else None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise UsageError(f"{section} error: {show(path)}: {one_line(error)}") from error
    if not isinstance(tree, dict):
        raise UsageError(f"{section} error: {show(path)}: expected keys with values at the top level")
    return {str(key): value for key, value in tree.items()}


def one_line(error: Exception) -> str:
    """What a YAML or OmegaConf error says, without its trailer."""
    lines = [line.strip() for line in str(error).splitlines() if "full_key" not in line and "object_type" not in line]
    return ", ".join(lines)


class Tree:
    """The merged keys of one section, and for every leaf the file or command line that set it."""

    def __init__(self, section: str, path: Path | None = None) -> None:
        """Reads ``path`` and its chain of bases. Raises UsageError for a cycle or a key of another section."""
        self.section = section
        self.file = COMMAND_LINE if path is None else show(path)
        self.keys: dict[str, Any] = {}
        self.sources: dict[str, str] = {}
        chain: list[tuple[str, dict[str, Any]]] = []
        while path is not None:
            label = show(path)
            if label in [seen for seen, _ in chain]:
                cycle = " -> ".join([seen for seen, _ in chain] + [label])
                raise UsageError(f"{section} error: base: {cycle} is a cycle")
            tree = read(path, section)
            base = tree.pop("base", None)
            if base is not None and not isinstance(base, str):
                raise UsageError(f"{section} error: {label}: base: expected one name or path, got {base!r}")
            self._refuse_strangers(tree, label)
            chain.append((label, tree))
            path = None if base is None else find(section, base, beside=path.parent)
        for label, tree in reversed(chain):
            self.merge(tree, label)

    def _refuse_strangers(self, tree: dict[str, Any], label: str) -> None:
        for key in tree:
            home = owner(key)
            if home not in (None, self.section):
                raise UsageError(
                    f"{self.section} error: {label}: {key}: belongs {HOME[str(home)]}, not in a {self.section}; "
                    f"remove it here or say {key}=... on the command line"
                )

    def merge(self, tree: dict[str, Any], origin: str) -> None:
        """Lays ``tree`` over what is here. A branch given another kind starts afresh instead of inheriting keys."""
        _merge(self.keys, tree, origin, self.sources, "")

    def resolve(self) -> dict[str, Any]:
        """The tree with every ``${...}`` replaced. Raises UsageError that names the key holding one that fails."""
        try:
            tree = OmegaConf.to_container(OmegaConf.create(self.keys), resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            raise self.error(str(error.full_key), one_line(error)) from error
        assert isinstance(tree, dict)
        return {str(key): value for key, value in tree.items()}

    def origin(self, key: str) -> str:
        """Who set ``key``, or the keys below it; of a key that nobody set, who wrote the keys around it."""
        origins = self._origins(key)
        if not origins:
            around = self._origins(key.rpartition(".")[0])
            origins = around if around == {COMMAND_LINE} else {self.file}
        return " and ".join(sorted(origins, key=lambda origin: (origin == COMMAND_LINE, origin)))

    def _origins(self, key: str) -> set[str]:
        return {source for leaf, source in self.sources.items() if leaf == key or leaf.startswith(f"{key}.")}

    def error(self, key: str, message: str) -> UsageError:
        """A one-line error that cites who set the key."""
        return UsageError(f"{self.section} error: {self.origin(key)}: {key}: {message}")


def _merge(into: dict[str, Any], tree: dict[str, Any], origin: str, sources: dict[str, str], prefix: str) -> None:
    for key, value in tree.items():
        path = f"{prefix}{key}"
        old = into.get(key)
        mapping = isinstance(value, dict)
        afresh = prefix == "model.branches." and mapping and isinstance(old, dict) and _other_kind(old, value)
        if not (mapping and isinstance(old, dict)) or afresh:
            into[key] = {} if mapping else value
            for leaf in [leaf for leaf in sources if leaf == path or leaf.startswith(f"{path}.")]:
                del sources[leaf]
        if mapping:
            _merge(into[key], value, origin, sources, f"{path}.")
        if not mapping or not value:
            sources[path] = origin


def _other_kind(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return "kind" in new and new["kind"] != old.get("kind")
