"""From a command line to settings: ``recipe=NAME cluster=NAME key=value ...``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lmtrain.config.check import check
from lmtrain.config.files import COMMAND_LINE, Tree, find, names, one_line
from lmtrain.config.recipe import FORMAT_VERSION, SECTIONS, Launch, Recipe, keys, owner
from lmtrain.config.validate import build
from lmtrain.errors import UsageError, nearest
from lmtrain.parallel.config import ClusterConfig

_TEXT = {name for name in keys("launch") if name not in ("dry_run", "json", "debug")}
"""Launch keys whose value is taken as written: ``resume=true`` is a word, and a path may look like a number."""


@dataclass(frozen=True)
class Settings:
    """What a command line means."""

    recipe: Recipe
    cluster: ClusterConfig
    launch: Launch
    sources: dict[str, str]
    """Dotted key to the file, or the command line, that set it; a key that nobody set has its default."""

    @property
    def resolved(self) -> dict[str, Any]:
        """Every key of recipe, cluster and launch as plain data."""
        return {section: dataclasses.asdict(getattr(self, section)) for section in SECTIONS}


def load(argv: list[str]) -> Settings:
    """Settings of a command line without its program name.

    Raises UsageError, in one sentence that cites the file or the command line, for whatever cannot be run as written.
    """
    overrides = [_override(argument) for argument in argv]
    launch_tree = Tree("launch")
    _lay(overrides, launch_tree)
    if "recipe" not in launch_tree.keys:
        raise UsageError(f"command line: no recipe=NAME or recipe=PATH; known: {', '.join(names('recipe'))}")
    launch = build(launch_tree, launch_tree.keys)
    path = find("recipe", launch.recipe)
    recipe_tree = Tree("recipe", path)
    cluster_tree = Tree("cluster", find("cluster", launch.cluster))
    _lay(overrides, recipe_tree, cluster_tree)
    _refuse_newer(recipe_tree)
    recipe = _name_run(build(recipe_tree, recipe_tree.resolve()), path)
    cluster = build(cluster_tree, cluster_tree.resolve())
    check(recipe, launch, recipe_tree)
    sources = launch_tree.sources | cluster_tree.sources | recipe_tree.sources
    return Settings(recipe, cluster, launch, sources)


def _lay(overrides: Sequence[tuple[str, dict[str, Any]]], *trees: Tree) -> None:
    """One after another: ``a=null a.b=1`` leaves only b in a."""
    for section, change in overrides:
        for tree in trees:
            if tree.section == section:
                tree.merge(change, COMMAND_LINE)


def _override(argument: str) -> tuple[str, dict[str, Any]]:
    """The section and the small tree of one ``a.b=value``."""
    key, equals, text = argument.partition("=")
    if not equals or argument.startswith("-"):
        hint = f" (write {argument.lstrip('-')})" if equals else ""
        raise UsageError(f"command line: {argument}: expected key=value{hint}, or --help")
    if not all(part.replace("_", "a").replace("-", "a").isalnum() for part in key.split(".")):
        raise UsageError(f"command line: {argument}: expected words with dots between them before the =")
    top = key.partition(".")[0]
    section = owner(top)
    if section is None:
        every = [each for name in SECTIONS for each in keys(name)]
        raise UsageError(f"command line: {key}: unknown key{nearest(top, every)}")
    if key in _TEXT:
        return section, {key: None if text == "null" else text}
    try:
        change = OmegaConf.to_container(OmegaConf.from_dotlist([argument]))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UsageError(f"command line: {key}: {text!r} is not YAML: {one_line(error)}") from error
    assert isinstance(change, dict)
    return section, {str(name): value for name, value in change.items()}


def _refuse_newer(tree: Tree) -> None:
    # Before validation, so that a newer format is not reported as an unknown key.
    version = tree.keys.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise tree.error("format_version", f"{version} is newer than this lmtrain reads ({FORMAT_VERSION}); upgrade it")


def _name_run(recipe: Recipe, path: Path) -> Recipe:
    if recipe.run.dir is not None:
        return recipe
    return dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, dir=f"runs/{path.stem}"))
