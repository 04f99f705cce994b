"""Where a run begins: new, resumed, branched, or from other weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmtrain.checkpoint import commit
from lmtrain.checkpoint.checkpointer import Checkpointer, branch_from, init_from
from lmtrain.checkpoint.manifest import step_of
from lmtrain.checkpoint.storage import LocalStorage, check_space
from lmtrain.config.load import Settings
from lmtrain.engine.fsdp import FSDPEngine
from lmtrain.errors import UsageError
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
    then = checkpointer.manifest(found).get("kernels")
    changed = "" if then == plan.kernels else f"; kernels were {then}, now {plan.kernels}: bits may differ"
    return f"{origin} (step {progress.step}){changed}"


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
