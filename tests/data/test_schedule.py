"""The schedule log: integer weights, appending, reading back, torn and damaged lines."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmtrain.data.schedule import Event, ScheduleLog, integer_weights
from lmtrain.errors import DataError, UsageError


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
    for weights, message in [
        ({"a": -0.3}, "data.sources.a.weight: must be a finite number >= 0, got -0.3"),
        ({"a": float("nan")}, "got nan"),
        ({"a": 0.0, "b": 0.0}, "the weights of a, b sum to 0"),
        ({}, "no sources"),
    ]:
        with pytest.raises(UsageError, match=message):
            integer_weights(weights)


def test_open_append_read(tmp_path: Path) -> None:
    path = tmp_path / "schedule.jsonl"
    log = ScheduleLog.open(path, {"code": 3, "docs": 1})
    log.append(Event(100, {"code": 1, "docs": 1}, "user", "more docs"))
    again = ScheduleLog.read(path)
    assert again.events == log.events and len(again.events) == 2
    assert ScheduleLog.open(path, {"docs": 2, "code": 6}).events == log.events
    assert ScheduleLog.fixed({"code": 3, "docs": 1}).events == log.events[:1]
    with pytest.raises(UsageError, match=r"this run began with weights .* the recipe now gives"):
        ScheduleLog.open(path, {"code": 1, "docs": 1})
    with pytest.raises(ValueError, match="block 100 is not after block 100"):
        log.append(Event(100, {"code": 1}, "user", ""))
    with pytest.raises(ValueError, match="positive"):
        log.append(Event(200, {"code": 0}, "user", ""))


def test_torn_last_line_is_ignored_and_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "schedule.jsonl"
    ScheduleLog.open(path, {"a": 1})
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:-1])  # even one that parses: without its newline it was never acknowledged
    log = ScheduleLog.read(path)
    assert len(log.events) == 1 and "torn last line" in caplog.text
    log.append(Event(5, {"a": 2}, "user", ""))
    assert len(path.read_bytes().splitlines()) == 2 and ScheduleLog.read(path).events == log.events
    path.write_bytes(whole[:10])
    assert len(ScheduleLog.open(path, {"a": 1}).events) == 1 and path.read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((b"{", b"["), ":1: not a schedule event"),
        ((b'"order_version": 1', b'"order_version": 2'), "format 1, order 2, this version of lmtrain reads 1 and 1"),
        ((b'"format_version": 1', b'"format_version": 9'), "format 9"),
        ((b'"first_block": 0', b'"first_block": 7'), "the first event must be at block 0"),
        ((b'"reason"', b'"raison"'), "reason"),
    ],
)
def test_damage_is_an_error(tmp_path: Path, change: tuple[bytes, bytes], message: str) -> None:
    path = tmp_path / "schedule.jsonl"
    ScheduleLog.open(path, {"a": 1})
    path.write_bytes(path.read_bytes().replace(*change))
    with pytest.raises(DataError, match=message):
        ScheduleLog.read(path)
