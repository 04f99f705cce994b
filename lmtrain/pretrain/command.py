"""The command line of pretraining: checks, processes, exit codes."""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from lmtrain.config.help import answer
from lmtrain.config.load import Settings, load
from lmtrain.config.recipe import Recipe
from lmtrain.data.loader import Loader
from lmtrain.data.order.schedule import ScheduleLog
from lmtrain.data.policies.epochs import check_epochs, check_supply
from lmtrain.data.policies.policy import MixPolicy
from lmtrain.data.sources import check_sources
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import EXIT_DONE, EXIT_INTERNAL, EXIT_INTERRUPTED, DataError, LmtrainError
from lmtrain.ops.library import chosen, set_kernels
from lmtrain.parallel.config import ClusterConfig
from lmtrain.parallel.mesh import fewest, resolve
from lmtrain.parallel.supported import check as check_supported
from lmtrain.pipe import ends_with_its_reader
from lmtrain.plan.dry_run import embedding_rows, rows_per_pass, summary
from lmtrain.plan.text import text as dry_run_text
from lmtrain.pretrain.attempt import attempt
from lmtrain.pretrain.plan import Plan, check_policy, policy_of
from lmtrain.train.hardware import resolve_device, resolve_dtype
from lmtrain.train.signals import StopRequest, die_with_parent

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)


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
            with ends_with_its_reader():
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


def run(settings: Settings, argv: list[str]) -> int:
    """Check, start the processes, train. Raises LmtrainError; every check that can be made before work is."""
    recipe = settings.recipe
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.launch.dry_run and "WORLD_SIZE" not in os.environ:
        world = fewest(settings.cluster.mesh)
    cluster = dataclasses.replace(settings.cluster, mesh=resolve(settings.cluster.mesh, world))
    set_kernels(cluster.kernels)
    for length in {recipe.data.seq_len, *(length for _, length in recipe.data.seq_lens)}:
        check_supported(
            recipe.model, seq_len=length, cluster=cluster, mesh=cluster.mesh, run_blocks=recipe.data.run_blocks
        )
    if settings.launch.dry_run:
        return _dry_run(settings, cluster, world)
    device = resolve_device(cluster.device)
    dtype = resolve_dtype(cluster.dtype, device)
    kernels = chosen(device.type, dtype)
    microbatch = rows_per_pass(recipe.data, recipe.train, cluster, cluster.mesh)
    loader = _check_data(recipe, cluster, microbatch)
    vocab_size = embedding_rows(recipe.model, loader.vocab_size)
    assert vocab_size is not None, "known, since the tokenizer is"
    policy, weights, warnings = _mixture(recipe, loader)
    plan = Plan(
        cluster,
        world,
        device,
        dtype,
        vocab_size,
        microbatch,
        total_steps=recipe.train.num_steps(recipe.data),
        kernels=kernels,
        policy=policy,
        weights=weights,
        warnings=warnings,
    )
    _start_processes(device)
    try:
        with StopRequest() as stop:
            return attempt(settings, plan, argv, stop)
    finally:
        dist.destroy_process_group()


def _check_data(recipe: Recipe, cluster: ClusterConfig, microbatch: int) -> Loader:
    """Raises what is wrong with the data, before there is a run folder."""
    weights = {name: source.weight for name, source in recipe.data.sources.items()}
    try:
        return Loader(
            recipe.data,
            seed=recipe.seed,
            batch_tokens=recipe.train.batch_tokens,
            batch_ramp=recipe.train.batch_ramp,
            microbatch=microbatch,
            dp_rank=0,
            dp_size=cluster.mesh.dp_replicate * cluster.mesh.dp_shard,
            log=ScheduleLog.fixed(weights),
        )
    except DataError as error:
        raise DataError("; ".join(check_sources(recipe.data)) or str(error)) from error


def _mixture(recipe: Recipe, loader: Loader) -> tuple[MixPolicy, Mapping[str, float], list[str]]:
    """The policy, the first mixture, and warnings of sources read often. UsageError for what cannot work."""
    data = recipe.data
    policy = policy_of(recipe, loader)
    weights = {name: source.weight for name, source in data.sources.items()}
    available, plan = loader.tokens_available, policy.plan()
    if plan is None:  # the policy decides as it goes, among the sources it begins with
        total = loader.schedule.tokens(recipe.train.num_steps(data))
        warnings = check_supply(total, {name: available[name] for name in policy.first}, data.max_epochs)
    else:
        warnings = check_epochs(plan, available, data.max_epochs)
    return policy, weights if data.policy.first == "weights" else policy.first, warnings


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
    if facts["missing"]:
        check_policy(recipe)
    else:
        try:
            facts["warnings"] = _mixture(recipe, _check_data(recipe, cluster, facts["microbatch"]))[2]
        except DataError as error:
            facts["missing"] = [str(error)]
    if int(os.environ.get("RANK", "0")) == 0:
        with ends_with_its_reader():
            print(json.dumps(facts) if settings.launch.json else dry_run_text(facts))
    return EXIT_DONE
