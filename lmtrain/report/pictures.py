"""The implicit-attention section: a short held-out text through the trained model, drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from markupsafe import Markup
from torch import Tensor

from lmtrain.data.sources import open_sources
from lmtrain.errors import LmtrainError
from lmtrain.report.attention_maps import BranchMap, branch_maps, chosen
from lmtrain.report.chart import figure_svg, heat_map
from lmtrain.report.figures import Figure
from lmtrain.report.record import Record
from lmtrain.trained import Trained, load_model

TOKENS_PER_DOCUMENT = 24
MOST_PARAMS = 2_000_000_000
"""A larger model is not loaded into this machine's memory for two pictures."""
MOST_HEADS, HEADS_IN_ROW = 8, 4
CELL, EDGE, GAP = 12, 92, 14
FALLBACK = ("def area(width, height):\n    return width * height\n", "The sum of two numbers is a number.\n")


@dataclass(frozen=True)
class Text:
    """Two document beginnings in one row: int ``[T]`` each, and a visible label per token."""

    tokens: Tensor
    ids: Tensor
    labels: list[str]
    where: str


def pictures(record: Record) -> tuple[list[Figure], str]:
    """Pictures of one branch per kind of op; without any, a sentence that says why."""
    if record.recipe is None:
        return [], "Left out: there is no recipe that this lmtrain reads."
    if record.checkpoint is None:
        return [], "Left out: this run has no checkpoint."
    if record.vocab_size and record.recipe.model.num_params(record.vocab_size) > MOST_PARAMS:
        return [], f"Left out: the model has more than {MOST_PARAMS:.0e} parameters."
    try:
        trained = load_model(record.path)
    except LmtrainError as error:
        return [], f"Left out: {error}"
    text = _heldout_text(trained)
    maps = branch_maps(trained.model, text.tokens, text.ids)
    order = trained.recipe.model.order()
    kinds = trained.recipe.model.branches
    figures = [_figure(found, order[found.place], kinds[order[found.place]].kind, text) for found in chosen(maps)]
    return figures, "" if figures else "Left out: no branch of this model is a matrix over tokens."


def _heldout_text(trained: Trained) -> Text:
    """The beginnings of two held-out documents, of two sources if there are; else of two sentences of our own."""
    tokenizer = trained.tokenizer
    parts: list[tuple[Tensor, str]] = []
    try:
        opened = [source for source in open_sources(trained.recipe.data, tokenizer) if source.heldout is not None]
    except LmtrainError:
        opened = []
    for source in opened * 2:
        assert source.heldout is not None
        starts = source.heldout.document_starts
        long_enough = np.flatnonzero(np.diff(starts) > TOKENS_PER_DOCUMENT)
        used = sum(name == source.name for _, name in parts)
        if len(parts) < 2 and len(long_enough) > used:
            begin = int(starts[long_enough[used]])
            tokens = source.heldout.tokens(begin, TOKENS_PER_DOCUMENT)
            parts.append((torch.from_numpy(tokens.astype(np.int64)), source.name))
    where = "held-out documents of " + " and ".join(dict.fromkeys(name for _, name in parts))
    if len(parts) < 2:
        encoded = tokenizer.encode_batch(FALLBACK)
        parts = [(torch.from_numpy(ids[:TOKENS_PER_DOCUMENT].astype(np.int64)), "") for ids in encoded]
        where = "texts of our own, since there are no held-out documents"
    row = torch.cat([tokens for tokens, _ in parts])
    ids = torch.cat([torch.full_like(tokens, number) for number, (tokens, _) in enumerate(parts)])
    return Text(row, ids, [_label(tokenizer.decode([int(token)])) for token in row], where)


def _label(text: str) -> str:
    """A token with its blanks made visible, cut to what an axis bears."""
    shown = text.replace("\n", "\u23ce").replace("\t", "\u2192").replace(" ", "\u00b7")
    shown = "".join(sign if sign.isprintable() else "\ufffd" for sign in shown)
    return shown if len(shown) <= 11 else shown[:10] + "\u2026"


def _figure(found: BranchMap, name: str, kind: str, text: Text) -> Figure:
    shares = found.shares.float().numpy()
    mean = shares.mean(axis=0)
    nearest = float(np.mean([mean[t, max(0, t - 3) : t + 1].sum() for t in range(len(mean))]))
    outside = float(shares[:, text.ids[:, None] != text.ids[None, :]].max())
    crossing = "nothing crosses" if outside == 0 else f"at most {outside:.1e} crosses"
    what = "softmax weights" if found.op == "attention" else f"share of the absolute weight in the {found.op} scan"
    caption = (
        f"Row by row, what each token reads of the tokens before it ({what}, mean over {len(shares)} heads): "
        f"{nearest:.0%} lies on the token itself and the three before it, and {crossing} from one document "
        f"into the other ({text.where})."
    )
    return Figure(f"Branch {found.place}: {name} ({kind})", _drawing(found, shares, mean, text), caption)


def _drawing(found: BranchMap, shares: np.ndarray, mean: np.ndarray, text: Text) -> Markup:
    """The mean over heads with tokens along both edges, and below it each of the first heads by itself."""
    length, key = len(mean), f"map-{found.place}"
    side = CELL * length
    small = (EDGE + side - GAP * (HEADS_IN_ROW - 1)) / HEADS_IN_ROW
    parts = [heat_map([(np.sqrt(mean), "ink")], key=key, size=(side, side), origin=(EDGE, EDGE))]
    for at, label in enumerate(text.labels):
        middle = EDGE + CELL * (at + 0.5)
        parts.append(Markup('<text class="token end" x="{}" y="{:.1f}">{}</text>').format(EDGE - 5, middle + 3, label))
        turned = Markup('<text class="token" transform="translate({:.1f} {}) rotate(-90)">{}</text>')
        parts.append(turned.format(middle + 3, EDGE - 5, label))
    border = EDGE + CELL * int((text.ids == 0).sum())
    for points in ((border, EDGE, border, EDGE + side), (EDGE, border, EDGE + side, border)):
        parts.append(Markup('<line class="event" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(*points))
    note = Markup('<text class="note end" x="{}" y="{}">{}</text>')
    parts.append(note.format(border - 6, EDGE + 16, "document 1"))
    parts.append(note.format(EDGE + side - 6, border + 16, "document 2"))
    top = EDGE + side + 34
    parts.append(Markup('<text class="note" x="0" y="{}">{}</text>').format(top - 9, "each head by itself"))
    for head, share in enumerate(shares[:MOST_HEADS]):
        row, column = divmod(head, HEADS_IN_ROW)
        place = ((small + GAP) * column, top + (small + GAP) * row)
        parts.append(heat_map([(np.sqrt(share), "ink")], key=f"{key}-{head}", size=(small, small), origin=place))
    rows = -(-min(MOST_HEADS, len(shares)) // HEADS_IN_ROW)
    return figure_svg(parts, (EDGE + side + 4, round(top + (small + GAP) * rows)), "implicit attention")
