"""Runs of consecutive blocks: each once per epoch, in one slot step after step, whatever ranks, ramps and events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lmtrain.data.batch import Batch
from lmtrain.data.config import DataConfig, SourceConfig
from lmtrain.data.loader import Loader
from lmtrain.data.order.runs import RunSampler, block_order, run_and_place
from lmtrain.data.order.sampler import Sampler
from lmtrain.data.order.schedule import AddedSource, Event, ScheduleLog
from lmtrain.data.order.steps import Steps
from lmtrain.data.store.store import Store
from lmtrain.errors import UsageError
from tests.data.test_loader import hashes, loader

Config = Callable[..., DataConfig]
L = 4
"""Tokens of a block, where there are none."""


def steps_of(run_blocks: int, stages: list[tuple[int, int]]) -> Steps:
    """stages: blocks of a step and how many groups of steps read so many; the last has no end."""
    ramp, read = [], 0
    for size, groups in stages:
        ramp.append((read * L, size * L))
        read += size * groups * run_blocks
    return Steps(block_tokens=L, batch_tokens=stages[-1][0] * L, seq_len=L, batch_ramp=ramp, run_blocks=run_blocks)


class Read(NamedTuple):
    """A schedule drawn by hypothesis and what its first samples are."""

    steps: Steps
    num_steps: int
    events: list[Event]
    windows: dict[str, int]
    sampler: RunSampler
    source: NDArray[np.int32]
    window: NDArray[np.int64]
    epoch: NDArray[np.int64]


@st.composite
def reads(draw: st.DrawFn) -> Read:
    c = draw(st.integers(2, 5))
    stages = draw(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 4)), min_size=1, max_size=3, unique_by=min))
    steps = steps_of(c, stages)
    num_steps = c * draw(st.integers(3, 14))
    groups = [steps.first_block(first) for first in range(0, num_steps, c)]
    windows = {name: draw(st.integers(c, 12 * c)) for name in "abc"}
    events = [Event(0, "recipe", "", {"a": draw(st.integers(1, 9)), "b": draw(st.integers(1, 9))})]
    for _ in range(draw(st.integers(0, 4))):
        weights = {name: share for name in "abc" if (share := draw(st.integers(0, 9)))}
        skip = c * draw(st.integers(0, 20))
        if weights or skip:
            events.append(Event(draw(st.sampled_from(groups)), "user", "", weights, skip))
    sampler = RunSampler(draw(st.integers(0, 2**70)), ScheduleLog(events), windows, steps)
    ks = np.arange(steps.first_block(num_steps))
    return Read(steps, num_steps, events, windows, sampler, *sampler.get(ks))


@settings(max_examples=60, deadline=None)
@given(reads())
def test_a_slot_reads_its_run_block_by_block(read: Read) -> None:
    c, following = read.steps.run_blocks, 0
    for group in range(0, read.num_steps, c):
        firsts = [read.steps.first_block(group + j) for j in range(c + 1)]
        assert len(set(np.diff(firsts))) == 1
        ks = np.array([np.arange(firsts[j], firsts[j + 1]) for j in range(c)])  # [c, slots]
        run, place = run_and_place(read.steps, ks.reshape(-1))
        size = ks.shape[1]
        assert np.array_equal(run.reshape(ks.shape), np.tile(following + np.arange(size), (c, 1)))
        assert np.array_equal(place.reshape(ks.shape), np.tile(np.arange(c)[:, None], (1, size)))
        for values in (read.source, read.epoch):
            assert (values[ks] == values[ks[0]]).all()
        assert np.array_equal(read.window[ks], read.window[ks[0]] + np.arange(c)[:, None])
        assert (read.window[ks[0]] % c == 0).all()
        following += size


@settings(max_examples=30, deadline=None)
@given(reads())
def test_every_run_at_most_once_per_epoch_and_counts_are_exact(read: Read) -> None:
    skipped = any(event.skip for event in read.events)
    for d, (name, size) in enumerate(read.windows.items()):
        for epoch in np.unique(read.epoch[read.source == d]):
            windows = read.window[(read.source == d) & (read.epoch == epoch)]
            assert len(np.unique(windows)) == len(windows)
            assert windows.max() < size // read.steps.run_blocks * read.steps.run_blocks
            if not skipped and epoch < read.epoch[read.source == d].max():
                assert len(windows) == read.sampler.windows[name] * read.steps.run_blocks
    for k in range(len(read.source)):
        skips = sum(event.skip for event in read.events if event.first_block <= k)
        counts = list(read.sampler.counts(k).values())
        assert sum(counts) == k + skips
        if not skipped:
            assert counts == np.bincount(read.source[:k], minlength=3).tolist()


@settings(max_examples=40, deadline=None)
@given(reads())
def test_a_log_that_grows_reads_as_the_whole_one(read: Read) -> None:
    grown = RunSampler(read.sampler.seed, ScheduleLog(read.events[:1]), read.windows, read.steps)
    for event in read.events[1:]:
        trial = grown.copy()
        trial.extend([event], {})
        grown.extend([event], {})
    for ours in (grown, grown.copy()):
        for part, whole in zip(ours.get(np.arange(len(read.source))), read[5:], strict=True):
            assert np.array_equal(part, whole)
    last = len(read.source) - 1
    assert grown.shares(last) == read.sampler.shares(last) and sum(grown.shares(last).values()) == pytest.approx(1)


@settings(max_examples=40, deadline=None)
@given(reads(), st.data())
def test_changes_come_between_groups(read: Read, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(read.source)))
    groups = [read.steps.first_block(step) for step in range(0, read.num_steps + 1, read.steps.run_blocks)]
    later = min(first for first in groups if first >= k)
    assert read.sampler.next_change(k) == later
    event = Event(k, "user", "", {"a": 1})
    if k == later:
        read.sampler.extend([event], {})
    else:
        with pytest.raises(UsageError, match=f"at block {k} is in the middle of a group .* begins at block {later}"):
            read.sampler.extend([event], {})


def test_runs_of_one_block_are_the_plain_order() -> None:
    steps, log = steps_of(1, [(2, 3), (5, 1)]), ScheduleLog.fixed({"a": 0.4, "b": 0.6})
    windows, ks = {"a": 90, "b": 80}, np.arange(400)
    plain, runs = Sampler(3, log, windows), RunSampler(3, log, windows, steps)
    assert type(block_order(3, log, windows, steps)) is Sampler
    assert all(np.array_equal(a, b) for a, b in zip(plain.get(ks), runs.get(ks), strict=True))
    assert [plain.counts(k) for k in range(99)] == [runs.counts(k) for k in range(99)]
    assert [plain.next_change(k) for k in range(99)] == list(range(99))
    run, place = run_and_place(steps, ks)
    assert np.array_equal(run, ks) and not place.any()


def test_what_would_cut_a_run_is_refused_with_the_nearest() -> None:
    steps, log = steps_of(4, [(3, 1)]), ScheduleLog.fixed({"a": 1.0})
    sampler = RunSampler(0, log, {"a": 9, "b": 3}, steps)
    for event, message in [
        (Event(12, "user", "", skip=9), r"skip: 36 tokens are no whole runs of 4 blocks .*; nearest: 32"),
        (Event(12, "user", "", skip=1), r"nearest: 16"),
        (Event(13, "user", "", skip=4), r"at block 13 is in the middle of a group of 4 steps .* begins at block 24"),
        (Event(12, "user", "", {"b": 1}), r"data.sources.b: has less than one run of 4 blocks"),
    ]:
        with pytest.raises(UsageError, match=message):
            sampler.extend([event], {})
    added = Event(12, "user", "", sources={"c": AddedSource("data/c", "00")})
    with pytest.raises(UsageError, match=r"data.sources.c: has less than one run of 4 blocks .* or leave it out"):
        sampler.extend([added], {"c": 3})
    sampler.extend([added], {"c": 4})
    with pytest.raises(UsageError, match=r"train.batch_ramp: 3 steps of 8 tokens .* whole groups of 2 .*; nearest: 32"):
        Steps(block_tokens=4, batch_tokens=16, seq_len=4, batch_ramp=[(0, 8), (24, 16)], run_blocks=2)
    rounded = Steps(block_tokens=4, batch_tokens=16, seq_len=4, batch_ramp=[(0, 8), (32, 16)], run_blocks=2)
    assert [rounded.num_steps(tokens) for tokens in (0, 1, 16, 17, 32, 33, 64, 65)] == [0, 2, 2, 4, 4, 6, 6, 8]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run_blocks": 0}, "run_blocks: must be at least 1, got 0"),
        ({"packing": "best_fit"}, "run_blocks: with packing best_fit no document .* use packing: concat, or run_bl"),
        ({"packing": "unpacked"}, "packing unpacked"),
        ({"block_tokens": 128}, "run_blocks: block_tokens makes several rows of a block"),
        ({"seq_lens": [(0, 32), (9, 64)]}, "run_blocks: seq_lens makes several rows"),
        ({"sources": {"made": SourceConfig(synthetic="a:b")}}, "run_blocks: .* the synthetic source made goes on"),
    ],
)
def test_settings_without_runs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig("t", 64, **{"run_blocks": 2, **changes})


# ------------------------------------------------------------------------------------------------- with tokens

C = 3
SIZES: dict[str, Any] = {"batch_tokens": 14 * 64}
EVENTS = [Event(14 * C, "user", "", {"code": 1, "docs": 2}), Event(28 * C, "user", "", skip=5 * C)]


def test_any_ranks_and_a_log_that_grows_read_the_same_runs(data_config: Config) -> None:
    cfg = data_config(run_blocks=C)
    ramp = [(0, 7 * 64), (2 * C * 7 * 64, 14 * 64)]
    for sizes in (SIZES | {"events": EVENTS}, SIZES | {"batch_ramp": ramp}):
        expected = hashes(cfg, 1, range(12), **sizes)
        assert len(set(expected)) == 12
        assert hashes(cfg, 7, range(12), **sizes) == expected
        assert hashes(cfg, 1, range(6, 12), microbatch=7, **sizes) == expected[6:]  # resumed where a group begins
    growth = {0: EVENTS[0], 2: EVENTS[1]}
    assert hashes(cfg, 2, range(12), growth, microbatch=7, **SIZES) == hashes(cfg, 1, range(12), events=EVENTS, **SIZES)


def rows_of(reader: Loader, stop: int) -> list[list[Batch]]:
    return [data.micro_batches for data in reader.steps(0, stop)]


def test_rows_hold_as_much_of_their_document_as_the_run_does(data_config: Config) -> None:
    cfg = data_config(run_blocks=C)
    reader = loader(cfg, microbatch=2, **SIZES)
    stores = [Store(f"{source.path}/train") for source in cfg.sources.values()]
    held = 0
    for group in np.arange(4 * C).reshape(-1, C):
        steps = [rows_of(reader, int(group[-1]) + 1)[step] for step in group]
        for slot in range(7):
            batches = [micro_batches[slot] for micro_batches in steps]
            for row in range(2):
                runs = {int(batch.run[row]) for batch in batches}
                assert runs == {int(group[0]) // C * 14 + 2 * slot + row}
                source, window, _ = reader.sampler.get(batches[0].block[row : row + 1].numpy())
                start = int(window[0]) * 64
                ids = stores[source[0]].document_ids(start, C * 64)
                opened = [int((ids == each).argmax()) for each in ids]
                positions = torch.cat([batch.positions[row] for batch in batches])
                assert positions.tolist() == [t - at for t, at in enumerate(opened)]
                befores = [int(batch.docs.before[row]) for batch in batches]
                assert befores == [j * 64 - opened[j * 64] for j in range(C)] and befores[0] == 0
                held += sum(before > 64 for before in befores)
    assert held > 5, "some documents must go on over more than a block"


def test_events_take_effect_where_a_group_begins(data_config: Config) -> None:
    reader = loader(data_config(run_blocks=C), workers=1, **SIZES)
    assert reader.lead == 3
    assert [reader.earliest(step) for step in (0, 1, 3, 4)] == [3 * 14, 6 * 14, 6 * 14, 9 * 14]
    assert reader.tokens_available["rare"] % (C * 64) == 0
    plain = loader(data_config(), workers=1, **SIZES)
    assert [plain.earliest(step) for step in (0, 1)] == [3 * 14, 4 * 14]
    (batch,) = next(loader(data_config(), **SIZES | {"microbatch": 14}).steps(1, 2)).micro_batches
    assert torch.equal(batch.run, batch.block) and not batch.docs.before.any()
    made = AddedSource(None, "00", "tests.data.test_loader:numbers", {"most": 5})
    for event, message in [
        (Event(20, "user", "", {"code": 1}), "in the middle of a group"),
        (Event(42, "user", "", sources={"made": made}), "adds source made, a function, .*add the path of prepared"),
    ]:
        with pytest.raises(UsageError, match=message):
            reader.admit(event, None)
