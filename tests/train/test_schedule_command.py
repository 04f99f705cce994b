"""launch/schedule.py: how it names sources, and what it does when it cannot have the run's lock."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmtrain.checkpoint.lock import RunLock
from lmtrain.errors import StorageError, UsageError
from lmtrain.pretrain import schedule_command
from lmtrain.pretrain.schedule_command import HOLDER, Run, _request, _sources


def test_a_source_may_be_called_like_a_word() -> None:
    given = {"weights.at": "0.3", "code": "0.1", "weights.docs": "0.2", "at": "+1"}
    assert _sources(given, "weights", "at", "reason") == {"at": "0.3", "code": "0.1", "docs": "0.2"}
    with pytest.raises(UsageError, match="given twice"):
        _sources({"code": "1", "weights.code": "2"}, "weights")


@pytest.mark.parametrize("start", [HOLDER, "a start of the run"])
def test_only_a_run_that_trains_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str) -> None:
    monkeypatch.setattr(schedule_command, "_ask", lambda run, request, text: "asked")
    run = Run(tmp_path, None, None)  # type: ignore[arg-type]
    lock = RunLock(tmp_path, start)
    try:
        if start == HOLDER:
            with pytest.raises(UsageError, match=r"another launch/schedule\.py changes it"):
                _request(run, {"skip": "1"}, {})
        else:
            assert _request(run, {"skip": "1"}, {}) == "asked"
    finally:
        lock.release()


def test_a_lock_that_cannot_be_opened_is_no_live_run(tmp_path: Path) -> None:
    (tmp_path / "run.lock").mkdir()
    with pytest.raises(StorageError, match="cannot be opened"):
        _request(Run(tmp_path, None, None), {"skip": "1"}, {})  # type: ignore[arg-type]


def test_a_request_that_cannot_be_written_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule_command, "_admitted", lambda run, request: (None, ["WARNING: often"]))
    run = Run(tmp_path, None, None)  # type: ignore[arg-type]
    said = schedule_command._ask(run, None, "skip: 1\n")  # type: ignore[arg-type]
    assert "written" in said and said.startswith("WARNING: often\n")
    assert [path.name for path in (tmp_path / "control").iterdir()] == ["mix.yaml"]
    with pytest.raises(UsageError, match="is there already"):
        schedule_command._ask(run, None, "skip: 2\n")  # type: ignore[arg-type]
    assert (tmp_path / "control" / "mix.yaml").read_text() == "skip: 1\n"
    monkeypatch.setattr(schedule_command, "REQUEST", "x" * 300)
    with pytest.raises(StorageError, match=r"(?i)name too long; nothing was asked"):
        schedule_command._ask(run, None, "skip: 1\n")  # type: ignore[arg-type]
