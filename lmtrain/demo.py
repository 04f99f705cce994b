"""The demo: a corpus from the Python installation, a small hybrid on two processes, stopped, resumed, and judged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmtrain.config.load import load
from lmtrain.data.ingest import PrepareConfig, prepare
from lmtrain.data.python_corpus import write_python_corpus
from lmtrain.data.reading import SourceOptions
from lmtrain.errors import EXIT_STOPPED, LmtrainError, UnhealthyError
from lmtrain.eval.baselines import baselines
from lmtrain.train.console import Console
from lmtrain.train.metrics import read_metrics

RUN, STRAIGHT = Path("runs/demo"), Path("runs/demo-straight")
TEXT, DATA = Path("data/python"), Path("data/demo")
STOP_AFTER, STRAIGHT_STEPS = 20, 40
MESH = "mesh.sp=2"
FORMAT_VERSION = 1


def main() -> int:
    """Run the demo in the current folder; prints a summary and writes ``runs/demo/summary.json``."""
    seconds: dict[str, float] = {}
    try:
        with _timed(seconds, "corpus", "Collecting the text that comes with Python, training a tokenizer"):
            _corpus()
        for folder in (RUN, STRAIGHT):
            shutil.rmtree(folder, ignore_errors=True)
        with _timed(
            seconds, "train", "Training on two processes that share every row (sp=2); stopped early on purpose"
        ):
            stopped_at = _train(RUN, stop_after=STOP_AFTER)
            print(f"\nStopped after step {stopped_at} with a checkpoint. Resuming.\n", flush=True)
            _train(RUN)
        with _timed(
            seconds, "resume_proof", f"The same run without the stop, {STRAIGHT_STEPS} steps, to compare bit by bit"
        ):
            _train(STRAIGHT, stop_after=STRAIGHT_STEPS)
        with _timed(seconds, "baselines", "What the held-out text costs without a model"):
            bars = baselines(load(["recipe=demo"]).recipe.data)
        summary = _summarise(stopped_at, bars, seconds)
    except LmtrainError as error:
        print(f"lmtrain demo: {error}", file=sys.stderr)
        return error.exit_code
    (RUN / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    Console(0, 1).summary(_words(summary))
    return 0


def _corpus() -> None:
    if not (TEXT / "code.jsonl").exists():
        write_python_corpus(TEXT)
    sources = {name: SourceOptions(path=f"{TEXT / name}.jsonl") for name in ("code", "reference", "cheaders")}
    manifests, _ = prepare(
        PrepareConfig(out=str(DATA), tokenizer="train:2048", sources=sources, heldout=0.03, workers=2)
    )
    for name, manifest in manifests.items():
        train, heldout = manifest.file("train.bin"), manifest.file("heldout.bin")
        print(f"  {name}: {train.tokens:,} tokens to train on, {heldout.tokens:,} held out")


def _train(folder: Path, stop_after: int | None = None) -> int:
    """Train ``recipe=demo`` in ``folder`` to the end, or until a stop file dropped after some steps; the last step."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "lmtrain.launch.pretrain", "recipe=demo", "cluster=laptop", MESH, f"run.dir={folder}"]
    folder.mkdir(parents=True, exist_ok=True)
    errors = folder / "stderr.log"
    with open(errors, "a", encoding="utf-8") as log:
        process = subprocess.Popen(command, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            while process.poll() is None:
                time.sleep(0.1)
                if stop_after is not None and _last_step(folder) >= stop_after:
                    (folder / "control" / "stop").touch()
                    stop_after = None
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    exits = folder / "exits.jsonl"
    verdict = {"code": None, "step": 0}
    if exits.exists():
        verdict = json.loads(exits.read_text(encoding="utf-8").splitlines()[-1])
    if verdict["code"] not in (0, EXIT_STOPPED):
        tail = "\n".join(errors.read_text(encoding="utf-8").splitlines()[-20:])
        raise UnhealthyError(f"training in {folder} ended with {verdict}; the end of {errors}:\n{tail}")
    return int(verdict["step"])


def _last_step(folder: Path) -> int:
    rows = _steps(folder)
    return rows[-1]["step"] if rows else 0


def _steps(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [row for row in read_metrics(path) if row["kind"] == "step"] if path.exists() else []


def _summarise(stopped_at: int, bars: dict[str, float], seconds: dict[str, float]) -> dict[str, Any]:
    rows, straight = _steps(RUN), {row["step"]: row for row in _steps(STRAIGHT)}
    scores = [row["heldout_bpb"] for row in read_metrics(RUN / "metrics.jsonl") if row["kind"] == "eval"]
    compared = [row for row in rows if row["step"] in straight]
    keys = ("loss", "grad_norm", "token_hash")
    resumed = [row for row in compared if row["step"] > stopped_at]
    speeds = sorted(row["tokens_per_second"] for row in rows)
    return {
        "format_version": FORMAT_VERSION,
        "heldout_bpb_start": scores[0],
        "heldout_bpb_end": scores[-1],
        **bars,
        "resume_bitwise_equal": bool(resumed)
        and all(row[key] == straight[row["step"]][key] for row in compared for key in keys),
        "resumed_steps_compared": len(resumed),
        "tokens_per_second": speeds[len(speeds) // 2],
        "wall_seconds": sum(seconds.values()),
        "seconds": seconds,
    }


def _words(summary: dict[str, Any]) -> list[str]:
    equal = "bit for bit" if summary["resume_bitwise_equal"] else "NOT"
    return [
        "held-out text, bits per byte",
        f"  before training        {summary['heldout_bpb_start']:.3f}",
        f"  after training         {summary['heldout_bpb_end']:.3f}",
        f"  token unigram          {summary['token_unigram_bpb']:.3f}",
        f"  token bigram           {summary['token_bigram_bpb']:.3f}",
        f"  xz -9 alone            {summary['xz_alone_bpb']:.3f}",
        f"stopped and resumed: {equal} equal to the run without a stop ({summary['resumed_steps_compared']} steps after it)",
        f"{summary['tokens_per_second']:,.0f} tokens per second; "
        + ", ".join(f"{name} {value:.0f} s" for name, value in summary["seconds"].items()),
        f"everything is in {RUN}: metrics.jsonl, checkpoints/, summary.json",
    ]


@contextmanager
def _timed(seconds: dict[str, float], name: str, words: str) -> Iterator[None]:
    print(f"\n=== {words}", flush=True)
    begun = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - begun, 1)
