"""What follows from the settings before anything is allocated, and what identifies a run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import yaml

from lmtrain.parallel.config import ClusterConfig

TRAINED = ("model", "data", "train", "seed")
"""Sections of a recipe that decide what is trained; a resumed run may change the others."""
VIEWS = ("log_every", "wandb")


@dataclass(frozen=True)
class Plan:
    """What follows from the settings, this machine and the world, before anything is allocated."""

    cluster: ClusterConfig
    world: int
    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    microbatch: int
    total_steps: int
    kernels: dict[str, str]


def plain(value: Any) -> dict[str, Any]:
    """A settings dataclass as JSON and YAML know it."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(value)))
    return plain


def trained(text: str) -> Mapping[str, Any]:
    """The part of a recipe's YAML that decides what is trained."""
    recipe = yaml.safe_load(text)
    kept = {name: recipe.get(name) for name in TRAINED}
    kept["train"] = {key: value for key, value in kept["train"].items() if key not in VIEWS}
    return kept


def digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
