"""Whatever byte is flipped, cut off, added or planted: the checkpoint is refused and the one before it is used."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch

from lmtrain.checkpoint import commit
from lmtrain.checkpoint.checkpointer import HASHER
from lmtrain.checkpoint.manifest import FORMAT_VERSION, NewerFormatError, canonical, read_manifest
from lmtrain.checkpoint.storage import LocalStorage
from lmtrain.errors import DataError

DISK = LocalStorage()


def check(path: Path, mode: str = "hash") -> None:
    commit.verify(DISK, path, mode, HASHER)


def newest(root: Path) -> Path | None:
    return commit.newest_verified(commit.committed(DISK, root), check)


@pytest.fixture
def two(make, save) -> tuple[Path, Path]:
    checkpointer = make()
    return save(checkpointer, 9), save(checkpointer, 10)


def test_the_newest_is_used_when_both_verify(two):
    assert newest(two[0].parent) == two[1]


def test_every_byte_of_every_json_file_counts(two, memory, caplog):
    older, newer = two
    storage = memory.copy_of(older.parent)
    names = sorted(name for name in storage.listdir(newer) if not name.endswith(".bin"))
    assert names == ["COMMIT", "loop.json", "manifest.json", "metadata.json"]

    def newest() -> Path | None:
        caplog.clear()
        return commit.newest_verified(
            commit.committed(storage, older.parent), lambda path: commit.verify(storage, path, "hash", HASHER)
        )

    for name in names:
        content = storage.content(newer / name)
        for position in range(len(content)):
            for mask in (0x01, 0x20, 0xFF):
                content[position] ^= mask
                assert newest() == older, f"{name}: byte {position} ^ {mask:#x} went unseen"
                assert [line.startswith("checkpoint step 10 does not verify: ") for line in caplog.messages] == [True]
                content[position] ^= mask
    assert newest() == newer


def test_seeded_bytes_of_tensor_files(make, memory, tmp_path):
    make().save(1, {"w": torch.randn(64, 64), "b": torch.ones(3)}, {})
    path = tmp_path / "checkpoints" / "step-00000001"
    storage = memory.copy_of(path)
    rng = random.Random(0)
    files = [name for name in storage.listdir(path) if name.endswith(".bin")]
    assert files
    for name in files:
        content = storage.content(path / name)
        for _ in range(200):
            position, mask = rng.randrange(len(content)), rng.randrange(1, 256)
            content[position] ^= mask
            with pytest.raises(DataError, match=rf"{path / name}: damaged: expected xxh3_128 \w+, got \w+"):
                commit.verify(storage, path, "hash", HASHER)
            content[position] ^= mask
    commit.verify(storage, path, "hash", HASHER)


@pytest.mark.parametrize("mode", ["hash", "size"])
def test_truncation_and_removal_of_every_file(two, mode):
    older, newer = two
    for file in sorted(newer.iterdir()):
        good = file.read_bytes()
        for length in {0, 1, len(good) // 2, len(good) - 1}:
            file.write_bytes(good[:length])
            with pytest.raises(DataError, match=file.name):
                check(newer, mode)
            assert newest(older.parent) == older
        file.unlink()
        with pytest.raises(DataError, match=file.name):
            check(newer, mode)
        file.write_bytes(good)
    check(newer, mode)


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "optimizer.pt", "metadata.json", "loop.json", "COMMIT"])
def test_planted_pickles_do_not_run(two, make, state, tmp_path, name):
    older, newer = two
    marker = tmp_path / "executed"
    payload = pickle.dumps(Payload(marker))
    (newer / name).write_bytes(payload)
    with pytest.raises(DataError, match=name):
        check(newer)
    checkpointer = make()
    with pytest.raises(DataError):
        checkpointer.load(newer, state(0))
    assert checkpointer.find("auto") == older
    assert not marker.exists()


@pytest.mark.parametrize("name", ["metadata.json", "loop.json", "shard-00000-of-00001.bin"])
def test_planted_pickles_do_not_run_even_with_the_hashes_made_to_fit(two, make, state, tmp_path, name):
    """An attacker who can write the folder can make the hashes fit; even then nothing is executed."""
    newer = two[1]
    marker = tmp_path / "executed"
    payload = pickle.dumps(Payload(marker))
    (newer / name).write_bytes(payload)
    manifest = read_manifest(DISK, newer, HASHER)
    manifest["files"][name] = {"bytes": len(payload), HASHER.name: HASHER.of(payload)}
    reseal(newer, manifest)
    check(newer)
    # in a tensor file a pickle is what any bytes are there: numbers
    with contextlib.suppress(DataError) if name.endswith(".bin") else pytest.raises(DataError):
        make().load(newer, state(0))
    assert not marker.exists()


def reseal(path: Path, manifest: dict) -> None:
    raw = canonical(manifest)
    (path / "manifest.json").write_bytes(raw)
    facts = {"format_version": manifest["format_version"], "step": manifest["step"]}
    (path / "COMMIT").write_bytes(canonical({**facts, f"manifest_{HASHER.name}": HASHER.of(raw)}))


@pytest.mark.parametrize(
    "files",
    [
        None,
        {"../x": {"bytes": 1, "xxh3_128": ""}},
        {"a": 1},
        {"a": {"bytes": "1", "xxh3_128": ""}},
        {"a": {"bytes": 1}},
    ],
)
def test_a_manifest_of_another_shape_is_refused(two, files):
    manifest = read_manifest(DISK, two[1], HASHER)
    reseal(two[1], {**manifest, "files": files})
    with pytest.raises(DataError, match=r"manifest\.json: files"):
        check(two[1])


def test_a_newer_format_is_refused_and_not_passed_over(two, make):
    older, newer = two
    reseal(newer, {**read_manifest(DISK, newer, HASHER), "format_version": FORMAT_VERSION + 1})
    sentence = rf"written in checkpoint format {FORMAT_VERSION + 1} by a later lmtrain; this one reads up to"
    for resume in ("auto", "true", str(newer)):
        with pytest.raises(NewerFormatError, match=sentence):
            make().find(resume)
    assert make().find(str(older)) == older


def test_a_directory_under_another_step_is_refused(two):
    older, newer = two
    moved = older.with_name("step-00000011")
    shutil.copytree(newer, moved)
    with pytest.raises(DataError, match="the directory says step 11"):
        check(moved)
    renamed = older.with_name("best")
    shutil.copytree(newer, renamed)
    check(renamed)


def test_order_is_by_number_and_other_names_are_ignored(tmp_path):
    for name in ("step-00000009", "step-100000000", "step-00000010", "step-7", ".tmp-00000011-x", "quarantine"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000012").write_text("a file", encoding="utf-8")
    assert [p.name for p in commit.committed(DISK, tmp_path)] == ["step-100000000", "step-00000010", "step-00000009"]
    assert commit.committed(DISK, tmp_path / "nowhere") == []


def test_a_committed_checkpoint_that_verifies_is_kept(two, make, state, caplog):
    newer = two[1]
    before = {p.name: p.read_bytes() for p in newer.iterdir()}
    checkpointer = make(start_id="two")
    checkpointer.save(10, state(77), {})
    assert {p.name: p.read_bytes() for p in newer.iterdir()} == before
    assert "kept" in caplog.text
    assert not list(newer.parent.glob(".tmp-*"))


def test_a_committed_one_that_does_not_verify_goes_to_quarantine(two, make, save):
    newer = two[1]
    for count in (1, 2):
        (newer / "loop.json").write_text("{}", encoding="utf-8")
        save(make(), 10)
        check(newer)
        assert len(list((newer.parent / "quarantine").iterdir())) == count
    assert (newer.parent / "quarantine" / "step-00000010-0" / "loop.json").read_text(encoding="utf-8") == "{}"


def test_leftovers_of_other_starts_are_removed_by_the_lock_holder_only(tmp_path, make, save):
    from lmtrain.checkpoint.lock import RunLock

    path = save(make(), 1)
    for name in (".tmp-00000002-dead", ".tmp-00000002-mine", ".del-step-00000000"):
        (path.parent / name).mkdir()
    make(start_id="mine")
    assert len(list(path.parent.glob(".*"))) == 3
    lock = RunLock(tmp_path, "mine")
    make(start_id="mine")
    assert [p.name for p in path.parent.glob(".*")] == [".tmp-00000002-mine"]
    save(make(start_id="mine"), 2)
    assert [p.name for p in path.parent.glob(".*")] == []
    lock.release()


def test_what_is_no_checkpoint(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="not a checkpoint"):
            check(path)


def test_manifest_says_what_a_stranger_needs(two):
    manifest = json.loads((two[1] / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["step"] == 10 and manifest["tokens"] == 100 and manifest["start_id"] == "one"
    assert manifest["world"] == {"size": 1, "mesh": {"dp": 1}}
    assert manifest["tensors"]["model.w"] == {"shape": [2, 3], "dtype": "float32"}
