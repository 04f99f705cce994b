"""The recipe: every room's settings under one roof, and what a command line may say besides."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from dataclasses import dataclass, field

import lmtrain.model
from lmtrain.checkpoint.config import CheckpointConfig
from lmtrain.data.config import DataConfig
from lmtrain.model.branch import BRANCHES
from lmtrain.model.config import ModelConfig
from lmtrain.parallel.config import ClusterConfig
from lmtrain.train.config import EvalConfig, TrainConfig

FORMAT_VERSION = 1
RENAMED: dict[str, str] = {}
"""Old dotted key to new dotted key; the old one is refused with a sentence that names the new one."""


@dataclass(frozen=True)
class RunConfig:
    """Where a run leaves its files."""

    dir: str | None = None
    """Folder of the run; default: runs/<recipe name>."""


@dataclass(frozen=True)
class Recipe:
    """What is trained: model, data, optimisation, evaluation. Nothing here says where."""

    model: ModelConfig
    """The model: named branches and their order."""
    data: DataConfig
    """What is read."""
    train: TrainConfig
    """How much, how fast, with which optimizer."""
    seed: int = 0
    """Seed of the initial weights, of the data order and of every random draw."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Held-out evaluation during training."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When checkpoints are written and which are kept."""
    run: RunConfig = field(default_factory=RunConfig)
    """Where the run leaves its files."""
    format_version: int = FORMAT_VERSION
    """Version of the recipe format; a newer one than this program knows is refused."""


@dataclass(frozen=True)
class ScheduleLaunch:
    """What becomes of events in a run's schedule.jsonl that are newer than the checkpoint it goes on from."""

    fork: bool = False
    """Forget them (a copy of the file stays beside it), so that the run may take another course; false: they hold."""


@dataclass(frozen=True)
class Launch:
    """What only a command line says: which files, where to begin, what to print."""

    recipe: str
    """Name in recipes/, or the path of a YAML file."""
    cluster: str = "auto"
    """Name in recipes/cluster/, or the path of a YAML file."""
    resume: str = "auto"
    """auto: continue if there is a checkpoint; true: there must be one; false: start anew; or a checkpoint's path."""
    init_from: str | None = None
    """Checkpoint whose weights a new run starts from."""
    branch_from: str | None = None
    """Checkpoint whose whole state a new run continues, e.g. for a decay of its own."""
    schedule: ScheduleLaunch = field(default_factory=ScheduleLaunch)
    """Events of the mixture made after the checkpoint."""
    dry_run: bool = False
    """Print what would run (parameters, FLOPs, memory, mesh) and stop."""
    json: bool = False
    """Print JSON instead of words."""
    debug: bool = False
    """Show a traceback with an error."""


SECTIONS: dict[str, type] = {"recipe": Recipe, "cluster": ClusterConfig, "launch": Launch}
"""Who owns a top-level key. On the command line the three share one namespace."""
HOME = {
    "recipe": "in a recipe (recipes/*.yaml)",
    "cluster": "in a cluster profile (recipes/cluster/*.yaml)",
    "launch": "on the command line",
}
"""Where a section's keys are written, in words."""


def keys(section: str) -> list[str]:
    """Top-level keys of a section."""
    return [f.name for f in dataclasses.fields(SECTIONS[section])]


def owner(key: str) -> str | None:
    """The section whose top-level key this is, or None."""
    return next((section for section in SECTIONS if key in keys(section)), None)


def branch_kinds() -> dict[str, type]:
    """Settings class of every branch kind; imports the model room, whose modules register themselves."""
    for module in pkgutil.walk_packages(lmtrain.model.__path__, "lmtrain.model."):
        if not module.name.endswith("__main__"):  # a program, which imports the hub
            importlib.import_module(module.name)
    return {kind: branch.Config for kind, branch in sorted(BRANCHES.items())}
