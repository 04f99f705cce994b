"""The order of data: a permutation that is one, counts that are exact, golden values that pin it."""

from __future__ import annotations

import pickle
from random import Random
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lmtrain.data.order.permutation import permute
from lmtrain.data.order.sampler import Sampler, balanced_word, letters_before
from lmtrain.data.order.schedule import AddedSource, Event, ScheduleLog
from lmtrain.errors import UsageError

KEY = np.uint64(0x0123456789ABCDEF)
GOLDEN_SOURCES = "cbcbcbcbcbcaccaccacc"
GOLDEN_WINDOWS = [3, 41, 6, 34, 5, 10, 2, 6, 0, 12, 1, 91, 4, 1, 7, 4, 0, 96, 5, 6]
GOLDEN_EPOCHS = [68, 7, 68, 7, 68, 7, 68, 7, 68, 7, 68, 0, 68, 69, 0, 69, 69, 0, 69, 69]
SKIPPING_SOURCES = "cbcbcbcbcbcaccacbccc"
SKIPPING_WINDOWS = [3, 41, 6, 34, 5, 56, 2, 52, 5, 54, 3, 91, 5, 0, 7, 4, 55, 1, 2, 3]
MIXED_SOURCES = [0, 1, 0, 0, 0, 0]
MIXED_WINDOWS = [81623, 4724, 51250, 755677, 941920, 894184]


def test_permutation_is_a_bijection() -> None:
    for size in [*range(1, 301), *(2**k + d for k in (9, 10, 12, 16) for d in (-1, 0, 1))]:
        assert np.array_equal(np.sort(permute(np.arange(size), size, KEY)), np.arange(size)), size


def test_low_bits_and_differences_are_shuffled() -> None:
    # An affine round function is a bijection too, yet had 2 low-bit patterns over 20 keys, and 1629 differences.
    size = 2**20
    outputs = [permute(np.arange(32), size, np.uint64(key)) for key in range(20)]
    for bit in range(4):
        assert len({tuple((out >> bit & 1).tolist()) for out in outputs}) == 20
    differences = np.diff(permute(np.arange(4097), size, KEY))
    assert len(np.unique(differences)) > 4050


def test_permutation_is_uniform_on_small_sets() -> None:
    size, keys = 97, 20000
    base = np.arange(keys, dtype=np.uint64)
    zero, one = (permute(np.full(keys, i), size, base) for i in (0, 1))
    counts = np.bincount((one - zero) % size, minlength=size)[1:]
    expected = keys / (size - 1)
    assert ((counts - expected) ** 2 / expected).sum() < 150  # chi-square of 95 degrees of freedom, 1 in 3000


def test_permutation_takes_a_key_per_index_and_huge_sizes() -> None:
    keys = np.array([1, 2, 3], dtype=np.uint64)
    together = permute(np.array([5, 6, 7]), 1000, keys)
    apart = [int(permute(np.array([i]), 1000, key)[0]) for i, key in zip((5, 6, 7), keys, strict=True)]
    assert together.tolist() == apart
    size = 2**52
    out = permute(np.array([0, 1, size - 1]), size, KEY)
    assert len(set(out.tolist())) == 3 and out.min() >= 0 and out.max() < size
    with pytest.raises(ValueError, match="size"):
        permute(np.array([0]), 2**52 + 1, KEY)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=20))
def test_every_prefix_of_the_word_holds_its_share(weights: list[int]) -> None:
    word, rank = balanced_word(tuple(weights))
    total = sum(weights)
    bound = 1 - 1 / max(2 * len(weights) - 2, 1) if len(weights) > 1 else 0
    for d, weight in enumerate(weights):
        error = np.cumsum(word == d) - np.arange(1, total + 1) * weight / total
        assert np.abs(error).max() <= bound + 1e-9
        assert rank[word == d].tolist() == list(range(weight))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=20), st.data())
def test_letters_of_a_prefix_are_counted_without_the_word(weights: list[int], data: st.DataObject) -> None:
    word, _ = balanced_word(tuple(weights))
    place = data.draw(st.integers(0, len(word)))
    counted = np.bincount(word[:place], minlength=len(weights))
    assert list(letters_before(place, tuple(weights))) == counted.tolist()


def log_of(*events: tuple[int, dict[str, int]]) -> ScheduleLog:
    return ScheduleLog(tuple(Event(first, "recipe", "", weights) for first, weights in events))


STAGES = log_of((0, {"a": 3, "b": 2}), (37, {"b": 1, "c": 1}), (1000, {"a": 5, "b": 1, "c": 10}))
WINDOWS = {"a": 101, "b": 64, "c": 7}


def test_counts_are_those_of_brute_force() -> None:
    sampler = Sampler(3, STAGES, WINDOWS)
    source = sampler.get(np.arange(1500))[0]
    for k in (0, 1, 5, 36, 37, 38, 99, 999, 1000, 1001, 1499, 1500):
        brute = np.bincount(source[:k], minlength=3)
        assert list(sampler.counts(k).values()) == brute.tolist(), k


def test_every_epoch_reads_every_window_once_across_events() -> None:
    source, window, epoch = Sampler(3, STAGES, WINDOWS).get(np.arange(3000))
    for d, size in enumerate(WINDOWS.values()):
        mine, epochs = window[source == d], epoch[source == d]
        assert (np.diff(epochs) >= 0).all()
        for e in range(epochs.max()):
            assert np.array_equal(np.sort(mine[epochs == e]), np.arange(size))
        orders = {tuple(mine[epochs == e].tolist()) for e in range(epochs.max())}
        assert len(orders) > 0.9 * epochs.max()  # another order each time (7! orders repeat by chance)


def test_any_subset_of_samples_is_the_same() -> None:
    whole = Sampler(3, STAGES, WINDOWS).get(np.arange(2000))
    some = np.random.default_rng(0).permutation(2000)[:300]
    for part, all_ in zip(Sampler(3, STAGES, WINDOWS).get(some), whole, strict=True):
        assert np.array_equal(part, all_[some])


def test_a_new_source_leaves_the_others_in_their_order() -> None:
    def orders(log: ScheduleLog, windows: dict[str, int]) -> dict[str, list[int]]:
        sampler = Sampler(9, log, windows)
        source, window, _ = sampler.get(np.arange(2000))
        return {name: window[source == i].tolist()[:60] for i, name in enumerate(sampler.names)}

    before = orders(log_of((0, {"a": 1, "b": 2})), {"a": 50, "b": 70})
    after = orders(log_of((0, {"a": 1, "b": 2, "new": 3})), {"new": 30, "b": 70, "a": 50})
    assert after["a"] == before["a"] and after["b"] == before["b"]


def test_names_and_seeds_decide() -> None:
    log = log_of((0, {"a": 1}))
    first = Sampler(1, log, {"a": 1000}).get(np.arange(20))[1].tolist()
    assert first != Sampler(2, log, {"a": 1000}).get(np.arange(20))[1].tolist()
    assert first != Sampler(1, log_of((0, {"b": 1})), {"b": 1000}).get(np.arange(20))[1].tolist()
    assert Sampler(-1, log, {"a": 1000}).get(np.arange(20))[1].tolist() != first


class Read(NamedTuple):
    """A schedule drawn by hypothesis, its sampler, and what its first samples read."""

    events: list[Event]
    sampler: Sampler
    source: NDArray[np.int32]
    window: NDArray[np.int64]
    epoch: NDArray[np.int64]


@st.composite
def schedules(draw: st.DrawFn) -> Read:
    """Up to 6 events in any order after the recipe's, some at one block, each of any kind; sources a, b, then c, d."""
    sizes = draw(st.lists(st.integers(1, 90), min_size=4, max_size=4))
    windows = dict(zip("abcd", sizes, strict=True))
    shares = st.integers(0, 40)
    events = [Event(0, "recipe", "", {"a": draw(st.integers(1, 9)), "b": draw(st.integers(1, 9))})]
    known = "ab"
    for _ in range(draw(st.integers(0, 6))):
        first, kind = draw(st.integers(0, 700)), draw(st.sampled_from(["mix", "skip", "add", "all"]))
        sources = {}
        if kind in ("add", "all") and len(known) < 4:
            sources = {"abcd"[len(known)]: AddedSource("", "")}
            known = "abcd"[: len(known) + 1]
        weights = {name: share for name in known if (share := draw(shares))} if kind in ("mix", "all") else {}
        skip = draw(st.integers(1, 150)) if kind in ("skip", "all") else 0
        if weights or skip or sources:
            events.append(Event(first, "user", "", weights, skip, sources))
    sampler = Sampler(draw(st.integers(0, 2**70)), ScheduleLog(events), {name: windows[name] for name in known})
    return Read(events, sampler, *sampler.get(np.arange(900)))


@settings(max_examples=120, deadline=None)
@given(schedules())
def test_shares_are_exact_between_any_events(read: Read) -> None:
    ordered = sorted(read.events, key=lambda event: event.first_block)
    stops = [event.first_block for event in ordered[1:]] + [900]
    weights: dict[str, int] = {}
    for event, stop in zip(ordered, stops, strict=True):
        weights = event.weights or weights
        source = read.source[event.first_block : stop]
        for i, name in enumerate(read.sampler.names):
            share = weights.get(name, 0) / sum(weights.values())
            error = np.cumsum(source == i) - np.arange(1, len(source) + 1) * share
            # counted from a skip on, that is a difference of two counts, each exact to 1 since the weights were set
            assert np.abs(error).max(initial=0) < (2 if not event.weights else 1)
            if len(source):
                assert read.sampler.shares(event.first_block)[name] == pytest.approx(share)


@settings(max_examples=80, deadline=None)
@given(schedules())
def test_counts_are_exact_since_the_weights_in_force(read: Read) -> None:
    """To less than one block at every block, what is skipped being counted as read."""
    ordered = sorted(read.events, key=lambda event: event.first_block)
    sets = [number for number, event in enumerate(ordered) if event.weights]
    for number, following in zip(sets, [*sets[1:], len(ordered)], strict=True):
        event = ordered[number]
        stop = ordered[following].first_block if following < len(ordered) else 900
        then = Sampler(read.sampler.seed, ScheduleLog(ordered[: number + 1]), read.sampler.windows)
        before = then.counts(event.first_block)
        for k in {*range(event.first_block, stop, 7), *(one.first_block for one in ordered[number:following])}:
            skipped = sum(one.skip for one in ordered[number + 1 : following] if one.first_block <= k)
            for name, count in read.sampler.counts(k).items():
                share = event.weights.get(name, 0) / sum(event.weights.values())
                if event.first_block <= k < stop:
                    assert abs(count - before[name] - (k - event.first_block + skipped) * share) < 1


@settings(max_examples=120, deadline=None)
@given(schedules())
def test_every_block_at_most_once_per_epoch_and_all_if_nothing_is_skipped(read: Read) -> None:
    skipped = any(event.skip for event in read.events)
    for d, (name, size) in enumerate(read.sampler.windows.items()):
        mine, epochs = read.window[read.source == d], read.epoch[read.source == d]
        assert (np.diff(epochs) >= 0).all()
        for e in np.unique(epochs):
            once = mine[epochs == e]
            assert len(np.unique(once)) == len(once) <= size
            if not skipped and e < epochs.max():
                assert len(once) == size
        consumed = read.sampler.counts(900)[name]
        assert consumed >= len(mine) and (skipped or consumed == len(mine))
        assert not len(epochs) or consumed > epochs.max() * size
    due = sum(event.skip for event in read.events if event.first_block <= 900)
    assert sum(read.sampler.counts(900).values()) == 900 + due


@settings(max_examples=80, deadline=None)
@given(schedules(), st.randoms(use_true_random=False))
def test_a_log_that_grows_reads_as_the_whole_one(read: Read, random: Random) -> None:
    grown = Sampler(read.sampler.seed, ScheduleLog(read.events[:1]), {n: read.sampler.windows[n] for n in "ab"})
    for event in read.events[1:]:
        before = grown.get(np.arange(event.first_block))
        trial = grown.copy()
        new = {name: read.sampler.windows[name] for name in event.sources}
        grown.extend([event], new)
        for part, same in zip(grown.get(np.arange(event.first_block)), before, strict=True):
            assert np.array_equal(part, same)
        trial.extend([event], new)
    ks = np.array(random.sample(range(900), 100))
    for ours in (grown, grown.copy()):
        for part, whole in zip(ours.get(ks), (read.source, read.window, read.epoch), strict=True):
            assert np.array_equal(part, whole[ks])


def test_a_skip_reads_what_came_later() -> None:
    plain = Sampler(3, STAGES, WINDOWS)
    skips = ScheduleLog((*STAGES.events, Event(50, "user", "", skip=13), Event(60, "user", "", skip=2)))
    skipping = Sampler(3, skips, WINDOWS)
    for part, other in zip(skipping.get(np.arange(900)), plain.get(np.arange(930)), strict=True):
        assert np.array_equal(part, np.concatenate([other[:50], other[63:73], other[75:915]]))


def test_a_refused_event_changes_nothing() -> None:
    sampler = Sampler(3, STAGES, WINDOWS)
    before = sampler.get(np.arange(2000))
    for weights, new, message in [({"d": 1}, {}, "unknown source d"), ({"d": 1}, {"d": 0}, "d has no whole block")]:
        with pytest.raises(UsageError, match=message):
            sampler.extend([Event(100, "user", "", weights)], new)
    assert sampler.names == ["a", "b", "c"]
    assert all(np.array_equal(a, b) for a, b in zip(sampler.get(np.arange(2000)), before, strict=True))


def test_many_events_keep_no_words() -> None:
    events = [Event(1000 * i, "policy", "", {"a": 2 * i + 1, "b": 4095 - 2 * i}) for i in range(300)]
    sampler = Sampler(3, ScheduleLog(events), {"a": 10**6, "b": 10**6})
    sampler.extend([Event(500, "user", "a spike", skip=1)], {})
    assert len(pickle.dumps(sampler)) < 301 * 1000  # a word alone, of 4096 letters, is 16 KiB
    assert sum(sampler.counts(300_000).values()) == 300_001
    assert len(np.unique(sampler.get(np.arange(299_000, 300_000))[1])) > 900


def test_sample_ten_to_the_twelve() -> None:
    sampler = Sampler(3, STAGES, {"a": 10**9, "b": 10**9 + 7, "c": 12345})
    source, window, epoch = sampler.get(np.array([10**12]))
    name = sampler.names[source[0]]
    assert sampler.counts(10**12)[name] // sampler.windows[name] == epoch[0] > 0
    assert 0 <= window[0] < sampler.windows[name] and sum(sampler.counts(10**12).values()) == 10**12
    sampler.extend([Event(10**12 - 5, "user", "", skip=10**12), Event(10**12, "user", "", {"a": 7, "b": 1})], {})
    source, window, epoch = sampler.get(np.array([10**12 - 1, 3 * 10**12]))
    assert (epoch > 0).all() and sum(sampler.counts(3 * 10**12).values()) == 4 * 10**12


def test_schedule_and_sources_must_agree() -> None:
    with pytest.raises(UsageError, match="unknown source cde; did you mean code"):
        Sampler(0, log_of((0, {"cde": 1})), {"code": 3})
    with pytest.raises(UsageError, match="no whole block"):
        Sampler(0, log_of((0, {"code": 1})), {"code": 0})


def test_golden_order() -> None:
    """Pinned: a change here reorders the data of every run and must raise ``ORDER_VERSION``."""
    source, window, epoch = Sampler(3, STAGES, WINDOWS).get(np.arange(990, 1010))
    assert "".join("abc"[d] for d in source) == GOLDEN_SOURCES
    assert window.tolist() == GOLDEN_WINDOWS
    assert epoch.tolist() == GOLDEN_EPOCHS
    mixed = Sampler(7, ScheduleLog.fixed({"x": 0.7, "y": 0.3}), {"x": 10**6, "y": 10**5})
    source, window, _ = mixed.get(np.array([0, 1, 2, 3, 10**6, 10**9]))
    assert source.tolist() == MIXED_SOURCES and window.tolist() == MIXED_WINDOWS
    skips = ScheduleLog((*STAGES.events, Event(995, "user", "", skip=100), Event(1005, "user", "", {"b": 1, "c": 3})))
    source, window, _ = Sampler(3, skips, WINDOWS).get(np.arange(990, 1010))
    assert "".join("abc"[d] for d in source) == SKIPPING_SOURCES
    assert window.tolist() == SKIPPING_WINDOWS
