"""Stored files of every format of the data room: what was written once stays readable."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lmtrain.data.order.schedule import AddedSource, Event, ScheduleLog
from lmtrain.data.store.manifest import Manifest, verify
from lmtrain.data.store.store import Store
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import DataError

FIXTURES = Path(__file__).parent / "fixtures"
PREPARED = FIXTURES / "prepared-v1"
TRAIN = {
    "def f(x):\n    return x + 1\n", "caf\u00e9 \u4e2d\u6587 \U0001f680", "one two three four five six seven",
    "a<|endoftext|>b", "tabs\tand\r\nlines\n", "last document",
}  # fmt: skip


def test_prepared_v1() -> None:
    manifest = verify(PREPARED / "tiny")
    tokenizer = Tokenizer.load(PREPARED / "tokenizer.json")
    assert manifest.format_version == 1 and manifest.eod_appended
    # Changes with the libraries only if ids would: else every prepared corpus would be refused after an upgrade.
    assert tokenizer.fingerprint == manifest.tokenizer.fingerprint
    documents = []
    for split in ("train", "heldout"):
        store = Store(PREPARED / "tiny" / split)
        ids = [store.document(j) for j in range(store.num_documents)]
        assert all(document[-1] == tokenizer.eod_id for document in ids)
        documents += [tokenizer.decode(document[:-1]) for document in ids]
        size = sum(len(tokenizer.decode(document[:-1]).encode()) for document in ids)
        assert manifest.bytes_of_text[split] == size > 0
    assert set(documents) == TRAIN and len(documents) == len(TRAIN)


def test_schedule_v1() -> None:
    assert ScheduleLog.read(FIXTURES / "schedule-v1.jsonl").events == (
        Event(0, "recipe", "data.sources.*.weight", {"code": 45875, "docs": 19661}),
        Event(4096, "user", "more documentation", {"code": 1, "docs": 3}),
    )


def test_schedule_v2() -> None:
    news = AddedSource("data/news", "00112233445566778899aabbccddeeff")
    assert ScheduleLog.read(FIXTURES / "schedule-v2.jsonl").events == (
        Event(0, "recipe", "data.sources.*.weight", {"code": 45875, "docs": 19661}),
        Event(4096, "user", "more documentation [control/mix.yaml 0123456789abcdef]", {"code": 1, "docs": 3}, step=60),
        Event(4000, "user", "a loss spike", skip=128, step=61),
        Event(5000, "policy", "", {"code": 1024, "docs": 2048, "news": 1024}, 0, {"news": news}, 70),
    )


def test_schedule_v3() -> None:
    news = AddedSource("data/news", "00112233445566778899aabbccddeeff")
    arguments: dict[str, int | float | str | bool] = {
        "pairs": 4,
        "length": 64,
        "note": "x",
        "share": 0.5,
        "shuffle": True,
    }
    recall = AddedSource(None, "ffeeddccbbaa99887766554433221100", "lmtrain.eval.probes.mqar:mqar", arguments)
    events = ScheduleLog.read(FIXTURES / "schedule-v3.jsonl").events
    assert events == (
        Event(0, "recipe", "data.sources.*.weight", {"code": 45875, "docs": 19661}),
        Event(5000, "policy", "", {"code": 1024, "docs": 2048, "news": 1024}, 0, {"news": news}, 70),
        Event(6000, "user", "", sources={"recall": recall}, step=80),
    )
    assert [type(value) for value in events[2].sources["recall"].arguments.values()] == [int, int, str, float, bool]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 3}, "format_version 3, this version of lmtrain reads 2"),
        ({"surprise": 1}, "not a manifest: .*surprise"),
        ({"files": [{"path": "train.bin"}]}, "not a manifest: .*missing"),
        ({"format_version": None}, "not a manifest"),
    ],
)
def test_manifests_that_cannot_be_read(tmp_path: Path, change: dict[str, object], message: str) -> None:
    row = json.loads((PREPARED / "tiny" / "manifest.json").read_text(encoding="utf-8"))
    (tmp_path / "manifest.json").write_text(json.dumps({**row, **change}), encoding="utf-8")
    with pytest.raises(DataError, match=message) as error:
        Manifest.read(tmp_path)
    assert "manifest.json" in str(error.value) and "\n" not in str(error.value)


def test_verify_names_the_first_difference(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(PREPARED / "tiny", folder)
    for name, damage, message in [
        ("heldout.idx", lambda data: data[:-1] + b"\1", "heldout.idx: expected xxh3-128"),
        ("train.bin", lambda data: data + b"\0\0", r"train.bin: expected [\d,]+ bytes, found"),
    ]:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(damage(data))
        with pytest.raises(DataError, match=message):
            verify(folder)
        (folder / name).write_bytes(data)
    verify(folder)
    (folder / "train.bin").unlink()
    with pytest.raises(DataError, match=r"train.bin: missing, the manifest lists it"):
        verify(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"manifest.json: No such file"):
        verify(folder)
