"""Does a mixture that adapts beat one that does not? Held-out bits per byte by source, several seeds, equal tokens.

    python benchmarks/mixture.py [data=data/demo] [arms=equal,ado] [seeds=0,1,2] [train.tokens=2e6 ...]

data: a folder made by one launch/prepare.py call, all sources of which take part. Further words are settings of the run
(launch/pretrain.py help=KEY). Every run is a folder under runs/mixture; a finished one is not run again, so that the
experiment can be done in pieces. When all arms have all seeds, the table is printed and benchmarks/results/mixture.json
written: for every arm, mean over seeds with a 95 % t-interval, and of the paired difference from ``equal`` (stratified
sampling, the baseline of arXiv 2411.05735) by seed. A difference whose interval holds 0 is no difference.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import t as student

from lmtrain.data.store.manifest import NAME, Manifest
from lmtrain.train.hardware import describe

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "mixture.json"
ARMS = {
    "equal": [],
    "proportional": ["data.policy.first=proportional"],
    "temperature": ["data.policy.first=temperature", "data.policy.tau=2"],
    "odm_exp3": ["data.policy.kind=odm_exp3"],
    "ado": ["data.policy.kind=ado", "data.policy.first=proportional"],
}
"""Every arm begins with equal weights unless it says otherwise; ADO's prior is proportional, as published."""
BASELINE, PREFIX = "equal", "heldout_bpb."
SETTINGS = [
    "recipe=tiny",
    "train.steps=null",
    "train.tokens=1e6",
    "train.batch_tokens=2048",
    "train.log_every=50",
    "train.schedule.warmup_tokens=50000",
    "train.schedule.decay_tokens=300000",
    "data.policy.every=10",
    "eval.every=0",
    "eval.max_tokens=65536",
    "checkpoint.every=0",
]


def run(arm: str, seed: int, data: Path, extra: list[str]) -> dict[str, float]:
    """Held-out bits per byte by source at the end of a run, trained unless its folder has the end already."""
    folder = ROOT / "runs" / "mixture" / f"{data.name}-{arm}-{seed}"
    sources = sorted(path.parent.name for path in data.glob(f"*/{NAME}"))
    settings = [f"data.tokenizer={data / 'tokenizer.json'}", "data.sources=null", f"run.dir={folder}", f"seed={seed}"]
    settings += [f"data.sources.{name}={{path: {data / name}, weight: 1}}" for name in sources]
    if _ended(folder) is None:
        command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), *SETTINGS, *settings, *ARMS[arm], *extra]
        subprocess.run(
            command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.DEVNULL
        )
    found = _ended(folder)
    if found is None:
        raise SystemExit(f"{folder}: the run ended without held-out scores; see its exits.jsonl")
    return {name: found[name] for name in sources}


def _ended(folder: Path) -> dict[str, float] | None:
    exits, metrics = folder / "exits.jsonl", folder / "metrics.jsonl"
    if not exits.exists() or json.loads(exits.read_text(encoding="utf-8").splitlines()[-1])["code"] != 0:
        return None
    rows = map(json.loads, metrics.read_text(encoding="utf-8").splitlines())
    last = [row for row in rows if row["kind"] == "eval"][-1]
    return {key.removeprefix(PREFIX): value for key, value in last.items() if key.startswith(PREFIX)}


def interval(values: NDArray[np.float64]) -> list[float]:
    """Mean, and half the width of the 95 % t-interval."""
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return [round(float(values.mean()), 4), round(float(half), 4)]


def table(scores: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """By arm and source, and their plain mean: bits per byte, and the difference from the baseline by seed."""
    sources = list(scores[BASELINE][0])
    values = {arm: np.array([[run[name] for name in sources] for run in runs]) for arm, runs in scores.items()}
    values = {arm: np.column_stack([each, each.mean(axis=1)]) for arm, each in values.items()}
    columns = [*sources, "mean"]
    return {
        arm: {
            "bits_per_byte": {name: interval(each[:, i]) for i, name in enumerate(columns)},
            f"minus_{BASELINE}": {name: interval((each - values[BASELINE])[:, i]) for i, name in enumerate(columns)},
        }
        for arm, each in values.items()
    }


def main(argv: list[str]) -> None:
    """Run what is missing of the chosen arms and seeds; report when everything is there."""
    given = dict(word.partition("=")[::2] for word in argv)
    data = Path(given.pop("data", "data/demo"))
    arms = given.pop("arms", ",".join(ARMS)).split(",")
    seeds = [int(seed) for seed in given.pop("seeds", "0,1,2").split(",")]
    extra = [f"{key}={value}" for key, value in given.items()]
    scores: dict[str, list[dict[str, float]]] = {}
    for seed in seeds:
        for arm in arms:
            scores.setdefault(arm, []).append(run(arm, seed, data, extra))
            print(f"{arm} seed {seed}: {json.dumps(scores[arm][-1])}", flush=True)
    if set(arms) != set(ARMS) or len(seeds) < 2:
        return
    rows = table(scores)
    for arm, row in rows.items():
        for name, (value, half) in row["bits_per_byte"].items():
            difference, width = row[f"minus_{BASELINE}"][name]
            print(f"{arm:14} {name:14} {value:.4f} +- {half:.4f}   minus {BASELINE}: {difference:+.4f} +- {width:.4f}")
    digests = {
        path.parent.name: Manifest.read(path.parent).file("train.bin").xxh3_128 for path in data.glob(f"*/{NAME}")
    }
    record = {
        "format_version": 1,
        "date": str(datetime.date.today()),
        "hardware": describe(torch.device("cpu")),
        "data": digests,
        "settings": [*SETTINGS, *extra],
        "arms": ARMS,
        "seeds": seeds,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
