"""Tokens per second of launch/prepare.py's ingest over ``datasets.map`` with a Hugging Face tokenizer, same processes.

    python benchmarks/data_ingest.py TEXT.jsonl TOKENIZER.json

Both read the same JSON lines with the same tokenizer and end with the tokens on disk. ``datasets`` gives its tokenizer
one document at a time, or batches of 1000; one thread per process. Ours also looks for duplicates, holds documents out,
compares with them, checks a sample of round trips and shuffles. Each is run anew in its own process, in turn; seconds
are wall time without imports.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROUNDS = 2
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}  # fmt: skip


def ours(text: str, tokenizer: str, processes: int, out: str) -> int:
    """Tokens made by ``prepare``."""
    from lmtrain.data.ingest.ingest import PrepareConfig, prepare
    from lmtrain.data.ingest.reading import SourceOptions

    manifests, _ = prepare(PrepareConfig(out, tokenizer, {"text": SourceOptions(text)}, workers=processes))
    return sum(manifests["text"].file(name).tokens for name in ("train.bin", "heldout.bin"))


def datasets_map(text: str, tokenizer: str, processes: int, out: str, batched: bool = False) -> int:
    """Tokens made by ``Dataset.map`` over documents, written as Arrow files to ``out`` (HF_DATASETS_CACHE)."""
    from datasets import load_dataset
    from transformers import PreTrainedTokenizerFast

    engine = PreTrainedTokenizerFast(tokenizer_file=tokenizer)
    rows = load_dataset("json", data_files=text, split="train").select_columns(["text"])
    tokens = rows.map(
        lambda row: {"ids": engine(row["text"], add_special_tokens=False)["input_ids"]},
        batched=batched, remove_columns=["text"], num_proc=processes,
    )  # fmt: skip
    return sum(map(len, tokens.with_format("numpy")["ids"]))


def datasets_map_batched(text: str, tokenizer: str, processes: int, out: str) -> int:
    """The same, 1000 documents to a call."""
    return datasets_map(text, tokenizer, processes, out, batched=True)


KINDS = {"ours": ours, "datasets_map": datasets_map, "datasets_map_batched": datasets_map_batched}


def seconds(kind: str, text: str, tokenizer: str, processes: int) -> tuple[float, int]:
    """Seconds from call to return in a new process, imports not counted, and tokens."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, __file__, "run", kind, text, tokenizer, str(processes), out]
        environment = os.environ | ENVIRONMENT | {"HF_DATASETS_CACHE": out}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    row = json.loads(done.stdout.splitlines()[-1])
    return row["seconds"], row["tokens"]


def measure(text: str, tokenizer: str, processes: tuple[int, ...] = (1, 2)) -> dict[str, Any]:
    """Per number of processes: tokens per second of each (median of ROUNDS, in turn) and the median of the ratios of
    neighbouring runs, ``ingest_over_datasets_map`` and ``..._batched``."""
    results: dict[str, Any] = {"megabytes": round(Path(text).stat().st_size / 1e6, 1)}
    for count in processes:
        rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for _ in range(ROUNDS):
            for kind in KINDS:
                spent, tokens = seconds(kind, text, tokenizer, count)
                rates[kind].append(tokens / spent)
        row: dict[str, float] = {f"{kind}_tokens_per_second": round(statistics.median(rates[kind])) for kind in KINDS}
        for peer in ("datasets_map", "datasets_map_batched"):
            ratios = [own / other for own, other in zip(rates["ours"], rates[peer], strict=True)]
            row[f"ingest_over_{peer}"] = round(statistics.median(ratios), 2)
        results[f"{count} processes"] = row
    return results


def _run(kind: str, text: str, tokenizer: str, processes: str, out: str) -> None:
    if kind == "ours":
        import lmtrain.data.ingest.ingest  # noqa: F401  (imports are not what is compared)
    else:
        import datasets  # noqa: F401
        import transformers  # noqa: F401
    start = time.perf_counter()
    tokens = KINDS[kind](text, tokenizer, int(processes), out)
    print(json.dumps({"seconds": time.perf_counter() - start, "tokens": tokens}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        _run(*sys.argv[2:])
    else:
        print(json.dumps(measure(*sys.argv[1:]), indent=1))
