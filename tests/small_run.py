"""Runs small enough to be made by the dozen: real prepared data, a real recipe, the real command line.

A run is made in this process (``train``), by ranks forked from a process that has imported everything (``Forked``: a
start takes a second), or by the real torchrun (``Torchrun``: ten seconds).
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from lmtrain.checkpoint.lock import RunLock
from lmtrain.data.ingest.ingest import PrepareConfig, prepare
from lmtrain.data.ingest.reading import SourceOptions
from lmtrain.data.reader import StepData
from lmtrain.pretrain import main
from lmtrain.train.loop import Trainer
from lmtrain.train.metrics import read_metrics
from tests.distributed import kill_worker
from tests.distributed.kill_worker import Kill

ROOT = Path(__file__).parents[1]
STEPS, SAVE_EVERY, BATCH_TOKENS = 16, 4, 256
MARK = "LMTRAIN_TEST_RUN"
"""Environment variable by which a run's processes are found, also when whoever started them is gone."""
DEADLINE = 120.0
"""Seconds that nothing here takes unless it hangs."""
SOURCES = {"prose": 260, "lists": 120}
RECIPE = """\
model:
  d_model: 32
  branches:
    ssm: {{kind: mamba2, head_dim: 16, d_state: 8, chunk: 16}}
    attn: {{kind: attention, num_heads: 2, num_kv_heads: 2, head_dim: 16}}
    mlp: {{kind: mlp, d_ff: 64}}
  pattern: ssm mlp attn mlp
data:
  tokenizer: {data}/tokenizer.json
  seq_len: 64
  sources:
    prose: {{path: {data}/prose, weight: 0.7}}
    lists: {{path: {data}/lists, weight: 0.3}}
train:
  steps: {steps}
  batch_tokens: {batch_tokens}
  lr: 5e-3
  schedule: {{kind: wsd, warmup_tokens: 512, decay_tokens: 1024}}
eval: {{max_tokens: 512}}
checkpoint: {{every: {save_every}, keep_last: 2}}
"""


def make_recipe(folder: Path) -> Path:
    """A recipe in ``folder`` and the data it reads, made by the code behind launch/prepare.py."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 8))) for _ in range(80)]
    for name, documents in SOURCES.items():
        separator = " " if name == "prose" else "\n- "
        lines = [separator.join(draw.choices(words, k=draw.randint(20, 90))) for _ in range(documents)]
        text = "".join(json.dumps({"text": line}) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    options = {name: SourceOptions(str(folder / f"{name}.jsonl")) for name in SOURCES}
    prepare(PrepareConfig(out=str(folder / "data"), tokenizer="train:300", sources=options, heldout=0.05))
    recipe = folder / "small.yaml"
    settings = {"data": folder / "data", "steps": STEPS, "batch_tokens": BATCH_TOKENS, "save_every": SAVE_EVERY}
    recipe.write_text(RECIPE.format(**settings), encoding="utf-8")
    return recipe


def words(recipe: Path, run_dir: Path, *overrides: str) -> list[str]:
    """The command line of a run; later overrides win."""
    given = dict(word.split("=", 1) for word in overrides)
    fixed = {"recipe": str(recipe), "cluster": "laptop", "run.dir": str(run_dir), "kernels": "reference"}
    return [f"{key}={value}" for key, value in (fixed | given).items()]


# --------------------------------------------------------------------------------------------- in this process


@dataclass(frozen=True)
class Outcome:
    """How a run in this process ended: exit code, what it printed, and what it told of errors and logged."""

    code: int
    out: str
    err: str


def train(argv: list[str]) -> Outcome:
    """``lmtrain.pretrain.main`` with ``argv``."""
    out, err = io.StringIO(), io.StringIO()
    handler, root = logging.StreamHandler(err), logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(argv)
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    return Outcome(code, out.getvalue(), err.getvalue())


def before_step(monkeypatch: pytest.MonkeyPatch, actions: dict[int, Callable[[Trainer], object]]) -> None:
    """Have runs in this process call ``actions[n]`` just before their n-th optimizer step (from 1)."""
    original = Trainer._step

    def step(self: Trainer, data: StepData, lr: float) -> Any:
        actions.get(data.step + 1, lambda trainer: None)(self)
        return original(self, data, lr)

    monkeypatch.setattr(Trainer, "_step", step)


# --------------------------------------------------------------------------------------------- several ranks


class Forked:
    """Ranks of one run, forked from a process that has imported everything. This process plays torchrun's agent."""

    def __init__(self, world: int, argv: list[str], logs: Path, kill: Kill | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.distributed.kill_worker"])
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.logs = [logs / f"rank-{rank}.log" for rank in range(world)]
        self.processes: list[multiprocessing.process.BaseProcess] = []
        for rank, log in enumerate(self.logs):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self._store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": "0",
                "TORCHELASTIC_RUN_ID": "test",
                MARK: _run_dir(argv),
            }
            process = context.Process(target=kill_worker.forked, args=(argv, environment, log, kill))
            process.start()
            self.processes.append(process)

    def wait(self) -> list[int]:
        """Exit codes by rank; minus the signal of a rank that was killed."""
        until(lambda: not any(process.is_alive() for process in self.processes), "ranks end", self._stop)
        return [-1 if process.exitcode is None else process.exitcode for process in self.processes]

    def output(self) -> str:
        """What all ranks printed, rank by rank."""
        return "".join(log.read_text(encoding="utf-8") for log in self.logs if log.exists())

    def _stop(self) -> str:
        for process in self.processes:
            process.kill()
        return self.output()


class Torchrun:
    """A run under the real torchrun; ``script`` is started by every rank."""

    def __init__(
        self, world: int, argv: list[str], logs: Path, *, kill: Kill | None = None, script: str = "launch/pretrain.py"
    ) -> None:
        self.log, self.run_dir = logs / "torchrun.log", Path(_run_dir(argv))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", MARK: _run_dir(argv)}
        if kill is not None:
            script = "tests/distributed/kill_worker.py"
            environment[kill_worker.PLAN] = kill.to_text()
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*command, script, *argv], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )

    def wait(self) -> int:
        """torchrun's exit code."""
        until(lambda: self.process.poll() is not None, "torchrun ends", self._stop)
        return self.process.returncode

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def _stop(self) -> str:
        self.process.kill()
        return end_processes_of(self.run_dir) + self.output()


def until(condition: Callable[[], bool], what: str, give_up: Callable[[], str] = lambda: "") -> None:
    """Wait for ``condition``; fail, with what ``give_up`` tells, if it does not come true."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {DEADLINE:.0f} s in vain: {what}\n{give_up()}")
        time.sleep(0.02)


def processes_of(run_dir: Path) -> list[psutil.Process]:
    """Processes alive that a run of ``Torchrun`` started, and loader processes of one of ``Forked``."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == str(run_dir):
                found.append(process)
    return found


def end_processes_of(run_dir: Path) -> str:
    """SIGKILL to all of them; says which they were."""
    left = processes_of(run_dir)
    said = "".join(f"still there: {process.pid} {' '.join(process.cmdline())}\n" for process in left)
    for process in left:
        process.kill()
    return said


def _run_dir(argv: list[str]) -> str:
    return next(word.removeprefix("run.dir=") for word in argv if word.startswith("run.dir="))


# --------------------------------------------------------------------------------------------- what a run left


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """The step rows of a run's present timeline."""
    return [row for row in read_metrics(run_dir / "metrics.jsonl") if row["kind"] == "step"]


def trajectory(run_dir: Path) -> list[tuple[Any, ...]]:
    """What must be equal bit for bit between two runs, step by step."""
    keys = ("step", "tokens", "loss", "grad_norm", "lr", "token_hash")
    return [tuple(row[key] for key in keys) for row in rows(run_dir)]


def column(run_dir: Path, key: str) -> list[Any]:
    return [row[key] for row in rows(run_dir)]


def exits(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of exits.jsonl."""
    return [json.loads(line) for line in (run_dir / "exits.jsonl").read_text(encoding="utf-8").splitlines()]


def saved(run_dir: Path) -> list[int]:
    """Steps of the checkpoints there are."""
    return sorted(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-????????"))


def checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def damage(path: Path) -> None:
    """Flip one bit of a checkpoint's tensors."""
    shard = next(path.glob("shard-*.bin"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)


def copy_until(source: Path, target: Path, step: int) -> Path:
    """A copy of a run folder as it was after the checkpoint of ``step``, so that it can be resumed from there."""
    shutil.copytree(source, target)
    for other in saved(target):
        if other > step:
            shutil.rmtree(checkpoint(target, other))
    (target / "exits.jsonl").unlink()
    return target


def contents(folder: Path, leave_out: Iterable[str] = ()) -> dict[str, bytes]:
    """Every file below ``folder`` with its bytes."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in set(leave_out))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def assert_no_processes(run_dir: Path) -> None:
    until(lambda: not processes_of(run_dir), "the run's processes end", lambda: end_processes_of(run_dir))


def assert_clean(run_dir: Path) -> None:
    """Nothing half written is left, and the run's lock is free."""
    root = run_dir / "checkpoints"
    assert [path.name for path in root.iterdir() if path.name.startswith((".tmp", ".del"))] == []
    lock_text = (run_dir / "run.lock").read_text(encoding="utf-8")
    RunLock(run_dir, "test").release()
    (run_dir / "run.lock").write_text(lock_text, encoding="utf-8")
