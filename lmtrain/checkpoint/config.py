"""What a recipe says about checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are made, how many are kept, how they are verified."""

    every: int = 1000
    """Optimizer steps between two checkpoints; 0 saves only at the end."""
    keep_last: int = 2
    """How many of the newest checkpoints are kept (at least 1)."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this are kept for ever; 0 keeps none for ever."""
    verify: Literal["hash", "size"] = "hash"
    """What is checked before a checkpoint is used: every byte (hash), or file sizes and the JSON files (size)."""
    asynchronous: bool = True
    """Write in the background while training goes on; false waits for the disk at every save."""

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("keep_last", 1), ("keep_every", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: must be at least {least}, got {getattr(self, name)}")
