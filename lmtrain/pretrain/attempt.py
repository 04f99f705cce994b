"""One attempt of a run: its folder, its parts, its training, its end."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from lmtrain import __version__
from lmtrain.checkpoint import commit
from lmtrain.checkpoint.checkpointer import HASHER, Checkpointer
from lmtrain.checkpoint.lock import RunLock
from lmtrain.checkpoint.manifest import directory_name
from lmtrain.checkpoint.ranks import Ranks
from lmtrain.checkpoint.storage import LocalStorage, probe_writable
from lmtrain.config.load import Settings
from lmtrain.data.heldout import Heldout
from lmtrain.data.loader import Loader
from lmtrain.data.order.schedule import Event, ScheduleLog
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.engine.fsdp import FSDPEngine
from lmtrain.errors import EXIT_DONE, EXIT_INTERNAL, DataError, LmtrainError
from lmtrain.parallel.mesh import build_mesh
from lmtrain.pretrain.banner import banner
from lmtrain.pretrain.log import METRICS, last_step, settle_log
from lmtrain.pretrain.plan import Plan, digest, plain, trained
from lmtrain.pretrain.restore import refuse_other_plans, restore
from lmtrain.train.console import Console
from lmtrain.train.environment import describe_run, redact
from lmtrain.train.hardware import describe, peak_flops
from lmtrain.train.loop import Progress, Trainer
from lmtrain.train.metrics import MetricsLog
from lmtrain.train.mixture import Mixture
from lmtrain.train.recorder import Recorder
from lmtrain.train.run_folder import RunFolder
from lmtrain.train.signals import StopRequest
from lmtrain.train.wandb_view import WandbView

T = TypeVar("T")

logger = logging.getLogger(__name__)


def attempt(settings: Settings, plan: Plan, argv: list[str], stop: StopRequest) -> int:
    """One attempt of a run: take the folder, build, restore, train, and write how it ended."""
    recipe, ranks = settings.recipe, Ranks(None)
    run_dir = Path(recipe.run.dir or "runs/unnamed")
    start_id = ranks.on_first(lambda: uuid.uuid4().hex[:12])
    progress = Progress()
    held: list[tuple[RunFolder, RunLock]] = []
    recorders: list[Recorder] = []

    def take() -> bool:
        taken = _take_folder(settings, plan, argv, run_dir, start_id)
        held.extend([] if taken is None else [taken])
        return taken is None

    if ranks.on_first(take):
        return EXIT_DONE
    try:
        trainer = _build(settings, plan, ranks, run_dir, start_id, progress, stop, held[0][0] if held else None)
        if trainer.recorder:
            recorders.append(trainer.recorder)
        code = trainer.train()
        reason = "done" if code == EXIT_DONE else stop.reason or "control/stop"
    except BaseException as error:
        if held:
            code = error.exit_code if isinstance(error, LmtrainError) else EXIT_INTERNAL
            held[0][0].exited(progress.step, code, f"{type(error).__name__}: {error}")
        raise
    else:
        if held:
            held[0][0].exited(progress.step, code, reason)
        return code
    finally:
        for recorder in recorders:
            recorder.close()
        for _, lock in held:
            lock.release()


def _take_folder(
    settings: Settings, plan: Plan, argv: list[str], run_dir: Path, start_id: str
) -> tuple[RunFolder, RunLock] | None:
    """The run folder, locked; rank 0 only. None, with nothing changed, if its run is finished."""
    folder = RunFolder(run_dir)
    lock = RunLock(run_dir, start_id)
    try:
        probe_writable(run_dir)
        folder.keep_recipe(yaml.safe_dump(plain(settings.recipe), sort_keys=False), trained)
        if settings.launch.resume in ("auto", "true") and (last := _finished(folder, settings, plan.total_steps)):
            logger.info("%s is finished: %s steps; its last checkpoint is %s", run_dir, plan.total_steps, last)
            lock.release()
            return None
        where = {"cluster": plain(plan.cluster), "dtype": str(plan.dtype), "kernels": plan.kernels}
        folder.begin(describe_run(argv, describe(plan.device)) | where)
    except BaseException:
        lock.release()
        raise
    return folder, lock


def _finished(folder: RunFolder, settings: Settings, total_steps: int) -> Path | None:
    """The last checkpoint of a run that came to its end, if it verifies."""
    verdict = folder.exits()[-1:]
    if [(row["code"], row["step"]) for row in verdict] != [(EXIT_DONE, total_steps)]:
        return None
    path = folder.path / "checkpoints" / directory_name(total_steps)
    try:
        commit.verify(LocalStorage(), path, settings.recipe.checkpoint.verify, HASHER)
    except DataError:
        return None
    return path


def _build(
    settings: Settings,
    plan: Plan,
    ranks: Ranks,
    run_dir: Path,
    start_id: str,
    progress: Progress,
    stop: StopRequest,
    folder: RunFolder | None,
) -> Trainer:
    recipe, cluster, device = settings.recipe, plan.cluster, plan.device
    mesh = build_mesh(cluster.mesh, device.type)
    tokenizer = Tokenizer.load(recipe.data.tokenizer)
    heldout = everywhere(ranks, lambda: Heldout(recipe.data, recipe.eval.max_tokens))
    engine = FSDPEngine(
        recipe.model,
        plan.vocab_size,
        mesh=mesh,
        cluster=cluster,
        optimizer=recipe.train.optimizer,
        device=device,
        dtype=plan.dtype,
        seed=recipe.seed,
        z_loss=recipe.train.z_loss,
        stateful=recipe.data.run_blocks > 1,
    )
    identity: dict[str, Any] = {
        "mesh": plain(cluster.mesh),
        "recipe_sha256": digest(trained(yaml.safe_dump(plain(recipe)))),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "model_fingerprint": digest(plain(recipe.model)),
        "kernels": plan.kernels,
        "lmtrain": __version__,
    }
    checkpointer = Checkpointer(run_dir, recipe.checkpoint, start_id=start_id, identity=identity)
    origin = restore(settings, plan, checkpointer, engine, progress)
    log, events = _log(settings, plan, ranks, run_dir, progress)
    loader = everywhere(
        ranks,
        lambda: Loader(
            recipe.data,
            seed=recipe.seed,
            batch_tokens=recipe.train.batch_tokens,
            batch_ramp=recipe.train.batch_ramp,
            microbatch=plan.microbatch,
            dp_rank=mesh.data_rank,
            dp_size=mesh.data_size,
            log=ScheduleLog(events),
            workers=cluster.workers,
        ),
    )
    everywhere(ranks, lambda: refuse_other_plans(loader, progress.mixture.get("plans", {}), progress.step))
    engine.num_sources = len(loader.source_names)
    learnt = progress.mixture.get("policy", {})
    if learnt.get("kind") == recipe.data.policy.kind:  # a branch may have another
        plan.policy.load_state_dict(learnt["state"])
    # a step that was recorded, or had an event, proposed then what it would propose now
    recorded = 0
    if log is not None and not settings.launch.schedule.fork:
        recorded = max(last_step(run_dir / METRICS), *(event.step for event in events))
    recorder = None
    if folder is not None:
        console = Console(plan.total_steps, recipe.train.log_every)
        console.banner(banner(settings, plan, loader, heldout, origin, progress.step))
        metrics = MetricsLog(folder.metrics, folder.attempt, progress.step, progress.tokens, recorded)
        wandb = WandbView(
            recipe.train.wandb,
            run_dir,
            folder.attempt,
            yaml.safe_load(redact(yaml.safe_dump(plain(recipe)))),
            console.note,
        )
        recorder = Recorder(folder, metrics, console, wandb)
    peak = peak_flops(device, plan.dtype)
    return Trainer(
        train_cfg=recipe.train,
        eval_cfg=recipe.eval,
        save_every=recipe.checkpoint.every,
        total_steps=plan.total_steps,
        flops_per_token={
            length: recipe.model.flops_per_token(plan.vocab_size, length) for length in loader.schedule.lengths
        },
        peak=None if peak is None else peak * plan.world,
        engine=engine,
        loader=loader,
        heldout=heldout,
        tokenizer=tokenizer,
        rows=plan.microbatch,
        checkpointer=checkpointer,
        mixture=Mixture(
            loader=loader,
            ranks=ranks,
            total_steps=plan.total_steps,
            log=log,
            policy=plan.policy,
            control=run_dir / "control",
            recorded=recorded,
            note=recorder.console.note if recorder else lambda text: None,
        ),
        mesh=mesh,
        device=device,
        stop=stop,
        recorder=recorder,
        progress=progress,
    )


def _log(
    settings: Settings, plan: Plan, ranks: Ranks, run_dir: Path, progress: Progress
) -> tuple[ScheduleLog | None, list[Event]]:
    """The schedule log on rank 0, None elsewhere; and its events, on all ranks."""
    kept: list[ScheduleLog] = []
    recipe = settings.recipe
    first_block = recipe.train.schedule_of(recipe.data).first_block(progress.step)

    def events() -> list[Event]:
        kept.append(
            settle_log(
                run_dir,
                plan.weights,
                progress.mixture,
                first_block=first_block,
                step=progress.step,
                fork=settings.launch.schedule.fork,
            )
        )
        return list(kept[0].events)

    shared = ranks.on_first(events)
    return (kept[0] if kept else None), shared


def everywhere(ranks: Ranks, make: Callable[[], T]) -> T:
    """``make()`` on every rank; where it fails on one, all raise that error instead of waiting for it."""
    made: list[T] = []
    ranks.together(lambda: made.append(make()))
    return made[0]
