"""Does a mixer cost the same per token in long rows as in short ones? Forward and backward, equal tokens per batch.

    python benchmarks/length.py [gla mamba2 ...]

Every mixer kind by itself at d_model 256, 16384 tokens in rows of 2048, 4096, 8192 and 16384, one document to a row,
fp32, the best of a few interleaved rounds; tokens per second over those at 2048. Writes benchmarks/results/length.json
and draws docs/length.png. A kind that mixes by softmax falls as its rows grow; a recurrence should not (bar: 0.85 at
16384). LSTM runs token by token and gets few rounds; S4D holds T D N numbers and takes a smaller state here.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import nn

import lmtrain.model.mixers
from lmtrain.model.branch import Branch, Place, branch_class
from lmtrain.model.context import LocalContext
from lmtrain.model.init import draw
from lmtrain.ops import library
from lmtrain.ops.documents import Documents
from lmtrain.train.hardware import describe

D_MODEL, TOKENS, LENGTHS = 256, 16384, (2048, 4096, 8192, 16384)
SETTINGS: dict[str, dict[str, Any]] = {
    "attention": {"num_heads": 4},
    "mla": {"num_heads": 4, "kv_rank": 64, "nope_dim": 64, "rope_dim": 32, "value_dim": 64},
    "s4d": {"d_state": 8},
    "retnet": {"num_heads": 4},
    "deltanet": {"num_heads": 4},
    "gated_deltanet": {"num_heads": 4, "head_dim": 64},
    "kda": {"num_heads": 4},
    "mom": {"num_heads": 4, "head_dim": 64},
}
"""Where the defaults are meant for wider models."""
SOFTMAX = ("attention", "mla")
BAR, ROUNDS, SECONDS = 0.85, 4, 8.0
ROOT = Path(__file__).parents[1]
RESULTS, PICTURE = ROOT / "benchmarks/results/length.json", ROOT / "docs/length.png"


def build(kind: str) -> Branch:
    cls = branch_class(kind)
    settings = cls.Config(**SETTINGS.get(kind, {}))
    branch = cls(settings, D_MODEL, Place(0, 2, 0, 2))
    info = branch.param_info()
    with torch.no_grad():
        for name, parameter in branch.named_parameters():
            parameter.copy_(draw(name, info[name], tuple(parameter.shape), seed=0))
    return branch


def seconds(branch: nn.Module, length: int) -> float:
    """Of one forward and backward over all tokens in rows of ``length``."""
    rows = TOKENS // length
    x = torch.randn(rows, length, D_MODEL, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ctx = LocalContext(Documents.from_ids(torch.zeros(rows, length, dtype=torch.int32)))
    start = time.perf_counter()
    y, _, _ = branch(x, ctx, {}, {})
    y.sum().backward()
    return time.perf_counter() - start


def measure(kind: str) -> dict[str, Any]:
    branch, best = build(kind), dict.fromkeys(LENGTHS, float("inf"))
    begun, rounds = time.perf_counter(), 0
    while rounds < 2 or (rounds < ROUNDS and time.perf_counter() - begun < SECONDS):
        for length in LENGTHS:
            best[length] = min(best[length], seconds(branch, length))
        rounds += 1
    speeds = {length: TOKENS / best[length] for length in LENGTHS}
    return {
        "kind": kind,
        "settings": SETTINGS.get(kind, {}),
        "rounds": rounds,
        "tokens_per_second": {str(length): round(speed) for length, speed in speeds.items()},
        "ratio": {str(length): round(speed / speeds[LENGTHS[0]], 3) for length, speed in speeds.items()},
    }


def draw_ratios(rows: list[dict[str, Any]], heading: str) -> None:
    """One line per kind; those that mix by softmax stand out."""
    figure, axes = plt.subplots(figsize=(8, 5))
    axes.set_prop_cycle(color=plt.get_cmap("tab20").colors)
    for row in sorted(rows, key=lambda row: -row["ratio"][str(LENGTHS[-1])]):
        softmax = row["kind"] in SOFTMAX
        ratios = [row["ratio"][str(length)] for length in LENGTHS]
        axes.plot(
            LENGTHS, ratios, label=row["kind"], linewidth=2.5 if softmax else 1, linestyle="--" if softmax else "-"
        )
    axes.axhline(BAR, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens in a row")
    axes.set_ylabel(f"tokens per second, over those at {LENGTHS[0]}")
    axes.set_title(f"Cost over length, forward and backward\n{heading}", fontsize=9)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(PICTURE, dpi=120, bbox_inches="tight")


def main() -> None:
    """Print hardware, versions, date and one row per kind; write results and picture when all kinds ran."""
    kinds = sys.argv[1:] or list(lmtrain.model.mixers.__all__)
    library.load()
    hardware, date = describe(torch.device("cpu")), str(datetime.date.today())
    heading = f"{hardware['cpu']}, {torch.get_num_threads()} threads, torch {torch.__version__}, {date}"
    print(f"{heading}; load {os.getloadavg()[0]:.1f}\ntokens per second at {LENGTHS[0]}; and how much of it is left\n")
    rows = []
    for kind in kinds:
        row = measure(kind)
        rows.append(row)
        left = "  ".join(f"{length}: {row['ratio'][str(length)]:.2f}" for length in LENGTHS[1:])
        held = "" if kind in SOFTMAX or row["ratio"][str(LENGTHS[-1])] >= BAR else "  below the bar"
        print(f"{kind:18} {row['tokens_per_second'][str(LENGTHS[0])]:>9,}  {left}{held}", flush=True)
    if not sys.argv[1:]:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        record = {"format_version": 1, "date": date, "hardware": hardware, "versions": versions, "rows": rows}
        RESULTS.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        draw_ratios(rows, heading)


if __name__ == "__main__":
    main()
