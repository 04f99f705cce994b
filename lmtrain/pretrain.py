"""Assembles a pretraining run from its settings: the one place where all rooms meet."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import logging
import os
import sys
import traceback
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import yaml

from lmtrain import __version__
from lmtrain.checkpoint import commit
from lmtrain.checkpoint.checkpointer import HASHER, Checkpointer, branch_from, init_from
from lmtrain.checkpoint.lock import RunLock
from lmtrain.checkpoint.manifest import directory_name, step_of
from lmtrain.checkpoint.ranks import Ranks
from lmtrain.checkpoint.storage import LocalStorage, check_space, probe_writable
from lmtrain.config.help import answer
from lmtrain.config.load import Settings, load
from lmtrain.config.recipe import Recipe
from lmtrain.data.heldout import Heldout
from lmtrain.data.loader import Loader
from lmtrain.data.schedule import ScheduleLog
from lmtrain.data.sources import check_sources
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.engine.fsdp import FSDPEngine
from lmtrain.errors import EXIT_DONE, EXIT_INTERNAL, EXIT_INTERRUPTED, DataError, LmtrainError, UsageError
from lmtrain.ops.library import chosen, set_kernels
from lmtrain.parallel.config import ClusterConfig
from lmtrain.parallel.mesh import build_mesh, resolve
from lmtrain.parallel.supported import check as check_supported
from lmtrain.plan.dry_run import embedding_rows, rows_per_pass, summary
from lmtrain.plan.text import text as dry_run_text
from lmtrain.train.console import Console
from lmtrain.train.environment import describe_run, redact
from lmtrain.train.hardware import describe, peak_flops, resolve_device, resolve_dtype
from lmtrain.train.learning_rate import check as check_schedule
from lmtrain.train.loop import Progress, Trainer
from lmtrain.train.metrics import MetricsLog
from lmtrain.train.recorder import Recorder
from lmtrain.train.run_folder import RunFolder
from lmtrain.train.signals import StopRequest, die_with_parent
from lmtrain.train.wandb_view import WandbView

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)
TRAINED = ("model", "data", "train", "seed")
"""Sections of a recipe that decide what is trained; a resumed run may change the others."""
VIEWS = ("log_every", "wandb")

T = TypeVar("T")

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit code; an error is one line, told once on every machine."""
    argv = sys.argv[1:] if argv is None else argv
    rank = int(os.environ.get("RANK", "0"))
    # A machine that alone lacks the data tells so itself: rank 0 may know of nothing yet.
    speaks = int(os.environ.get("LOCAL_RANK", "0")) == 0
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.ERROR, format="%(message)s", stream=sys.stderr)
    try:
        text = answer(argv)
        if text is not None:
            print(text)
            return EXIT_DONE
        die_with_parent()
        return run(load(argv), argv)
    except LmtrainError as error:
        if speaks:
            print(f"lmtrain: {error}", file=sys.stderr, flush=True)
        if "debug=true" in argv:
            traceback.print_exc()
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception:
        traceback.print_exc()
        return EXIT_INTERNAL


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


def run(settings: Settings, argv: list[str]) -> int:
    """Check, start the processes, train. Raises LmtrainError; every check that can be made before work is."""
    recipe = settings.recipe
    world = int(os.environ.get("WORLD_SIZE", "1"))
    cluster = dataclasses.replace(settings.cluster, mesh=resolve(settings.cluster.mesh, world))
    set_kernels(cluster.kernels)
    check_supported(recipe.model, seq_len=recipe.data.seq_len, cluster=cluster, mesh=cluster.mesh)
    steps = recipe.train.steps or -(-(recipe.train.tokens or 0) // recipe.train.batch_tokens)
    check_schedule(recipe.train.schedule, steps * recipe.train.batch_tokens)
    if settings.launch.dry_run:
        return _dry_run(settings, cluster, world)
    device = resolve_device(cluster.device)
    dtype = resolve_dtype(cluster.dtype, device)
    kernels = chosen(device.type, dtype)
    microbatch = rows_per_pass(recipe.data, recipe.train, cluster, cluster.mesh)
    vocab_size = _check_data(recipe, cluster, microbatch, steps)
    plan = Plan(cluster, world, device, dtype, vocab_size, microbatch, total_steps=steps, kernels=kernels)
    _start_processes(device)
    try:
        with StopRequest() as stop:
            return _attempt(settings, plan, argv, stop)
    finally:
        dist.destroy_process_group()


def _check_data(recipe: Recipe, cluster: ClusterConfig, microbatch: int, steps: int) -> int:
    """Rows of the embedding. Raises what is wrong with the data, before there is a run folder."""
    weights = {name: source.weight for name, source in recipe.data.sources.items()}
    try:
        loader = Loader(
            recipe.data,
            seed=recipe.seed,
            batch_tokens=recipe.train.batch_tokens,
            microbatch=microbatch,
            dp_rank=0,
            dp_size=cluster.mesh.dp_replicate * cluster.mesh.dp_shard,
            log=ScheduleLog.fixed(weights),
        )
    except DataError as error:
        raise DataError("; ".join(check_sources(recipe.data)) or str(error)) from error
    vocab_size = embedding_rows(recipe.model, loader.vocab_size)
    assert vocab_size is not None, "known, since the tokenizer is"
    loader.check(steps)
    return vocab_size


def _attempt(settings: Settings, plan: Plan, argv: list[str], stop: StopRequest) -> int:
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
    """The run folder, locked; rank 0 only. None, with nothing changed, if its run is finished.

    Begins the schedule log with the recipe's mixture if there is none.
    """
    folder = RunFolder(run_dir)
    lock = RunLock(run_dir, start_id)
    try:
        probe_writable(run_dir)
        folder.keep_recipe(yaml.safe_dump(_plain(settings.recipe), sort_keys=False), _trained)
        if settings.launch.resume in ("auto", "true") and (last := _finished(folder, settings, plan.total_steps)):
            logger.info("%s is finished: %s steps; its last checkpoint is %s", run_dir, plan.total_steps, last)
            lock.release()
            return None
        where = {"cluster": _plain(plan.cluster), "dtype": str(plan.dtype), "kernels": plan.kernels}
        folder.begin(describe_run(argv, describe(plan.device)) | where)
        weights = {name: source.weight for name, source in settings.recipe.data.sources.items()}
        ScheduleLog.open(run_dir / "schedule.jsonl", weights)
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
    log = ScheduleLog.read(run_dir / "schedule.jsonl")
    loader = _everywhere(
        ranks,
        lambda: Loader(
            recipe.data,
            seed=recipe.seed,
            batch_tokens=recipe.train.batch_tokens,
            microbatch=plan.microbatch,
            dp_rank=mesh.data_rank,
            dp_size=mesh.data_size,
            log=log,
            workers=cluster.workers,
        ),
    )
    loader.check(plan.total_steps)
    heldout = _everywhere(ranks, lambda: Heldout(recipe.data, recipe.eval.max_tokens))
    engine = FSDPEngine(
        recipe.model,
        plan.vocab_size,
        mesh=mesh,
        cluster=cluster,
        optimizer=recipe.train.optimizer,
        device=device,
        dtype=plan.dtype,
        seed=recipe.seed,
        num_sources=len(recipe.data.sources),
        z_loss=recipe.train.z_loss,
    )
    identity: dict[str, Any] = {
        "mesh": _plain(cluster.mesh),
        "recipe_sha256": _digest(_trained(yaml.safe_dump(_plain(recipe)))),
        "tokenizer_fingerprint": loader.fingerprint,
        "model_fingerprint": _digest(_plain(recipe.model)),
        "kernels": plan.kernels,
        "lmtrain": __version__,
    }
    checkpointer = Checkpointer(run_dir, recipe.checkpoint, start_id=start_id, identity=identity)
    origin = _restore(settings, plan, checkpointer, engine, progress)
    recorder = None
    if folder is not None:
        console = Console(plan.total_steps, recipe.train.log_every)
        console.banner(_banner(settings, plan, loader, heldout, origin))
        metrics = MetricsLog(folder.metrics, folder.attempt, progress.step, progress.tokens)
        wandb = WandbView(
            recipe.train.wandb,
            run_dir,
            folder.attempt,
            yaml.safe_load(redact(yaml.safe_dump(_plain(recipe)))),
            console.note,
        )
        recorder = Recorder(folder, metrics, console, wandb)
    peak = peak_flops(device, plan.dtype)
    return Trainer(
        train_cfg=recipe.train,
        eval_cfg=recipe.eval,
        save_every=recipe.checkpoint.every,
        total_steps=plan.total_steps,
        flops_per_token=recipe.model.flops_per_token(plan.vocab_size, recipe.data.seq_len),
        peak=None if peak is None else peak * plan.world,
        engine=engine,
        loader=loader,
        heldout=heldout,
        tokenizer=Tokenizer.load(recipe.data.tokenizer),
        rows=plan.microbatch,
        checkpointer=checkpointer,
        schedule={"events": [dataclasses.asdict(event) for event in log.events]},
        mesh=mesh,
        device=device,
        stop=stop,
        recorder=recorder,
        progress=progress,
    )


def _restore(settings: Settings, plan: Plan, checkpointer: Checkpointer, engine: FSDPEngine, progress: Progress) -> str:
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


def _everywhere(ranks: Ranks, make: Callable[[], T]) -> T:
    """``make()`` on every rank; where it fails on one, all raise that error instead of waiting for it."""
    made: list[T] = []
    ranks.together(lambda: made.append(make()))
    return made[0]


def _start_processes(device: torch.device) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def _dry_run(settings: Settings, cluster: ClusterConfig, world: int) -> int:
    recipe = settings.recipe
    tokenizer = Path(recipe.data.tokenizer)
    size = Tokenizer.load(tokenizer).vocab_size if tokenizer.exists() else None
    facts = summary(recipe.model, recipe.data, recipe.train, cluster, world_size=world, tokenizer_size=size)
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(facts) if settings.launch.json else dry_run_text(facts))
    return EXIT_DONE


def _plain(value: Any) -> dict[str, Any]:
    """A settings dataclass as JSON and YAML know it."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(value)))
    return plain


def _trained(text: str) -> Mapping[str, Any]:
    """The part of a recipe's YAML that decides what is trained."""
    recipe = yaml.safe_load(text)
    kept = {name: recipe.get(name) for name in TRAINED}
    kept["train"] = {key: value for key, value in kept["train"].items() if key not in VIEWS}
    return kept


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _banner(settings: Settings, plan: Plan, loader: Loader, heldout: Heldout, origin: str) -> list[str]:
    recipe, cluster = settings.recipe, plan.cluster
    model, train = recipe.model, recipe.train
    axes = {axis: size for axis, size in _plain(cluster.mesh).items() if size > 1}
    order = model.order()
    kinds = {name: order.count(name) for name in dict.fromkeys(order)}
    tokens = plan.total_steps * train.batch_tokens
    heldout_tokens = sum(heldout.num_tokens.values())
    unverified = "" if plan.device.type == "cpu" else "  (GPU runs are not verified by the project's tests)"
    return [
        f"lmtrain {__version__}: {settings.launch.recipe} in {recipe.run.dir}, {origin}",
        f"model: {model.num_params(plan.vocab_size):,} parameters, d_model {model.d_model}, "
        + ", ".join(f"{count} x {name} ({model.branches[name].kind})" for name, count in kinds.items()),
        f"compute: {plan.world} {plan.device.type} process{'es' if plan.world > 1 else ''}"
        + (f", mesh {', '.join(f'{axis} {size}' for axis, size in axes.items())}" if axes else "")
        + f", {str(plan.dtype).removeprefix('torch.')}, kernels "
        + ", ".join(f"{op} {backend}" for op, backend in plan.kernels.items())
        + unverified,
        f"training: {plan.total_steps:,} steps of {train.batch_tokens:,} tokens = {tokens:,} tokens, "
        f"{model.flops_per_token(plan.vocab_size, recipe.data.seq_len) * tokens:.2e} FLOPs",
        "data: "
        + ", ".join(
            f"{name} {loader.tokens_available[name]:,} tokens (weight {recipe.data.sources[name].weight:g})"
            for name in loader.source_names
        )
        + f"; held out: {heldout_tokens:,} tokens",
    ]
