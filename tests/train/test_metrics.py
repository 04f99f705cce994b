"""metrics.jsonl: what is written, and what a reader gets after crashes and resumptions."""

import errno
import json
import math
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.errors import DataError, StorageError
from lmtrain.train.metrics import STEP_KEYS, MetricsLog, read_metrics, recorded_step

STORED = Path(__file__).parent / "fixtures" / "metrics-v1.jsonl"
VALUES = dict.fromkeys(STEP_KEYS, 0.5)


def write(path: Path, attempt: int, start: int, end: int) -> None:
    """An attempt that resumes at ``start``, steps to ``end`` and evaluates at every even step."""
    with MetricsLog(path, attempt, start, start * 10) as log:
        for step in range(start + 1, end + 1):
            log.step(step, step * 10, VALUES)
            if step % 2 == 0:
                log.evaluation(step, step * 10, {"heldout_bpb": 1.5, "heldout_bpb.text": 1.5})


def test_rows_keep_every_bit_and_the_fixed_names(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    loss = 0.1 + 0.2
    with MetricsLog(path, 1, 0, 0) as log:
        returned = log.step(1, 64, {**VALUES, "loss": loss, "mfu": None, "source_loss.text": 1 / 3, "token_hash": "ab"})
    (row,) = read_metrics(path)
    assert row == returned and row["loss"] == loss and row["source_loss.text"] == 1 / 3 and row["mfu"] is None
    assert row.keys() == STEP_KEYS | {"kind", "step", "tokens", "attempt", "source_loss.text"}
    assert oct(path.stat().st_mode & 0o777) == "0o600"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_values_become_null_and_are_marked(tmp_path: Path, bad: float) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, 1, 0, 0) as log:
        log.step(1, 64, {**VALUES, "grad_norm": bad, "router_load.1": [0.5, bad]})
    (row,) = read_metrics(path)
    assert row["grad_norm"] is None and row["router_load.1"] == [0.5, None] and row["nonfinite"] is True
    assert not {"NaN", "Infinity"} & set(path.read_text(encoding="utf-8").replace(":", ",").split(","))


def test_a_row_without_a_fixed_key_is_refused(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m", 1, 0, 0) as log:
        with pytest.raises(ValueError, match="token_hash"):
            log.step(1, 64, {key: 0 for key in STEP_KEYS - {"token_hash"}})
        with pytest.raises(ValueError, match="heldout_bpb"):
            log.evaluation(1, 64, {})


def test_what_was_recorded_stays_so_until_a_fork(tmp_path: Path) -> None:
    path = tmp_path / "m"
    last = []
    for attempt, (start, end, recorded) in enumerate([(0, 10, 0), (4, 6, 10), (4, 4, 10), (4, 12, 10), (4, 5, 0)], 1):
        with MetricsLog(path, attempt, start, start, recorded) as log:
            for step in range(start + 1, end + 1):
                log.step(step, step, VALUES)
        last.append(recorded_step(path))
    assert last == [10, 10, 10, 12, 5]
    assert recorded_step(STORED) == max(row["step"] for row in read_metrics(STORED))  # without the key


def test_each_row_is_one_write_of_a_whole_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[bytes] = []
    real = os.write

    def write_and_note(fd: int, data: bytes) -> int:
        writes.append(data)
        return real(fd, data)

    monkeypatch.setattr(os, "write", write_and_note)
    write(tmp_path / "m", 1, 0, 3)
    assert len(writes) == 5 and all(data.endswith(b"\n") and data.count(b"\n") == 1 for data in writes)


def test_a_full_disk_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with MetricsLog(tmp_path / "m", 1, 0, 0) as log:
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(StorageError, match="No space"):
            log.step(1, 1, VALUES)
        monkeypatch.setattr(os, "write", lambda fd, data: 3)
        with pytest.raises(StorageError, match="only 3 of"):
            log.step(1, 1, VALUES)
    with pytest.raises(StorageError, match="cannot be written"):
        MetricsLog(tmp_path / "absent" / "m", 1, 0, 0)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_the_reader_follows_the_timeline_that_survived(data: st.DataObject) -> None:
    """Attempts crash anywhere, in mid-line too, and resume anywhere before; compared with a plain dict per step."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        alive: dict[tuple[int, str], int] = {}
        reached = 0
        for attempt in range(1, data.draw(st.integers(2, 5))):
            start = data.draw(st.integers(0, reached))
            end = start + data.draw(st.integers(0, 6))
            write(path, attempt, start, end)
            alive = {key: value for key, value in alive.items() if key[0] <= start}
            for step in range(start + 1, end + 1):
                alive.update({(step, "step"): attempt, **({(step, "eval"): attempt} if step % 2 == 0 else {})})
            reached = end
            if data.draw(st.booleans()):
                with open(path, "ab") as file:
                    file.write(b'{"kind":"step","step":99,"att'[: data.draw(st.integers(1, 29))])
        rows = read_metrics(path)
        assert {(row["step"], row["kind"]): row["attempt"] for row in rows} == alive and len(rows) == len(alive)
        assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)


@given(st.integers(0, 2000))
@settings(max_examples=60, deadline=None)
def test_every_prefix_of_the_file_is_readable(size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole, part = Path(folder) / "whole", Path(folder) / "part"
        write(whole, 1, 0, 6)
        content = whole.read_bytes()[:size]
        part.write_bytes(content)
        assert len(read_metrics(part)) == max(content.count(b"\n") - 1, 0)


def test_a_repeated_evaluation_replaces_the_older_one(tmp_path: Path) -> None:
    path = tmp_path / "m"
    write(path, 1, 0, 4)
    with MetricsLog(path, 2, 4, 40) as log:
        log.evaluation(4, 40, {"heldout_bpb": 9.0})
    assert [(r["kind"], r["attempt"]) for r in read_metrics(path) if r["step"] == 4] == [("step", 1), ("eval", 2)]


def test_rows_of_a_superseded_attempt_that_still_writes_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with MetricsLog(path, 1, 0, 0) as orphan:
        orphan.step(1, 10, VALUES)
        with MetricsLog(path, 2, 1, 10) as log:
            orphan.step(2, 20, {**VALUES, "loss": 7.0})
            log.step(2, 20, VALUES)
            orphan.step(3, 30, VALUES)
    assert [(row["step"], row["attempt"]) for row in read_metrics(path)] == [(1, 1), (2, 2)]


def test_damage_in_the_middle_and_newer_formats_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "m"
    write(path, 1, 0, 2)
    lines = path.read_text(encoding="utf-8").splitlines()
    for line, words in (
        (lines[1][:20], "m:2: not a metrics row"),
        ("[1]", "m:2"),
        ('{"format_version":2}', "version 2; .* up to 1"),
    ):
        path.write_text("\n".join([lines[0], line, *lines[2:]]) + "\n", encoding="utf-8")
        with pytest.raises(DataError, match=words):
            read_metrics(path)


def test_the_stored_file_of_version_1_stays_readable() -> None:
    rows = read_metrics(STORED)
    assert [(row["kind"], row["step"], row["attempt"]) for row in rows] == [
        ("step", 1, 1), ("step", 2, 1), ("eval", 2, 1), ("step", 3, 2), ("step", 4, 2), ("eval", 4, 2),
    ]  # fmt: skip
    assert rows[0]["loss"] == 5.545177444479562 and rows[3]["nonfinite"] and rows[3]["skipped"]
    assert rows[-1]["heldout_bpb.text"] == 2.625
    assert json.loads(STORED.read_text(encoding="utf-8").splitlines()[0])["format_version"] == 1
