"""Compares ops and mixers with fla, inside an environment that has it: ``parity_fla.py`` makes one and starts this.

python -m tests.peers.compare_fla RESULT.json
"""

from __future__ import annotations

import json
import platform
import sys
import time
import warnings
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lmtrain.ops import library
from tests.peers import interpreter
from tests.peers.fla_functions import FUNCTIONS
from tests.peers.fla_layers import LAYERS
from tests.peers.pair import Pair, furthest

PRECISIONS = {"reference_fp64": ("reference", torch.float64), "cpu_fp32": ("cpu", torch.float32)}
PACKAGES = ("torch", "triton", "flash-linear-attention", "fla-core", "transformers")


def compare(pair: Pair) -> dict[str, Any]:
    """A row of the table: our errors in both precisions. theirs are in fp32 throughout."""
    expected, told = pair.theirs(), {"kind": pair.kind, "peer": pair.name}
    found: dict[str, tuple[float, str]] = {}
    for label, (backend, dtype) in PRECISIONS.items():
        library.set_kernels(backend)
        found[label] = furthest(pair.ours(dtype), expected)
    error, worst = max(found.values())
    same = error <= pair.tolerance
    told |= {label: float(f"{error:.1e}") for label, (error, _) in found.items()}
    told |= {"worst": worst, "tolerance": pair.tolerance, "verdict": "same" if same else "DIFFERENT"}
    return told | ({"note": pair.note} if pair.note else {})


def main(result: Path) -> None:
    warnings.simplefilter("ignore")
    interpreter.prepare()
    pairs = [function.pair() for function in FUNCTIONS] + [pair for layer in LAYERS for pair in layer.pairs()]
    print(f"{'kind':16} {'fla':52} " + " ".join(f"{label:>14}" for label in PRECISIONS) + "  seconds")
    rows = []
    for pair in pairs:
        begun = time.perf_counter()
        told = compare(pair)
        rows.append(told)
        errors = " ".join(f"{told[label]:14.1e}" for label in PRECISIONS)
        verdict = told["verdict"] if told["verdict"] == "same" else f"DIFFERENT in the {told['worst']}"
        print(f"{pair.kind:16} {pair.name:52} {errors} {time.perf_counter() - begun:8.1f}  {verdict}", flush=True)
    record = {
        "format_version": 1,
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "errors": "largest error of any output, state or gradient over the largest value of that tensor",
        "rows": rows,
    }
    result.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    missed = [told["peer"] for told in rows if told["verdict"] != "same"]
    print(f"{len(rows)} compared, " + (f"different: {', '.join(missed)}" if missed else "all the same") + f"; {result}")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
