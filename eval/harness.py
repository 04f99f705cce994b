"""Running lm-eval tasks from a folder of YAML files: quiet, and without a trace in the process's random state."""

from __future__ import annotations

import io
import logging
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from lmtrain.errors import DataError, UsageError, nearest

SEED = 1234
"""Of everything a task may draw: shots that are not the first, shuffled options."""


def run_tasks(
    lm: LM, include: str | Path, names: Sequence[str], *, num_fewshot: int | None = None, limit: int | None = None
) -> dict[str, Any]:
    """lm-eval's results for tasks defined below ``include``; its own tasks are not even indexed (that takes a minute).

    num_fewshot: replaces what the tasks say, except an explicit 0. limit: questions of each task, the first ones.
    Standard errors are left to the caller. Raises UsageError for an unknown task, DataError for one that does not load.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if not Path(include).is_dir():
        raise UsageError(f"include={include}: no such folder")
    with kept_random_state(), _progress_bars():
        manager = TaskManager(include_path=str(include), include_defaults=False)
        known = [*manager.all_tasks, *manager.all_groups, *manager.all_tags]
        for name in names:
            if name not in known:
                raise UsageError(f"tasks: no task {name} in {include}{nearest(name, known)}")
        try:
            loaded = manager.load(list(names))
        except Exception as error:  # whatever a YAML file, a data set or a function in it raises
            raise DataError(f"tasks {', '.join(names)}: {type(error).__name__}: {error}".splitlines()[0]) from error
        for task in loaded["tasks"].values():
            shots = task.get_config("num_fewshot")
            if num_fewshot is not None and shots != 0:
                shots = num_fewshot
            task.set_config(key="num_fewshot", value=shots or 0)
            task.set_fewshot_seed(seed=SEED)
        results = evaluator.evaluate(lm, loaded, limit=limit, bootstrap_iters=0, log_samples=False)
    assert results is not None, "there is one process"
    return dict(results)


@contextmanager
def _progress_bars() -> Iterator[None]:
    """Those of lm-eval only where somebody watches, those of ``datasets`` (four per subject) never."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
            yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Seeds every global generator, and puts them back as they were: an evaluation must not change a training."""
    python, numpy_state, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)
