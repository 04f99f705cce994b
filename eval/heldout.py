"""Held-out text under a trained model: bits per byte, loss by position, and whether decoding says what scoring says."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lmtrain.data.heldout import Heldout
from lmtrain.model.context import LocalContext
from lmtrain.model.decode import decode, sample
from lmtrain.model.language_model import LanguageModel
from lmtrain.ops.cross_entropy import IGNORE, cross_entropy
from lmtrain.ops.documents import Documents

EARLY, LATE = 16, 128
BINS = 32


@torch.no_grad()
def score(model: LanguageModel, heldout: Heldout, rows: int) -> dict[str, Any]:
    """``heldout_bpb`` and ``heldout_bpb.NAME`` as the training loop computes them, and ``loss_by_position``."""
    device = next(model.parameters()).device
    nats: dict[str, float] = {}
    table = torch.zeros(BINS, 2, dtype=torch.float64)
    for name in heldout.source_names:
        nats[name] = 0.0
        for batch in heldout.batches(name, rows):
            moved = batch.to(device)
            logits, _ = model(moved.tokens, LocalContext(moved.docs), {})
            losses = cross_entropy(logits, moved.labels)[0].double().cpu()
            nats[name] += float(losses.sum())
            table += by_position(losses, batch.positions, batch.labels != IGNORE)
    return {
        **heldout.bits_per_byte(nats),
        "bytes": sum(heldout.bytes_of_text.values()),
        "targets": int(table[:, 1].sum()),
        "unpredicted": sum(heldout.num_unpredicted.values()),
        "seq_len": heldout.seq_len,
        "loss_by_position": _summary(table),
    }


def by_position(losses: Tensor, positions: Tensor, counted: Tensor) -> Tensor:
    """fp64 ``[BINS, 2]``: summed losses and number of targets at positions 0, 1, 2-3, 4-7, 8-15, ...

    A target's position is that of the token it is predicted from: 0 sees one token of its document, 15 sees 16.
    """
    bins = torch.frexp(positions[counted].float()).exponent.long()  # 0, 1, 2, 2, 3, 3, 3, 3, 4, ...: the bit length
    sums = torch.bincount(bins, weights=losses[counted].double(), minlength=BINS)
    return torch.stack([sums, torch.bincount(bins, minlength=BINS).double()], dim=-1)


def _summary(table: Tensor) -> dict[str, Any]:
    """The table in words; ``early`` and ``late`` say whether more context helps, which is what a state is for."""
    starts = [0, *(1 << n for n in range(BINS - 1))]
    lines = [
        {"from": start, "to": max(0, 2 * start - 1), "targets": int(count), "nats": float(total / count)}
        for start, (total, count) in zip(starts, table, strict=True)
        if count
    ]
    early = [line for line in lines if line["from"] < EARLY]
    late = [line for line in lines if line["from"] >= LATE]
    return {"early": _mean(early), "early_below": EARLY, "late": _mean(late), "late_from": LATE, "table": lines}


def _mean(lines: list[dict[str, Any]]) -> float | None:
    targets = sum(line["targets"] for line in lines)
    return sum(line["nats"] * line["targets"] for line in lines) / targets if targets else None


@torch.no_grad()
def cached_equals_uncached(model: LanguageModel, prompt: list[int], tokens: int = 32) -> dict[str, Any]:
    """Greedy tokens with the state carried from token to token, against reading everything anew for each.

    ``equal``, the number of ``tokens`` compared, and ``max_logit_diff``: the two are different sums, which round apart.
    """
    device = next(model.parameters()).device
    carried: list[Tensor] = []

    def step(given: Tensor, state: Any) -> Any:
        logits, state = decode(model, given, state)
        carried.append(logits[0, -1])
        return logits, state

    drawn = list(islice(sample(step, model.init_state(1, device), prompt, temperature=0, seed=0), tokens))
    anew: list[int] = []
    worst = 0.0
    for logits in carried:
        whole = torch.tensor([prompt + anew], device=device)
        docs = Documents.from_ids(torch.zeros(whole.shape, dtype=torch.int32)).to(device)
        last = model(whole, LocalContext(docs), {})[0][0, -1]
        worst = max(worst, float((last - logits).abs().max()))
        anew.append(int(last.argmax()))
        if anew[-1] != drawn[len(anew) - 1]:
            break
    return {"equal": anew == drawn, "tokens": tokens, "prompt_tokens": len(prompt), "max_logit_diff": worst}
