"""The demo: text from the Python installation, a small hybrid on two processes, stopped, resumed, judged, exported."""

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

from lmtrain import shipped
from lmtrain.config.load import load
from lmtrain.data.corpora.jsonl import SOURCES as SOURCES_FILE
from lmtrain.data.corpora.python_corpus import write_python_corpus
from lmtrain.data.ingest.ingest import PrepareConfig, prepare
from lmtrain.data.ingest.reading import SourceOptions
from lmtrain.errors import EXIT_STOPPED, LmtrainError, UnhealthyError
from lmtrain.eval.baselines import baselines
from lmtrain.train.console import Console
from lmtrain.train.metrics import read_metrics

RUN, STRAIGHT = Path("runs/demo"), Path("runs/demo-straight")
TEXT, DATA = Path("data/python"), Path("data/demo")
SOURCES = ("code", "reference", "cheaders")
STOP_AFTER, STRAIGHT_STEPS = 30, 60
TRAIN = ("recipe=demo", "cluster=laptop", "mesh.sp=2", "mesh.ep=2")
FORMAT_VERSION = 1


def main() -> int:
    """Run the demo in the current folder; prints a summary and writes ``runs/demo/summary.json``."""
    seconds: dict[str, float] = {}
    try:
        with _timed(seconds, "corpus", "The text that comes with Python, and a tokenizer for it"):
            _corpus()
        for folder in (RUN, STRAIGHT):
            shutil.rmtree(folder, ignore_errors=True)
        with _timed(seconds, "training", "Training on two processes: each has half of every row and of the experts"):
            stopped_at = _train(RUN, stop_after=STOP_AFTER)
            print(f"\nStopped on purpose after step {stopped_at}, with a checkpoint. Resuming.\n", flush=True)
            _train(RUN)
        with _timed(seconds, "resume_proof", f"{STRAIGHT_STEPS} steps of that run without a stop, to compare the bits"):
            _train(STRAIGHT, stop_after=STRAIGHT_STEPS)
        with _timed(seconds, "evaluation", "Judging it"):
            bars = baselines(load(["recipe=demo"]).recipe.data)
            questions = shipped.folder("eval") / "data" / "mmlu_python"
            _verb("evaluate", str(RUN), "heldout=true", f"mmlu={questions}", "num_fewshot=3")
        with _timed(seconds, "export", "Exporting it to Hugging Face transformers, which must compute the same"):
            _verb("export", str(RUN))
        summary = _summarise(stopped_at, bars, seconds)
        (RUN / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        with _timed(seconds, "report", "The report"):
            _verb("report", str(RUN))
    except LmtrainError as error:
        print(f"lmtrain demo: {error}", file=sys.stderr)
        return error.exit_code
    summary |= {"seconds": seconds, "wall_seconds": round(sum(seconds.values()), 1)}
    (RUN / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    Console(0, 1).summary(_words(summary))
    return 0


def _corpus() -> None:
    if not all((TEXT / name).exists() for name in (SOURCES_FILE, *(f"{name}.jsonl" for name in SOURCES))):
        write_python_corpus(TEXT)
    print(f"  digest of the corpus: {json.loads((TEXT / SOURCES_FILE).read_text(encoding='utf-8'))['digest']}")
    sources = {name: SourceOptions(path=f"{TEXT / name}.jsonl") for name in SOURCES}
    manifests, _ = prepare(
        PrepareConfig(out=str(DATA), tokenizer="train:2048", sources=sources, heldout=0.02, workers=2)
    )
    for name, manifest in manifests.items():
        train, heldout = manifest.file("train.bin"), manifest.file("heldout.bin")
        print(f"  {name}: {train.tokens:,} tokens to train on, {heldout.tokens:,} held out")


def _train(folder: Path, stop_after: int | None = None) -> int:
    """Train ``recipe=demo`` in ``folder`` to the end, or until a stop file dropped after some steps; the last step."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "lmtrain.launch.pretrain", *TRAIN, f"run.dir={folder}"]
    print(f"$ torchrun --nproc-per-node 2 launch/pretrain.py {' '.join(TRAIN)} run.dir={folder}", flush=True)
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
    verdict: dict[str, Any] = {"code": None, "step": 0}
    if exits.exists():
        verdict = json.loads(exits.read_text(encoding="utf-8").splitlines()[-1])
    if verdict["code"] not in (0, EXIT_STOPPED):
        tail = "\n".join(errors.read_text(encoding="utf-8").splitlines()[-20:])
        raise UnhealthyError(f"training in {folder} ended with {verdict}; the end of {errors}:\n{tail}")
    return int(verdict["step"])


def _verb(verb: str, *arguments: str) -> None:
    """Run ``lmtrain VERB``, as a person would."""
    print(f"$ lmtrain {verb} {' '.join(arguments)}", flush=True)
    command = [sys.executable, str(shipped.folder("launch") / f"{verb}.py"), *arguments]
    code = subprocess.run(command, check=False).returncode
    if code:
        raise UnhealthyError(f"{verb} ended with code {code}; what it said is above")


def _last_step(folder: Path) -> int:
    rows = _steps(folder)
    return rows[-1]["step"] if rows else 0


def _steps(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [row for row in read_metrics(path) if row["kind"] == "step"] if path.exists() else []


def _summarise(stopped_at: int, bars: dict[str, float], seconds: dict[str, float]) -> dict[str, Any]:
    rows, straight = _steps(RUN), {row["step"]: row for row in _steps(STRAIGHT)}
    scores = [row["heldout_bpb"] for row in read_metrics(RUN / "metrics.jsonl") if row["kind"] == "eval"]
    evaluation = json.loads((RUN / "evaluation.json").read_text(encoding="utf-8"))
    export = json.loads((RUN / "export" / "lmtrain_export.json").read_text(encoding="utf-8"))
    parity = export["parity"]
    position = evaluation["heldout"]["loss_by_position"]
    compared = [row for row in rows if row["step"] in straight]
    keys = ("loss", "grad_norm", "token_hash")
    resumed = [row for row in compared if row["step"] > stopped_at]
    speeds = sorted(row["tokens_per_second"] for row in rows)
    return {
        "format_version": FORMAT_VERSION,
        "heldout_bpb_start": scores[0],
        "heldout_bpb_end": scores[-1],
        **bars,
        "loss_by_position_gain": position["early"] - position["late"],
        "resume_bitwise_equal": bool(resumed)
        and all(row[key] == straight[row["step"]][key] for row in compared for key in keys),
        "resumed_steps_compared": len(resumed),
        "export_class": export["class"],
        "export_max_logit_diff": parity["perturbed_max_logit_diff"],
        "export_logit_std": parity["perturbed_logit_std"],
        "cached_equals_uncached": parity["cached_equals_uncached"],
        "tokens_per_second": speeds[len(speeds) // 2],
        "seconds": seconds,
        "wall_seconds": round(sum(seconds.values()), 1),
    }


def _words(summary: dict[str, Any]) -> list[str]:
    equal = "bit for bit" if summary["resume_bitwise_equal"] else "NOT"
    generated = "the same" if summary["cached_equals_uncached"] else "NOT the same"
    return [
        "held-out text, bits per byte",
        f"  before training        {summary['heldout_bpb_start']:.3f}",
        f"  after training         {summary['heldout_bpb_end']:.3f}",
        f"  token unigram          {summary['token_unigram_bpb']:.3f}",
        f"  token bigram           {summary['token_bigram_bpb']:.3f}",
        f"  xz -9 alone            {summary['xz_alone_bpb']:.3f}",
        f"context helps: {summary['loss_by_position_gain']:.2f} nats a token between the start of a document and later",
        f"stopped and resumed: {equal} equal to the run without a stop ({summary['resumed_steps_compared']} steps)",
        f"exported as {summary['export_class']}: logits differ by {summary['export_max_logit_diff']:.1e} at most, "
        f"text with and without cache is {generated}",
        f"{summary['tokens_per_second']:,.0f} tokens per second; "
        + ", ".join(f"{name} {value:.0f} s" for name, value in summary["seconds"].items()),
        f"look at {RUN / 'report.html'}; everything else is beside it",
    ]


@contextmanager
def _timed(seconds: dict[str, float], name: str, words: str) -> Iterator[None]:
    print(f"\n=== {words}", flush=True)
    begun = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - begun, 1)
