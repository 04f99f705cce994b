"""Recompute what `make demo` claims, from its records and its export: run after it, in the same folder.

    .venv/bin/python tests/check_demo.py

Bits per byte come from the exported model through transformers alone, one document after another, so neither our model
code, nor packing, nor the evaluation is taken on trust.
"""

from __future__ import annotations

import itertools
import json
import lzma
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from lmtrain.config.load import load
from lmtrain.data.sources import open_sources
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.train.metrics import read_metrics

RUN, STRAIGHT = Path("runs/demo"), Path("runs/demo-straight")
KEYS = (
    "heldout_bpb_start heldout_bpb_end token_unigram_bpb token_bigram_bpb xz_alone_bpb loss_by_position_gain "
    "resume_bitwise_equal export_class export_max_logit_diff cached_equals_uncached tokens_per_second wall_seconds"
)
EARLY, LATE = 16, 128


def pieces(tokens: np.ndarray, ids: np.ndarray, length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Inputs and labels of each stretch of one document within one window of ``length`` tokens."""
    for start in range(0, len(tokens) - 1, length):
        row, own = tokens[start : start + length + 1], ids[start : start + length + 1]
        borders = [0, *(np.flatnonzero(np.diff(own)) + 1), len(row)]
        for low, high in itertools.pairwise(borders):
            end = min(high, length)
            if end > low and low + 1 < high:
                labels = row[low + 1 : high][: end - low]
                yield row[low : low + len(labels)], labels


@torch.no_grad()
def score(model: Any, documents: Iterator[tuple[np.ndarray, np.ndarray]]) -> tuple[float, int, np.ndarray]:
    """Nats, targets, and sums and counts of targets predicted from early and late positions."""
    nats, targets, by_position = 0.0, 0, np.zeros((2, 2))
    for inputs, labels in documents:
        logits = model(torch.from_numpy(inputs.astype(np.int64))[None], use_cache=False).logits[0]
        losses = torch.nn.functional.cross_entropy(
            logits, torch.from_numpy(labels.astype(np.int64)), reduction="none"
        ).double()
        nats, targets = nats + float(losses.sum()), targets + len(losses)
        for row, part in enumerate((losses[:EARLY], losses[LATE:])):
            by_position[row] += float(part.sum()), len(part)
    return nats, targets, by_position


def main() -> int:
    summary = json.loads((RUN / "summary.json").read_text(encoding="utf-8"))
    failures: list[str] = []

    def hold(claim: str, holds: bool, found: object) -> None:
        print(f"{'ok  ' if holds else 'FAIL'}  {claim}  ({found})")
        if not holds:
            failures.append(claim)

    missing = [key for key in KEYS.split() if key not in summary]
    hold("summary.json has every key", not missing, missing or "all there")

    rows = {folder: read_metrics(folder / "metrics.jsonl") for folder in (RUN, STRAIGHT)}
    steps = {folder: {row["step"]: row for row in rows[folder] if row["kind"] == "step"} for folder in rows}
    both = sorted(steps[RUN].keys() & steps[STRAIGHT].keys())
    after = [step for step in both if steps[RUN][step]["attempt"] > 1 and steps[STRAIGHT][step]["attempt"] == 1]
    same = all(
        steps[RUN][s][key] == steps[STRAIGHT][s][key] for s in both for key in ("loss", "grad_norm", "token_hash")
    )
    hold("resume_bitwise_equal", summary["resume_bitwise_equal"] is True and same and len(after) >= 10, len(after))
    scores = [row["heldout_bpb"] for row in rows[RUN] if row["kind"] == "eval"]
    told = (summary["heldout_bpb_start"], summary["heldout_bpb_end"])
    hold("held-out bits per byte at start and end are the run's own rows", told == (scores[0], scores[-1]), told)

    recipe = load(["recipe=demo"]).recipe
    tokenizer = Tokenizer.load(recipe.data.tokenizer)
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(RUN / "export", dtype=torch.float32).eval()
    total_bits, num_bytes, text, seen, held = 0.0, 0, b"", [], []
    positions = np.zeros((2, 2))
    for source in open_sources(recipe.data, tokenizer):
        assert source.heldout is not None and source.manifest is not None
        store = source.heldout
        tokens, ids = store.tokens(0, store.num_tokens), store.document_ids(0, store.num_tokens)
        nats, _, table = score(model, pieces(tokens, ids, recipe.data.seq_len))
        documents = int((np.diff(store.document_starts) > 0).sum())
        total_bits += nats / math.log(2) + documents * math.log2(tokenizer.vocab_size)
        num_bytes += sum(source.manifest.heldout.bytes)
        positions += table
        text += tokenizer.decode(tokens[tokens != tokenizer.eod_id]).encode()
        seen.append(source.train.tokens(0, source.train.num_tokens))
        held.append(tokens)
    bpb = total_bits / num_bytes
    hold("heldout_bpb_end, recomputed from the export", abs(bpb / summary["heldout_bpb_end"] - 1) < 1e-4, bpb)
    hold("the held-out text has the bytes the manifests say", len(text) == num_bytes, num_bytes)
    counts = np.bincount(np.concatenate(seen), minlength=tokenizer.vocab_size) + 1.0
    unigram = float(-np.log2(counts / counts.sum())[np.concatenate(held)].sum()) / num_bytes
    hold("token_unigram_bpb", abs(unigram - summary["token_unigram_bpb"]) < 1e-9, unigram)
    xz = 8 * len(lzma.compress(text, preset=9)) / num_bytes
    hold("xz_alone_bpb", abs(xz - summary["xz_alone_bpb"]) < 1e-3, xz)
    hold("held-out bits per byte are at most 0.60 of the token unigram's", bpb <= 0.60 * unigram, bpb / unigram)
    hold("held-out bits per byte are below xz's alone", bpb < xz, bpb / xz)
    gain = float(positions[0, 0] / positions[0, 1] - positions[1, 0] / positions[1, 1])
    hold("loss past position 128 is clearly below that under 16", gain > 0.2, gain)
    hold("loss_by_position_gain", abs(gain - summary["loss_by_position_gain"]) < 1e-3, summary["loss_by_position_gain"])

    relative = summary["export_max_logit_diff"] / summary["export_logit_std"]
    hold("logits of the export differ by less than 1e-4 of their standard deviation", relative < 1e-4, relative)
    hold("export_class", summary["export_class"] == type(model).__name__, type(model).__name__)
    prompt = torch.tensor([tokenizer.encode_batch(["import os\n\n\ndef "])[0].tolist()])
    generated = [
        model.generate(prompt, max_new_tokens=48, do_sample=False, use_cache=cache)[0].tolist()
        for cache in (True, False)
    ]
    equal = generated[0] == generated[1]
    hold("cached_equals_uncached", equal and summary["cached_equals_uncached"] is True, len(generated[0]))
    hold(
        "the report is one file that opens offline", "<html" in (RUN / "report.html").read_text("utf-8")[:2000], "html"
    )
    print(f"{len(failures)} of the demo's claims fail" if failures else "every claim of the demo holds")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
