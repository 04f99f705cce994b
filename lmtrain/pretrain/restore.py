"""Where a run begins: new, resumed, branched, or from other weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmtrain.checkpoint import commit
from lmtrain.checkpoint.checkpointer import Checkpointer, branch_from, init_from
from lmtrain.checkpoint.manifest import step_of
from lmtrain.checkpoint.storage import LocalStorage, check_space
from lmtrain.config.load import Settings
from lmtrain.data.blocks.packing import plan_digests
from lmtrain.data.loader import Loader
from lmtrain.engine.fsdp import FSDPEngine
from lmtrain.errors import DataError, UsageError
from lmtrain.pretrain.plan import Plan
from lmtrain.train.loop import Progress


def restore(settings: Settings, plan: Plan, checkpointer: Checkpointer, engine: FSDPEngine, progress: Progress) -> str:
    """Fill engine and progress from where the run begins; a sentence that says where that is."""
    launch, run_dir = settings.launch, checkpointer.run_dir
    tensors, _ = engine.state_dict()
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    checkpointer.ranks.on_first(lambda: check_space(run_dir, size))
    found = checkpointer.find(launch.resume)
    if launch.resume not in ("auto", "true"):
        _refuse_to_shadow(run_dir, found, launch.resume)
    documents: dict[str, Any] | None = None
    if found is not None:
        documents = checkpointer.load(found, tensors)
        origin = f"resumed from {found}"
    elif launch.branch_from:
        found, documents = branch_from(checkpointer, launch.branch_from, tensors)
        documents["schedule"].pop("plans", None)  # a branch may have other data
        if (done := documents["loop"]["step"]) >= plan.total_steps:
            raise UsageError(
                f"branch_from={launch.branch_from}: {found.name} has taken {done:,} steps, and this run ends after "
                f"{plan.total_steps:,}: nothing would be trained; give more train.steps (or train.tokens)"
            )
        origin = f"branched from {found}, with all its state"
    elif launch.init_from:
        weights = {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
        return f"weights from {init_from(checkpointer, launch.init_from, weights)}, everything else new"
    if found is None or documents is None:
        return "new, from initial weights"
    loop = documents["loop"]
    engine.load_state_dict(loop)
    progress.step, progress.tokens, progress.guard = loop["step"], loop["tokens"], loop["guard"]
    progress.mixture = documents["schedule"]
    if progress.step % (group := settings.recipe.data.run_blocks):
        raise UsageError(
            f"{found}: step {progress.step} is amid a group of {group} steps (data.run_blocks), whose state no "
            f"checkpoint holds; begin from a checkpoint of step {progress.step // group * group}, or of another "
            f"multiple of {group}"
        )
    then = checkpointer.manifest(found).get("kernels")
    changed = "" if then == plan.kernels else f"; kernels were {then}, now {plan.kernels}: bits may differ"
    return f"{origin} (step {progress.step}){changed}"


def refuse_other_plans(loader: Loader, then: Mapping[str, str], step: int) -> None:
    """Raise DataError if a source is packed by another plan than at the checkpoint of ``step`` (digests by name)."""
    for name, digest in plan_digests(loader.catalog.blocks).items():
        if then.get(name, digest) != digest:
            raise DataError(
                f"data.sources.{name}: its pack plan for blocks of {loader.block_tokens} tokens is not that of the "
                f"checkpoint of step {step} (digest {digest[:12]}, expected {then[name][:12]}): the run would read "
                "other blocks. Put the data and the plan of then back, or start a new run"
            )


def _refuse_to_shadow(run_dir: Path, found: Path | None, resume: str) -> None:
    """A run that starts before checkpoints of its own folder would write steps that are there already."""
    steps = [step for path in commit.committed(LocalStorage(), run_dir / "checkpoints") if (step := step_of(path.name))]
    begins = 0 if found is None else step_of(found.name) or 0
    if steps and max(steps) > begins:
        raise UsageError(
            f"resume={resume}: {run_dir} holds checkpoints up to step {max(steps)}, this start would begin at "
            f"{begins}; give it a run.dir of its own"
            + (f" and branch_from={found}" if found else ", or resume=auto to go on")
        )
