"""A disk without room, by a limit on the size of files: one line, exit code 74, and nothing half-written in sight."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmtrain.data.corpora.jsonl import write_jsonl
from lmtrain.data.order.schedule import Event, ScheduleLog
from lmtrain.data.store.arrays import write_array
from lmtrain.errors import EXIT_DONE, EXIT_IO, StorageError
from tests.data.test_prepare_command import prepare, two

assert two  # the fixture


@contextmanager
def room(size: int) -> Iterator[None]:
    """No file may get more than ``size`` bytes in here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_merge_and_pack(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(two)
    merging = ["merge", f"out={two / 'all'}", str(two / "code"), str(two / "rare")]
    packing = ["pack", str(two / "code"), "length=32"]
    for words, sizes in ((merging, (10, 4000, 30_000)), (packing, (10, 500, 2000))):
        for size in sizes:
            with room(size):
                code = prepare.main(words)
            error = capsys.readouterr().err
            assert (code, error.count("\n")) == (EXIT_IO, 1) and "File too large" in error, (words, size)
            assert files(two) == before
            assert not list(two.rglob("*.partial"))
        assert prepare.main(words) == EXIT_DONE
        before = files(two)


@pytest.mark.parametrize("kind", ["train:300", "train-sp:300"])
def test_a_new_tokenizer(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], make_text: Any) -> None:
    (tmp_path / "text").mkdir()
    for i in range(3):
        (tmp_path / "text" / f"{i}.txt").write_text(make_text(i, 60), encoding="utf-8")
    words = [f"out={tmp_path / 'out'}", f"tokenizer={kind}", "heldout=0", f"sources.a.path={tmp_path / 'text'}"]
    with room(3000):  # for the survey, not for the tokenizer
        assert prepare.main(words) == EXIT_IO
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("prepare: ") and "tokenizer." in error and error.endswith("File too large")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".lock", ".partial"}
    assert prepare.main(words) == EXIT_DONE


def test_the_schedule_log(tmp_path: Path) -> None:
    log = ScheduleLog.open(tmp_path / "schedule.jsonl", {"a": 1.0})
    event = Event(16, "user", "x" * 100, {"a": 1})
    with room(len((tmp_path / "schedule.jsonl").read_bytes()) + 50), pytest.raises(StorageError, match="too large"):
        log.append(event)
    again = ScheduleLog.open(tmp_path / "schedule.jsonl", {"a": 1.0})
    assert len(again.events) == 1, "a line that was not finished is none"
    again.append(event)
    assert ScheduleLog.read(tmp_path / "schedule.jsonl").events[1:] == (event,)
    with room(10), pytest.raises(StorageError, match="too large"):
        ScheduleLog.create(tmp_path / "other.jsonl", again.events)
    assert not (tmp_path / "other.jsonl").exists()


def test_a_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    documents = [{"text": "words " * 50}] * 50
    monkeypatch.setattr(
        prepare, "write_python_corpus", lambda out: {"code": write_jsonl(Path(out) / "code.jsonl", documents)}
    )
    with room(1000):
        assert prepare.main(["python-corpus", f"out={tmp_path}"]) == EXIT_IO
    assert capsys.readouterr().err == f"prepare: {tmp_path}/code.jsonl: File too large\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(0,), (3,), (2, 5)])
def test_arrays_are_numpys(tmp_path: Path, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape), dtype="<i8").reshape(shape)
    with open(tmp_path / "x.npy", "wb") as file:
        write_array(file, array)
    np.save(tmp_path / "numpy.npy", array)
    assert (tmp_path / "x.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()
