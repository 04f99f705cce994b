"""The data room against numpy and Hugging Face datasets: order, loading, opening, ingest.

    python benchmarks/data.py [sampler loader open ingest]

Everything runs on one thread, from the page cache, in process CPU seconds (waiting does not count), the best of a few
rounds; the opening of a store and ingest, which may take two processes, are wall time. What is compared with what
stands beside each function. A run of all parts writes benchmarks/results/data.json; some parts alone are printed
only. Exit code 1 if a bar is missed.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import tokenizers
import torch
from data_ingest import measure
from sparse_store import write_sparse_store

from lmtrain.data.config import DataConfig, SourceConfig
from lmtrain.data.loader import Loader
from lmtrain.data.order.sampler import Sampler
from lmtrain.data.order.schedule import Event, ScheduleLog
from lmtrain.data.store.store import Store, StoreWriter
from lmtrain.train.hardware import describe

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "data.json"
BLOCK, ROUNDS, VOCAB = 4096, 5, 50000
INGEST_BYTES = 48_000_000
SHARES = {"web": 0.7, "code": 0.3}
BARS = {
    "sampler_over_numpy_permutation": (float.__le__, 5.0),
    "loader_tokens_per_second_per_core": (float.__ge__, 20e6),
    "loader_over_datasets": (float.__ge__, 5.0),
    "open_seconds_1e9_documents": (float.__le__, 2.0),
    "ingest_over_datasets_map": (float.__ge__, 4.0),
}


def best(run: Callable[[], int], rounds: int = ROUNDS) -> float:
    """Fewest CPU seconds per unit of work; ``run`` says how much it did."""
    found = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        done = run()
        found = min(found, (time.process_time() - start) / done)
    return found


def sampler() -> dict[str, Any]:
    """1024 blocks at once, anywhere in a run over 10^12 tokens in four sources with three events, per block.

    Peer: ``numpy.random.Generator.permutation``, per index, of 10^8 indices: the run has 2.4 * 10^8 blocks, whose table
    would take 2 GB. (It is faster while the table fits into a cache: also given, for 10^6.) Memory: the peak of making
    a sampler and one call.
    """

    def make(tokens: int) -> Sampler:
        shares = {"web": 0.6, "code": 0.25, "math": 0.1, "books": 0.05}
        log = ScheduleLog.fixed(shares)
        blocks = tokens // BLOCK
        for part in (1, 2):
            weights = {name: 10 + part * place for place, name in enumerate(shares)}
            log.append(Event(part * blocks // 3, "user", "benchmark", weights))
        return Sampler(0, log, {name: int(share * blocks) for name, share in shares.items()})

    def peak(tokens: int) -> int:
        tracemalloc.start()
        make(tokens).get(np.arange(1024))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    order = make(10**12)
    starts = np.random.default_rng(0).integers(0, 10**12 // BLOCK - 1024, 200)
    rng = np.random.default_rng(0)
    ours = best(lambda: sum(len(order.get(start + np.arange(1024))[0]) for start in starts))
    numpys = best(lambda: len(rng.permutation(10**8)), rounds=2)
    return {
        "sampler_us_per_block": ours * 1e6,
        "sampler_over_numpy_permutation": ours / numpys,
        "sampler_over_numpy_permutation_of_1e6": ours / best(lambda: len(rng.permutation(10**6))),
        "sampler_peak_bytes": {"10^9 tokens": peak(10**9), "10^12 tokens": peak(10**12)},
    }


def loader() -> dict[str, Any]:
    """Whole steps of one rank: 64 blocks of 4096 tokens out of two sources, as micro-batches with labels, documents,
    positions, sources and hashes; 7 + 3 million tokens in documents of about 660, uint16.

    The peers hold the same documents in Arrow tables, int32, shuffled and interleaved 7 : 3:
    - packed: ``to_iterable_dataset().map(concatenate and cut, batched)``, torch batches of 16 rows with input_ids and
      labels: what comes nearest to the same product, without documents, positions and hashes;
    - rows: ``for row in dataset``: the documents alone, as they are;
    - memory: rows of 4096 tokens cut beforehand, DataLoader over torch tensors: a copy of memory, and nothing else.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        documents = {name: _write_source(out / name, int(share * 10_000_000)) for name, share in SHARES.items()}
        ours = best(_steps_of(out))
        peers = _peers(out, documents)
    speeds = {name: 1 / seconds for name, seconds in peers.items()}
    return {
        "loader_tokens_per_second_per_core": 1 / ours,
        "loader_over_datasets": peers["packed"] / ours,
        "loader_over_datasets_by_peer": {name: seconds / ours for name, seconds in peers.items()},
        "datasets_tokens_per_second": speeds,
    }


def _write_source(prefix: Path, num_tokens: int) -> list[np.ndarray]:
    rng = np.random.default_rng(num_tokens)
    documents: list[np.ndarray] = []
    with StoreWriter(prefix, VOCAB) as writer:
        while writer.num_tokens < num_tokens:
            documents.append(rng.integers(0, VOCAB, int(rng.lognormal(6, 1)) + 1))
            writer.add(documents[-1])
    return documents


def _steps_of(out: Path) -> Callable[[], int]:
    words = {f"w{i}": i for i in range(VOCAB - 1)} | {"<|endoftext|>": VOCAB - 1}
    path = str(out / "tokenizer.json")
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0")).save(path)
    cfg = DataConfig(
        tokenizer=path,
        seq_len=BLOCK,
        sources={name: SourceConfig(str(out / name), weight=share) for name, share in SHARES.items()},
    )
    log = ScheduleLog.fixed(SHARES)
    made = Loader(cfg, seed=0, batch_tokens=64 * BLOCK, microbatch=16, dp_rank=0, dp_size=1, log=log)

    def run() -> int:
        return sum(batch.tokens.numel() for data in made.steps(0, 36) for batch in data.micro_batches)

    return run


def _peers(out: Path, documents: dict[str, list[np.ndarray]]) -> dict[str, float]:
    tables = []
    for name, parts in documents.items():
        ends = np.cumsum([0, *map(len, parts)]).astype(np.int32)
        column = pa.ListArray.from_arrays(ends, np.concatenate(parts).astype(np.int32))
        datasets.Dataset(pa.table({"input_ids": column})).save_to_disk(out / f"{name}.arrow")
        tables.append(datasets.load_from_disk(out / f"{name}.arrow").shuffle(seed=0))
    shares = list(SHARES.values())
    mixed = datasets.interleave_datasets(tables, shares, seed=0, stopping_strategy="first_exhausted")

    def cut(batch: dict[str, list[Any]]) -> dict[str, np.ndarray]:
        flat = np.concatenate(batch["input_ids"])
        rows = flat[: len(flat) // BLOCK * BLOCK].reshape(-1, BLOCK)
        return {"input_ids": rows, "labels": rows.copy()}

    packed = mixed.to_iterable_dataset().map(cut, batched=True, batch_size=1000).with_format("torch")
    cut_before = datasets.Dataset.from_dict(cut({"input_ids": [part for each in documents.values() for part in each]}))
    memory = torch.utils.data.DataLoader(cut_before.shuffle(seed=0).with_format("torch"), batch_size=16)
    return {
        "packed": best(lambda: _count(batch["input_ids"].numel() for batch in packed.iter(batch_size=16))),
        "rows": best(lambda: _count(len(row["input_ids"]) for row in mixed)),
        "memory": best(lambda: _count(batch["input_ids"].numel() for batch in memory)),
    }


def _count(sizes: Iterable[int], enough: int = 3_000_000) -> int:
    """Tokens read until ``enough``."""
    total = 0
    for size in sizes:
        total += size
        if total >= enough:
            break
    return total


def opening() -> dict[str, Any]:
    """A store of 10^9 documents, nearly all of them empty and the index a sparse file: open it and read one block."""
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "huge"
        write_sparse_store(prefix, documents=10**9, filled=1000, length=300)
        start = time.perf_counter()
        store = Store(prefix)
        opened = time.perf_counter()
        store.window(3, BLOCK), store.document_ids(3 * BLOCK, BLOCK + 1)
        return {
            "open_seconds_1e9_documents": opened - start,
            "first_block_seconds_1e9_documents": time.perf_counter() - opened,
        }


def ingest() -> dict[str, Any]:
    """Text to tokens on disk by launch/prepare.py against ``datasets.map`` (data_ingest.py): 48 MB, or what there
    is, of Python's library and torch's.

    The lower ratio of one and two processes; documents one at a time in the peer, and 1000 to a call.
    """
    tokenizer = ROOT / "data" / "demo" / "tokenizer.json"
    if not tokenizer.exists():
        raise SystemExit(f"{tokenizer} is missing: `make demo` makes it, and the text")
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.jsonl"
        _write_text(text)
        rows = measure(str(text), str(tokenizer))
    counts = [row for row in rows.values() if isinstance(row, dict)]
    return {
        "ingest_over_datasets_map": min(row["ingest_over_datasets_map"] for row in counts),
        "ingest_over_datasets_map_batched": min(row["ingest_over_datasets_map_batched"] for row in counts),
        "ingest": rows,
    }


def _write_text(path: Path) -> None:
    """Python's library as `make demo` leaves it, then torch's sources and headers, up to INGEST_BYTES."""
    with path.open("wb") as out:
        out.write((ROOT / "data" / "python" / "code.jsonl").read_bytes())
        library = Path(torch.__file__).parent
        for file in sorted(found for found in library.rglob("*") if found.suffix in (".py", ".pyi", ".h")):
            if out.tell() >= INGEST_BYTES:
                break
            row = {"id": str(file.relative_to(library)), "text": file.read_text(encoding="utf-8", errors="ignore")}
            out.write(json.dumps(row).encode() + b"\n")


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "sampler": sampler,
    "loader": loader,
    "open": opening,
    "ingest": ingest,
}


def main() -> int:
    """Print every figure and its bar; write the record if all parts ran. Returns the exit code."""
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    parts = sys.argv[1:] or list(PARTS)
    hardware, date = describe(torch.device("cpu")), str(datetime.date.today())
    packages = ("torch", "numpy", "datasets", "pyarrow", "tokenizers")
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    print(f"{hardware['cpu']}, one thread, {date}; load {os.getloadavg()[0]:.1f}; {versions}")
    record: dict[str, Any] = {"format_version": 1, "date": date, "hardware": hardware, "versions": versions}
    missed = False
    for part in parts:
        for name, value in PARTS[part]().items():
            record[name] = value
            verdict = ""
            if name in BARS:
                holds, bar = BARS[name]
                kept = holds(float(value), bar)
                missed |= not kept
                verdict = f"   bar {bar:g}: {'held' if kept else 'MISSED'}"
            print(f"{name:36} {_show(value)}{verdict}", flush=True)
    if len(parts) == len(PARTS):
        RESULTS.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return int(missed)


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_show(part)}" for name, part in value.items())
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


if __name__ == "__main__":
    sys.exit(main())
