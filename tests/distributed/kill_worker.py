"""A rank of a run that ends by SIGKILL at a chosen point; otherwise it is launch/pretrain.py.

The point is made by wrapping functions of the product in this process: the product has no switch for it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from lmtrain.checkpoint import commit, tensors
from lmtrain.checkpoint.checkpointer import Checkpointer
from lmtrain.checkpoint.storage import LocalFile
from lmtrain.data.reader import Reader, StepData, StepPlan
from lmtrain.engine.fsdp import FSDPEngine
from lmtrain.pretrain import main
from lmtrain.train.loop import Trainer

PLAN = "LMTRAIN_TEST_KILL"


@dataclass(frozen=True)
class Kill:
    """Which rank ends, where, and from which optimizer step (from 1) on; ``calls``: for point ``anywhere``."""

    point: str
    rank: int
    step: int
    calls: int = 0

    def to_text(self) -> str:
        return json.dumps(asdict(self))


RANK_0_POINTS = ("before_rename", "after_rename", "recorded")
SAVE_POINTS = ("staging", "writing", "before_rename", "after_rename")
STEP_POINTS = ("reading", "backward", "before_update", "after_update", "recorded", "anywhere")
POINTS = (*STEP_POINTS, *SAVE_POINTS)
"""``loader`` and ``agent`` besides: the end of the rank's loader process, and of the torchrun that started it."""


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def install(kill: Kill) -> None:
    """Wrap what has to be wrapped for ``kill``; for its rank only."""
    now = {"step": 0, "save": 0}
    original_step, original_save = Trainer._step, Checkpointer.save

    def step(self: Trainer, data: StepData, lr: float) -> Any:
        now["step"] = data.step + 1
        if now["step"] >= kill.step and kill.point in ON_STEP:
            ON_STEP[kill.point](kill)
        return original_step(self, data, lr)

    def save(self: Checkpointer, step: int, *args: Any) -> None:
        now["save"] = step
        original_save(self, step, *args)

    def stepping() -> bool:
        return now["step"] >= kill.step

    def saving() -> bool:
        return now["save"] >= kill.step

    _replace(Trainer, "_step", step)
    _replace(Checkpointer, "save", save)
    match kill.point:
        case "reading":
            original = Reader.__getitem__

            def read(self: Reader, plan: StepPlan) -> Any:
                if plan.step + 1 >= kill.step:
                    die()
                return original(self, plan)

            _replace(Reader, "__getitem__", read)
        case "backward":
            _after(FSDPEngine, "_backward", stepping)
        case "before_update":
            _before(FSDPEngine, "_step", stepping)
        case "after_update":
            _after(FSDPEngine, "train_step", stepping)
        case "recorded":
            _after(Trainer, "_record", stepping)
        case "staging":
            _after(tensors, "stage", saving)
        case "writing":
            original_write = LocalFile.write

            def write(self: LocalFile, data: Any) -> None:
                if saving():
                    original_write(self, memoryview(data)[: len(data) // 2])
                    self.fsync()
                    die()
                original_write(self, data)

            _replace(LocalFile, "write", write)
        case "before_rename":
            _before(commit, "publish", saving)
        case "after_rename":
            _after(commit, "publish", saving)
        case name:
            assert name in ON_STEP, f"no point {name}"


def _end_anywhere(kill: Kill) -> None:
    """The ``kill.calls``-th Python function called from now on, in whatever thread, is the last."""
    left = [kill.calls]

    def profile(frame: object, event: str, argument: object) -> None:
        if event == "call":
            left[0] -= 1
            if left[0] <= 0:
                die()

    threading.setprofile(profile)
    sys.setprofile(profile)


def _end_loader(kill: Kill) -> None:
    children = psutil.Process().children()
    loaders = [child for child in children if any("spawn_main" in word for word in child.cmdline())]
    assert loaders, f"no loader process among {children}"
    loaders[0].kill()


def _end_agent(_: Kill) -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    signal.pause()  # the run cannot come to its end, and so not be gone for another reason


ON_STEP: Mapping[str, Callable[[Kill], None]] = {
    "anywhere": _end_anywhere,
    "loader": _end_loader,
    "agent": _end_agent,
    "agent_term": lambda kill: os.kill(os.getppid(), signal.SIGTERM),
}


def _replace(owner: Any, name: str, value: Any) -> None:
    setattr(owner, name, value)


def _before(owner: Any, name: str, due: Callable[[], bool]) -> None:
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if due():
            die()
        return original(*args, **kwargs)

    _replace(owner, name, wrapped)


def _after(owner: Any, name: str, due: Callable[[], bool]) -> None:
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if due():
            die()
        return result

    _replace(owner, name, wrapped)


def forked(argv: list[str], environment: Mapping[str, str], log: Path, kill: Kill | None) -> None:
    """Target of a forked process: one rank, its output in ``log``."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    if kill is not None and kill.rank == int(environment["RANK"]):
        install(kill)
    sys.exit(main(argv))


if __name__ == "__main__":
    plan = Kill(**json.loads(os.environ[PLAN]))
    if plan.rank == int(os.environ["RANK"]):
        install(plan)
    sys.exit(main())
