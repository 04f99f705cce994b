"""The schedule log: integer weights, appending, reading back, forking, torn and damaged lines."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmtrain.data.order.schedule import AddedSource, Event, ScheduleLog, event_line, parse_event
from lmtrain.data.order.weights import COARSE_PERIOD, integer_weights
from lmtrain.errors import DataError, StorageError, UsageError


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=30))
def test_integer_weights_sum_to_the_period_and_are_near(weights: list[float]) -> None:
    named = {f"s{i}": weight for i, weight in enumerate(weights)}
    integers = integer_weights(named)
    period = sum(integers.values())
    assert period in (1 << 16, 1 << 18) and min(integers.values()) >= 1
    lifted = sum(1 for weight in weights if weight / sum(weights) * period < 1)
    for name, weight in named.items():
        assert abs(integers[name] - weight / sum(weights) * period) <= 1 + lifted
    assert integer_weights(dict(reversed(named.items()))) == integers


def test_weights_that_cannot_be() -> None:
    assert integer_weights({"a": 1, "b": 0, "c": 3}) == {"a": 16384, "c": 49152}
    assert integer_weights({"a": 1e-9, "b": 1}, COARSE_PERIOD) == {"a": 1, "b": 4095}
    for weights, message in [
        ({"a": -0.3}, "data.sources.a.weight: must be a finite number >= 0, got -0.3"),
        ({"a": float("nan")}, "got nan"),
        ({"a": 0.0, "b": 0.0}, "the weights of a, b sum to 0"),
        ({}, "no sources"),
    ]:
        with pytest.raises(UsageError, match=message):
            integer_weights(weights)


NEWS = AddedSource("data/news", "ab" * 16)


def test_open_append_read(tmp_path: Path) -> None:
    path = tmp_path / "schedule.jsonl"
    log = ScheduleLog.open(path, {"code": 3, "docs": 1})
    log.append(Event(100, "user", "more docs", {"code": 1, "docs": 1}, step=7))
    log.append(Event(90, "user", "a loss spike", skip=12, step=8))
    log.append(Event(100, "policy", "", {"news": 1}, sources={"news": NEWS}))
    again = ScheduleLog.read(path)
    assert again.events == log.events and len(again.events) == 4
    assert ScheduleLog.open(path, {"docs": 2, "code": 6}).events == log.events
    assert ScheduleLog.fixed({"code": 3, "docs": 1}).events == log.events[:1]
    with pytest.raises(UsageError, match=r"this run began with weights .* the recipe now gives"):
        ScheduleLog.open(path, {"code": 1, "docs": 1})


def test_an_event_is_on_disk_when_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "schedule.jsonl", dict[int, int]()

    def sync(handle: int) -> None:
        about = os.fstat(handle)
        synced[about.st_ino] = about.st_size

    monkeypatch.setattr(os, "fsync", sync)
    log = ScheduleLog.open(path, {"code": 3, "docs": 1})
    assert synced.pop(tmp_path.stat().st_ino) > 0, "the file's name too"
    for skip in (1, 2):
        log.append(Event(100, "user", "", skip=skip))
        assert synced == {path.stat().st_ino: path.stat().st_size}

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"schedule.jsonl: No space left on device$"):
        log.append(Event(200, "user", "", skip=3))


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (Event(200, "user", "", {"code": 0}), "positive"),
        (Event(-1, "user", "", {"code": 1}), "first_block must not be negative, got -1"),
        (Event(200, "user", "", skip=-1), "skip must not be negative, got -1"),
        (Event(200, "user", ""), "must change weights, skip blocks or add sources"),
        (Event(200, "user", "", sources={"news": NEWS}), "source news was added before"),
    ],
)
def test_events_that_cannot_be(tmp_path: Path, event: Event, message: str) -> None:
    path = tmp_path / "schedule.jsonl"
    log = ScheduleLog.open(path, {"code": 3})
    log.append(Event(10, "user", "", sources={"news": NEWS}))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        log.append(event)
    assert path.read_bytes() == before and len(log.events) == 2


NAMES = st.dictionaries(st.text("abcdef_", min_size=1, max_size=8), st.integers(1, 1 << 18), max_size=4)


@given(st.integers(0, 10**15), st.text(max_size=20), NAMES, st.integers(0, 10**12), NAMES, st.integers(0, 10**9))
def test_a_line_says_all_of_an_event(
    first: int, reason: str, weights: dict[str, int], skip: int, sources: dict[str, int], step: int
) -> None:
    added = {name: AddedSource(f"data/{name}", f"{digest:x}") for name, digest in sources.items() if digest % 2}
    made = {name: AddedSource(None, f"{digest:x}", "a.b:c", {name: digest / 3}) for name, digest in sources.items()}
    added = made | added
    event = Event(first, "user", reason, weights, skip, added, step)
    line = event_line(event)
    assert line.count(b"\n") == 1 and line.endswith(b"\n") and parse_event(json.loads(line)) == event


def test_fork_forgets_later_events_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "schedule.jsonl"
    log = ScheduleLog.open(path, {"code": 3, "docs": 1})
    for block in (10, 20, 30):
        log.append(Event(block, "user", "", {"code": block}))
    before = path.read_bytes()
    log.fork(2, tmp_path / "schedule-2.jsonl")
    assert (tmp_path / "schedule-2.jsonl").read_bytes() == before
    log.append(Event(15, "user", "other", {"docs": 1}))
    assert ScheduleLog.read(path).events == log.events and [e.first_block for e in log.events] == [0, 10, 15]
    before = path.read_bytes()
    with pytest.raises(StorageError, match=r"cannot be forked to .*schedule-2.jsonl: File exists"):
        log.fork(1, tmp_path / "schedule-2.jsonl")
    assert path.read_bytes() == before and len(log.events) == 3


def test_a_source_may_come_again_once_a_fork_has_forgotten_it(tmp_path: Path) -> None:
    log = ScheduleLog.open(tmp_path / "schedule.jsonl", {"code": 3})
    added = Event(10, "user", "", sources={"news": NEWS})
    log.append(added)
    log.fork(1, tmp_path / "aside")
    log.append(added)
    assert ScheduleLog.read(tmp_path / "schedule.jsonl").events == log.events


def test_a_whole_log_is_written_at_once_and_never_over_another(tmp_path: Path) -> None:
    path = tmp_path / "schedule.jsonl"
    events = (Event(0, "recipe", "", {"code": 3}), Event(10, "user", "", sources={"news": NEWS}))
    with pytest.raises(ValueError, match="source news was added before"):
        ScheduleLog.create(path, (*events, events[1]))
    with pytest.raises(StorageError, match="No such file"):
        ScheduleLog.create(tmp_path / "absent" / path.name, events)
    assert not list(tmp_path.iterdir())
    assert ScheduleLog.create(path, events).events == events == ScheduleLog.read(path).events
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(StorageError, match="there is a schedule log already"):
        ScheduleLog.create(path, events[:1])


def test_torn_last_line_is_ignored_and_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "schedule.jsonl"
    ScheduleLog.open(path, {"a": 1})
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:-1])  # even one that parses: without its newline it was never acknowledged
    log = ScheduleLog.read(path)
    assert len(log.events) == 1 and "torn last line" in caplog.text
    log.append(Event(5, "user", "", {"a": 2}))
    assert len(path.read_bytes().splitlines()) == 2 and ScheduleLog.read(path).events == log.events
    path.write_bytes(whole[:10])
    assert len(ScheduleLog.open(path, {"a": 1}).events) == 1 and path.read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((b"{", b"["), ":1: not a schedule event"),
        (
            (b'"order_version": 1', b'"order_version": 2'),
            "format 3, order 2, this version of lmtrain reads up to 3 and 1",
        ),
        ((b'"format_version": 3', b'"format_version": 9'), "format 9"),
        ((b'"first_block": 0', b'"first_block": 7'), "the first event must give weights from block 0"),
        ((b'"reason"', b'"raison"'), "reason"),
        ((b'"sources": {}', b'"sources": {"x": {"path": null, "digest": ""}}'), "has a path or is synthetic, one of"),
    ],
)
def test_damage_is_an_error(tmp_path: Path, change: tuple[bytes, bytes], message: str) -> None:
    path = tmp_path / "schedule.jsonl"
    ScheduleLog.open(path, {"a": 1})
    path.write_bytes(path.read_bytes().replace(*change))
    with pytest.raises(DataError, match=message):
        ScheduleLog.read(path)
