"""What follows from the settings before anything is allocated, and what identifies a run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import yaml

from lmtrain.config.files import Tree
from lmtrain.config.recipe import Recipe
from lmtrain.config.validate import build
from lmtrain.data.loader import Loader
from lmtrain.data.policies.make import make
from lmtrain.data.policies.policy import MixPolicy, Run
from lmtrain.parallel.config import ClusterConfig
from lmtrain.train.learning_rate import phases

TRAINED = ("model", "data", "train", "seed")
"""Sections of a recipe that decide what is trained; a resumed run may change the others."""
VIEWS = ("log_every", "wandb")


@dataclass(frozen=True)
class Plan:
    """What follows from the settings, this machine, the data and the world, before anything is allocated.

    policy: of the mixture. weights: the first mixture. warnings: of sources read often.
    """

    cluster: ClusterConfig
    world: int
    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    microbatch: int
    total_steps: int
    kernels: dict[str, str]
    policy: MixPolicy
    weights: Mapping[str, float]
    warnings: list[str]


def policy_of(recipe: Recipe, loader: Loader) -> MixPolicy:
    """The policy of a run of ``recipe`` on the data of ``loader``. UsageError or DataError for what cannot work."""
    data, total = recipe.data, loader.schedule.tokens(recipe.train.num_steps(recipe.data))
    weights = {name: source.weight for name, source in data.sources.items()}
    run = Run(loader.tokens_available, total, phases(recipe.train.schedule, total), data.max_epochs)
    return make(data.policy, weights, run)


def check_policy(recipe: Recipe) -> None:
    """UsageError or DataError for what is wrong with the policy of ``recipe``, as far as it shows without the data."""
    data = recipe.data
    total = recipe.train.schedule_of(data).tokens(recipe.train.num_steps(data))
    weights = {name: source.weight for name, source in data.sources.items()}
    run = Run(dict.fromkeys(weights, 0), total, phases(recipe.train.schedule, total), data.max_epochs)
    make(replace(data.policy, first="weights", tau=None, epochs=None), weights, run)  # the others go by sizes


def plain(value: Any) -> dict[str, Any]:
    """A settings dataclass as JSON and YAML know it."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(value)))
    return plain


def trained(text: str) -> Mapping[str, Any]:
    """The part of a recipe's YAML that decides what is trained; keys that an old one lacks have defaults."""
    tree = Tree("recipe")
    tree.merge(yaml.safe_load(text), "recipe.yaml")
    recipe = plain(build(tree, tree.resolve()))
    kept = {name: recipe[name] for name in TRAINED}
    kept["train"] = {key: value for key, value in kept["train"].items() if key not in VIEWS}
    return kept


def digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
