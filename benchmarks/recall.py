"""Which mixers learn to recall, and which to keep track: MQAR and parity over all of them, in small models.

    make bench-recall                                 all, under 20 minutes on two cores
    python benchmarks/recall.py --only retnet gla     some models; or tasks (mqar, parity); or some models on one task

Models of two layers and width 32 (recall_models.py), fp32, one thread each, two at a time; fresh documents in every
step, until documents of the tests' sizes are solved or the steps are spent, or 60 CPU seconds; a second try where the
first did not solve the task (recall_training.py). MQAR is trained on documents of 4, 8 and 16 pairs, parity on 40 bits,
asked after every bit; the figures are of documents that chose nothing, parity of the last answer after 256 bits. One
seed, three for the controls, of which the table has the middle one. The controls must hold (exit 1 if not): attention
solves MQAR; RetNet stays behind Gated DeltaNet on the harder one, at equal state; a recurrence with negative
eigenvalues follows parity far beyond its training, where GLA and Mamba-2 stay at chance.

A figure compares mixers at this size, budget and these two tries: what is low here may learn with more of either.
Results go row by row to benchmarks/results/recall.json and replace the row of the same model, task and seed;
docs/recall.png is drawn from it.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import recall_training
import torch
from recall_controls import controls
from recall_models import KINDS, SIGNED, config
from recall_picture import draw
from recall_training import TASKS, measure

from lmtrain.errors import nearest
from lmtrain.ops import library
from lmtrain.train.hardware import describe

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PICTURE = ROOT / "benchmarks/results/recall.json", ROOT / "docs/recall.png"
REPEATED = {
    "mqar": ("attention", "retnet", "gated_deltanet"),
    "parity": ("deltanet_signed", "lrnn", "gla", "mamba2"),
}
"""Models of the controls, by task: they run with every seed of SEEDS, all others with the first."""
SEEDS, PROCESSES = (1, 2, 3), 2
Run = tuple[str, str, int]
Row = dict[str, Any]


def all_runs() -> list[Run]:
    """The controls first; signed variants differ on parity only."""
    repeated = [(name, task, seed) for task, names in REPEATED.items() for name in names for seed in SEEDS]
    once = [(name, task, SEEDS[0]) for task in TASKS for name in (*KINDS, *(SIGNED if task == "parity" else ()))]
    return list(dict.fromkeys(repeated + once))


def chosen(only: Sequence[str]) -> list[Run]:
    """The runs of these models on these tasks; none given: all."""
    known = {name for name, _, _ in all_runs()} | set(TASKS)
    for word in only:
        if word not in known:
            sys.exit(f"--only {word}: neither a model nor a task{nearest(word, known)}")
    tasks = [word for word in only if word in TASKS] or list(TASKS)
    models = [word for word in only if word not in TASKS]
    return [run for run in all_runs() if run[1] in tasks and (not models or run[0] in models)]


def setup(name: str, task: str) -> str:
    """Digest of all that a row's figures depend on, but for the library itself."""
    told = (config(name), TASKS[task].steps, TASKS[task].train, TASKS[task].rows, TASKS[task].tests)
    constants = {key: value for key, value in vars(recall_training).items() if key.isupper() and key != "TASKS"}
    return hashlib.blake2b(repr((told, constants)).encode(), digest_size=8).hexdigest()


def stored() -> dict[Run, Row]:
    """Rows of earlier runs that still mean what they would mean today; the others are named and left out."""
    if not RESULTS.exists():
        return {}
    rows: dict[Run, Row] = {}
    for row in json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]:
        run = (row["model"], row["task"], row["seed"])
        if run in all_runs() and row["setup"] == setup(row["model"], row["task"]):
            rows[run] = row
        else:
            print(f"{RESULTS.name}: {' '.join(map(str, run))} was measured with other settings and is left out")
    return rows


def save(rows: dict[Run, Row], hardware: dict[str, Any]) -> None:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    ordered = [rows[run] for run in all_runs() if run in rows]
    record = {"format_version": 1, "hardware": hardware, "versions": versions, "tries": recall_training.TRIES}
    RESULTS.write_text(json.dumps(record | {"rows": ordered}, indent=2) + "\n", encoding="utf-8")


def table(rows: dict[Run, Row]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Model to test to accuracy and interval: of the seed in the middle where there are several."""
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    for name in dict.fromkeys(run[0] for run in all_runs()):
        for task_name, task in TASKS.items():
            of_seeds = [row["results"] for run, row in rows.items() if run[:2] == (name, task_name)]
            for test in task.tests if of_seeds else ():
                middle = statistics.median_low(one[test]["accuracy"] for one in of_seeds)
                told = next(one[test] for one in of_seeds if one[test]["accuracy"] == middle)
                found.setdefault(name, {})[test] = (told["accuracy"], told["low"], told["high"])
    return found


def main() -> None:
    """Print hardware, versions, a line per run, the table and the controls; write results and picture."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="models or tasks (mqar, parity)")
    runs = chosen(parser.parse_args().only)
    library.load()
    hardware, date, begun = describe(torch.device("cpu")), str(datetime.date.today()), time.perf_counter()
    heading = f"{hardware['cpu']}, {PROCESSES} processes of one thread, torch {torch.__version__}, {date}"
    print(f"{heading}; load {os.getloadavg()[0]:.1f}; {len(runs)} runs\n", flush=True)
    rows = stored()
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn"), library.load) as pool:
        futures = {pool.submit(measure, *run): run for run in runs}
        for future in as_completed(futures):
            run, row = futures[future], future.result()
            rows[run] = row | {"setup": setup(*run[:2]), "date": date}
            save(rows, hardware)
            told = "  ".join(
                f"{test} {one['accuracy']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"
                for test, one in row["results"].items()
            )
            tries = ", ".join(f"{one['steps']} steps in {one['cpu_seconds']:.0f} s" for one in row["tries"])
            print(f"{run[0]:22} seed {run[2]}  {told}  ({tries})", flush=True)
    found = table(rows)
    tests = [test for task in TASKS.values() for test in task.tests]
    print(f"\n{'':22}" + "".join(f"{test:>12}" for test in tests))
    for name, values in found.items():
        print(f"{name:22}" + "".join(f"{values[test][0]:12.3f}" if test in values else f"{'-':>12}" for test in tests))
    draw(found, tests, heading, PICTURE)
    held = controls(rows)
    print(f"\n{time.perf_counter() - begun:.0f} seconds\n")
    for control in held:
        print(f"{control.verdict:12} {control.claim}: {control.told}")
    sys.exit(any(control.verdict == "FAILS" for control in held))


if __name__ == "__main__":
    main()
