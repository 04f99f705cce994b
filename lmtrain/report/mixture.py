"""What a run really read: the share of every source over its tokens, the events that changed it, and what it was worth.

The counts are those of the order of data itself, in closed form from ``schedule.jsonl``; they are not estimates.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.order.runs import block_order
from lmtrain.data.order.sampler import Sampler
from lmtrain.data.order.schedule import Event
from lmtrain.data.policies.epochs import effective_tokens
from lmtrain.data.sources import bytes_per_token, open_source
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import LmtrainError
from lmtrain.report.chart import window
from lmtrain.report.figures import Figure
from lmtrain.report.record import Record
from lmtrain.report.stack import Mark, band, stack_chart
from lmtrain.report.words import Table, listing, quantity, significant
from lmtrain.train.environment import redact
from lmtrain.train.mixture import describe

SIZE = (1160, 360)
MOST_BINS, BLOCKS_PER_BIN = 120, 16
MOST_LISTED = 16
"""With more events than these, those by the policy are ticks and not listed, and of the others the newest are."""
LAST_STEPS = 10
KINDS = {
    "recipe": "the recipe",
    "policy": "the policy",
    "user": "a person",
    "added": "a new source",
    "skip": "blocks skipped",
}
"""Style of a mark to its words."""
UNKNOWN, NONE_READ = "unknown", "none read"


@dataclass(frozen=True)
class Mixture:
    """The section: a figure, a table of sources, a table of events, and sentences on what they leave out."""

    figure: Figure
    sources: Table
    events: Table
    notes: list[str]


def mixture(record: Record) -> Mixture | None:
    """None for a run with one source and one mixture, and for one whose schedule or recipe cannot be read."""
    log, recipe = record.schedule, record.recipe
    if log is None or recipe is None or not record.steps or not log.events:
        return None
    if len(log.events) == 1 and len(log.events[0].weights) == 1:
        return None
    schedule = recipe.train.schedule_of(recipe.data)
    sizes = dict.fromkeys(record.source_names, recipe.data.run_blocks)  # counts do not depend on them
    try:
        sampler = block_order(0, log, sizes, schedule)
    except LmtrainError as error:
        record.remarks.append(f"schedule.jsonl does not fit recipe.yaml: {error}")
        return None
    end = schedule.first_block(record.steps[-1]["step"])
    block_tokens = recipe.data.block_length
    per_token = _bytes_per_token(record, log.events)
    figure = mixture_figure(log.events, sampler, block_tokens, end)
    sources = _source_table(record, sampler, log.events, end, per_token)
    return Mixture(figure, sources, _event_table(log.events, block_tokens), _notes(record, log.events, end, per_token))


def mixture_figure(events: Sequence[Event], sampler: Sampler, block_tokens: int, end: int) -> Figure:
    """The share of every source in the first ``end`` blocks, as areas, with ``events`` marked.

    sampler: of these events; the sizes of its sources do not matter. ``end`` may lie ahead of what a run has read.
    """
    ordered = _in_force(events)
    edges = bins(ordered, end)
    read = blocks_read(sampler, ordered, edges)
    shares = read / read.sum(axis=1, keepdims=True)
    within = [event for event in ordered if event.first_block < end]
    numbers = _numbers(ordered)
    marks = [
        Mark(event.first_block * block_tokens, numbers.get(place, ""), _kind(event), _told(event, block_tokens))
        for place, event in enumerate(within)
        if event.first_block  # the first mixture changes nothing
    ]
    names = sampler.names
    svg = stack_chart(
        edges * block_tokens,
        shares,
        names,
        marks,
        x_label="tokens",
        y_label="share of the tokens, %",
        size=SIZE,
    )
    whole = read.sum(axis=0) / end
    most = int(whole.argmax())
    caption = (
        f"Of {quantity(end * block_tokens)} tokens {names[most]} had the most, {whole[most]:.0%}: "
        f"{shares[0][most]:.0%} at the start, {shares[-1][most]:.0%} at the end (counted per "
        f"{quantity(end * block_tokens / len(shares))})."
    )
    drawn = [(f"{band(d)} band", name, f"{whole[d]:.1%}") for d, name in enumerate(names)]
    kinds = Counter(mark.style for mark in marks)
    drawn += [(f"event {kind}", told, str(kinds[kind])) for kind, told in KINDS.items() if kinds[kind]]
    return Figure("Realised mixture", svg, caption, drawn)


def bins(events: Sequence[Event], end: int) -> NDArray[np.int64]:
    """Blocks ``[bins + 1]`` at which bins of nearly equal size begin and end; events lie between bins if they can."""
    count = max(min(MOST_BINS, end // BLOCKS_PER_BIN), 1)
    edges = np.linspace(0, end, count + 1).round().astype(np.int64)
    for event in events:
        nearest = round(event.first_block * count / end)
        if 0 < nearest < count:
            edges[nearest] = event.first_block
    return edges


def blocks_read(sampler: Sampler, events: Sequence[Event], edges: NDArray[np.int64]) -> NDArray[np.int64]:
    """Blocks of each source ``[bins, sources]`` read between ``edges``, without those that an event skips."""
    firsts = [event.first_block for event in events if edges[0] < event.first_block < edges[-1]]
    cuts = np.unique([*edges, *firsts])
    # no event lies inside a piece, so nothing is skipped between its first block and its last
    begun, ended = (_counts(sampler, ks) for ks in (cuts[:-1], cuts[1:] - 1))
    last = sampler.get(cuts[1:] - 1)[0]
    pieces = ended - begun + (last[:, None] == np.arange(len(sampler.names)))
    return np.add.reduceat(pieces, np.searchsorted(cuts, edges[:-1]), axis=0)


def _counts(sampler: Sampler, ks: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.array([list(sampler.counts(int(k)).values()) for k in ks], dtype=np.int64)


def _in_force(events: Sequence[Event]) -> list[Event]:
    return sorted(events, key=lambda event: event.first_block)


def _numbers(ordered: Sequence[Event]) -> dict[int, str]:
    """The numbers of the events that are listed, by place."""
    listed = [place for place, event in enumerate(ordered) if len(ordered) <= MOST_LISTED or _kind(event) != "policy"]
    return {place: str(number) for number, place in enumerate(listed[-MOST_LISTED:], 1)}


def _kind(event: Event) -> str:
    return "added" if event.sources else "skip" if event.skip else event.origin if event.origin in KINDS else "user"


def _reason(event: Event) -> str:
    """Without the mark that tells one request of a person from the next."""
    return redact(re.sub(r"\[(control/mix\.yaml) [0-9a-f]+\]$", r"(\1)", event.reason))


def _told(event: Event, block_tokens: int) -> str:
    return f"{KINDS[_kind(event)]}, {redact(describe(event, block_tokens))}; {_reason(event)}".removesuffix("; ")


def _event_table(events: Sequence[Event], block_tokens: int) -> Table:
    ordered = _in_force(events)
    rows = [
        [
            f"{number}\N{NO-BREAK SPACE}{event.origin}",
            redact(describe(event, block_tokens)),
            str(event.step),
            _reason(event),
        ]
        for place, number in _numbers(ordered).items()
        for event in [ordered[place]]
    ]
    return Table("", rows, ["event", "change", "made after step", "reason"], numbers=(2,))


def _source_table(
    record: Record, sampler: Sampler, events: Sequence[Event], end: int, per_token: dict[str, float]
) -> Table:
    """What was read of every source, and what a token of it costs in the last steps."""
    assert record.recipe is not None
    size = record.recipe.data.block_length
    read = blocks_read(sampler, events, np.array([0, end]))[0] * size
    last = record.steps[-1]
    rows = []
    for name, tokens in zip(sampler.names, read.tolist(), strict=True):
        epochs, passed = last.get(f"source_epochs.{name}"), last.get(f"source_tokens.{name}")
        worth = effective_tokens(passed / epochs, tokens) if epochs and passed else None if epochs is None else 0.0
        nats = _last_loss(record, name)
        bits = nats / math.log(2) / per_token[name] if nats is not None and name in per_token else None
        cells = [quantity(tokens), f"{tokens / read.sum():.1%}"]
        cells += [UNKNOWN if epochs is None else significant(epochs), UNKNOWN if worth is None else quantity(worth)]
        missing = NONE_READ if nats is None else UNKNOWN
        cells += [missing if value is None else f"{value:.3f}" for value in (nats, bits)]
        rows.append([name, *cells])
    columns = ["source", "tokens read", "share", "epochs", "worth in new tokens", "nats per token", "bits per byte"]
    return Table("", rows, columns, numbers=tuple(range(1, len(columns))))


def _last_steps(record: Record) -> int:
    return max(window(len(record.steps)), LAST_STEPS)


def _last_loss(record: Record, name: str) -> float | None:
    losses = [row.get(f"source_loss.{name}") for row in record.steps[-_last_steps(record) :]]
    known = [loss for loss in losses if loss is not None]
    return sum(known) / len(known) if known else None


def _bytes_per_token(record: Record, events: Sequence[Event]) -> dict[str, float]:
    """Of the sources with text whose folders are here."""
    assert record.recipe is not None
    data = record.recipe.data
    paths = {name: source.path for name, source in data.sources.items() if source.path is not None}
    added = [pair for event in events for pair in event.sources.items()]
    paths |= {name: source.path for name, source in added if source.path is not None}
    found = {}
    try:
        tokenizer = Tokenizer.load(data.tokenizer)
    except LmtrainError:
        return {}
    for name, path in paths.items():
        try:
            found[name] = bytes_per_token(open_source(name, path, tokenizer), tokenizer)
        except LmtrainError:
            continue
    return found


def _notes(record: Record, events: Sequence[Event], end: int, per_token: dict[str, float]) -> list[str]:
    ordered = _in_force(events)
    numbers = _numbers(ordered)
    notes = [
        "Tokens are those of whole blocks. Epochs count skipped blocks too; worth in new tokens discounts what "
        "was read again (Muennighoff et al., arXiv 2305.16264, R* = 15.39). Losses are means over the last "
        f"{_last_steps(record)} steps."
    ]
    silent = [name for name in record.source_names if name not in per_token]
    if silent:
        notes.append(f"Bits per byte need the text behind a token: none is here for {listing(silent)}.")
    unlisted = Counter(event.origin for place, event in enumerate(ordered) if place not in numbers)
    if unlisted:
        told = listing([f"{count} by {KINDS.get(origin, origin)}" for origin, count in unlisted.items()])
        notes.append(f"Not listed, and ticks in the figure: {told}.")
    notes += [f"Step {row['step']}: {redact(row['policy_error'])}." for row in record.steps if "policy_error" in row]
    ahead = [numbers[place] for place, event in enumerate(ordered) if event.first_block >= end and place in numbers]
    if ahead:
        notes.append(f"Ahead of what has been read: event {listing(ahead)}.")
    return notes
