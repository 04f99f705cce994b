"""What the loop relies on: saves beside training, failures that leave nothing, and a resume that never guesses."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
import torch

from lmtrain.checkpoint import retention
from lmtrain.checkpoint.checkpointer import branch_from, init_from
from lmtrain.checkpoint.config import CheckpointConfig
from lmtrain.checkpoint.lock import RunLock
from lmtrain.checkpoint.storage import LocalFile, LocalStorage, check_space, probe_writable
from lmtrain.errors import DataError, StorageError


class Blocked(LocalStorage):
    """Writes wait until ``go`` is set."""

    def __init__(self) -> None:
        self.go, self.reached = threading.Event(), threading.Event()

    def create(self, path: Path) -> LocalFile:
        self.reached.set()
        assert self.go.wait(60)
        return LocalFile(path)


class Broken(LocalStorage):
    """``create`` of a name with ``part`` in it fails, as long as ``broken``."""

    def __init__(self, part: str, code: int = errno.ENOSPC) -> None:
        self.part, self.code, self.broken = part, code, True

    def create(self, path: Path) -> LocalFile:
        if self.broken and self.part in path.name:
            raise OSError(self.code, os.strerror(self.code), str(path))
        return LocalFile(path)


class Full(LocalStorage):
    """A disk with 100 bytes left by its own account."""

    def free(self, path: Path) -> int:
        return 100


def test_what_is_saved_is_the_moment_of_the_call(make, tmp_path):
    storage = Blocked()
    checkpointer = make(storage=storage, asynchronous=True)
    tensors = {"w": torch.full((3,), 1.0)}
    document = {"tokens": 5, "window": [1.0]}
    checkpointer.save(4, tensors, {"loop": document})
    assert storage.reached.wait(60)
    assert checkpointer.poll() is None
    assert make().find("auto") is None
    tensors["w"].fill_(2.0)
    document["tokens"], document["window"][0] = 6, 2.0
    storage.go.set()
    checkpointer.wait()
    result = checkpointer.poll()
    assert (result.step, result.error, result.path) == (4, None, tmp_path / "checkpoints" / "step-00000004")
    assert result.bytes == sum(
        p.stat().st_size for p in result.path.iterdir() if p.name not in ("COMMIT", "manifest.json")
    )
    assert checkpointer.poll() is None
    into = {"w": torch.zeros(3)}
    assert checkpointer.load(checkpointer.find("true"), into) == {"loop": {"tokens": 5, "window": [1.0]}}
    assert into["w"].tolist() == [1.0, 1.0, 1.0]


def test_a_save_waits_for_the_one_before(make, state):
    storage = Blocked()
    checkpointer = make(storage=storage, asynchronous=True)
    checkpointer.save(1, state(1), {})
    assert storage.reached.wait(60)
    threading.Timer(0.05, storage.go.set).start()
    checkpointer.save(2, state(2), {})
    checkpointer.wait()
    first, second = checkpointer.poll(), checkpointer.poll()
    assert (first.step, first.error, second.step, second.error) == (1, None, 2, None)
    assert second.stalled > 0
    assert checkpointer.find("auto") == second.path


@pytest.mark.parametrize("part", ["shard", "metadata", "loop", "manifest", "COMMIT"])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failed_save_leaves_nothing_and_training_goes_on(make, save, state, part, asynchronous):
    path = save(make(), 1)
    storage = Broken(part)
    checkpointer = make(storage=storage, asynchronous=asynchronous)
    checkpointer.save(2, state(2), {"loop": {}})
    checkpointer.wait()
    result = checkpointer.poll()
    assert isinstance(result.error, StorageError)
    assert "No space left on device" in str(result.error) and part in str(result.error)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert checkpointer.find("auto") == path
    storage.broken = False
    assert save(checkpointer, 2).name == "step-00000002"


def test_three_failures_in_a_row_end_the_run(make, save, state):
    storage = Broken("COMMIT", errno.EIO)
    checkpointer = make(storage=storage)
    for step in (1, 2):
        checkpointer.save(step, state(1), {})
    storage.broken = False
    checkpointer.save(3, state(1), {})
    storage.broken = True
    for step in (4, 5):
        checkpointer.save(step, state(1), {})
    with pytest.raises(StorageError, match=r"3 saves in a row failed; the last: .*Input/output error"):
        checkpointer.save(6, state(1), {})
    assert [r.error is None for r in iter(checkpointer.poll, None)] == [False, False, True, False, False, False]


def test_three_failures_are_raised_by_poll_when_saves_run_beside(make, state):
    checkpointer = make(storage=Broken("shard"), asynchronous=True)
    for step in (1, 2, 3):
        checkpointer.save(step, state(1), {})
    checkpointer._thread.join()
    with pytest.raises(StorageError, match="3 saves in a row failed"):
        checkpointer.poll()


def test_a_full_disk_is_told_before_a_byte_is_written(make, state, tmp_path):
    checkpointer = make(storage=Full())
    checkpointer.save(1, {"w": torch.zeros(100)}, {})
    text = str(checkpointer.poll().error)
    assert "need 480 bytes (1.2 x 400), free 100" in text
    assert list((tmp_path / "checkpoints").iterdir()) == []
    with pytest.raises(StorageError, match="free 100"):
        check_space(tmp_path, 84, Full())
    check_space(tmp_path, 83, Full())
    check_space(tmp_path, 1)


def test_probe_names_path_and_user(tmp_path):
    probe_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []
    missing = tmp_path / "nowhere"
    with pytest.raises(StorageError, match=rf"{missing} cannot be written by uid {os.getuid()}: No such file"):
        probe_writable(missing)


def test_saving_under_the_lock_of_another_start_is_refused(make, state, tmp_path):
    mine = RunLock(tmp_path, "mine")
    checkpointer = make(start_id="mine")
    other = make(start_id="other")
    other.save(1, state(1), {})
    assert "run.lock is not ours (taken by host" in str(other.poll().error)
    mine.release()
    RunLock(tmp_path, "third").release()
    checkpointer.save(1, state(1), {})
    assert isinstance(checkpointer.poll().error, StorageError)
    (tmp_path / "run.lock").unlink()
    checkpointer.save(1, state(1), {})
    assert "(gone)" in str(checkpointer.poll().error)
    assert make().find("auto") is None


def test_find_false_auto_true(make, save, tmp_path):
    assert make().find("false") is None
    assert make().find("auto") is None
    with pytest.raises(DataError, match=r"resume=true: there is no checkpoint in .*checkpoints"):
        make().find("true")
    path = save(make(), 3)
    assert make().find("auto") == make().find("true") == path
    assert make().find("false") is None


def test_find_by_path(make, save, tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    paths = [save(make(run_dir=first), step) for step in (1, 2)]
    checkpointer = make(run_dir=second)
    assert checkpointer.find(str(paths[0])) == paths[0]
    assert checkpointer.find(str(first)) == checkpointer.find(str(first / "checkpoints")) == paths[1]
    (paths[1] / "loop.json").unlink()
    with pytest.raises(DataError, match=r"none of the 1 checkpoints .* verifies"):
        checkpointer.find(str(paths[1]))
    assert checkpointer.find(str(first)) == paths[0]
    for nothing in (tmp_path / "nowhere", second):
        with pytest.raises(DataError, match="there is no checkpoint"):
            checkpointer.find(str(nothing))


def test_auto_refuses_step_0_beside_checkpoints_that_do_not_verify(make, save, caplog):
    for path in [save(make(), step) for step in (1, 2)]:
        (path / "COMMIT").unlink()
    for resume in ("auto", "true"):
        caplog.clear()
        with pytest.raises(DataError, match=r"none of the 2 checkpoints .* not starting at step 0") as raised:
            make().find(resume)
        assert raised.value.exit_code == 65
        assert [line.count("does not verify") for line in caplog.messages] == [1, 1]


def test_going_back_beside_newer_checkpoints_is_said(make, save, caplog):
    older, newer = (save(make(), step) for step in (1, 2))
    make().find(str(newer))
    assert not caplog.messages
    make().find(str(older))
    make().find("false")
    assert [f"{newer} is there already" in line for line in caplog.messages] == [True, True]


def test_size_mode_does_not_read_tensors(make, save):
    path = save(make(), 1)
    shard = path / "shard-00000-of-00001.bin"
    shard.write_bytes(bytes(shard.stat().st_size))
    assert make(verify="size").find("auto") == path
    with pytest.raises(DataError):
        make(verify="hash").find("auto")


def test_init_from_takes_weights_only(make, save, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    save(make(run_dir=source), 5)
    weights = {"model.w": torch.zeros(2, 3)}
    assert init_from(make(), str(source), weights).name == "step-00000005"
    assert weights["model.w"].eq(5).all()
    with pytest.raises(DataError, match=r"model\.v: missing"):
        init_from(make(), str(source), {**weights, "model.v": torch.zeros(1)})


def test_branch_from_takes_all_and_pins(make, save, state, tmp_path):
    source, branch = tmp_path / "source", tmp_path / "branch"
    source.mkdir()
    branch.mkdir()
    trunk = make(run_dir=source, keep_last=1)
    save(trunk, 1)
    into = state(0)
    path, documents = branch_from(make(run_dir=branch), str(source), into)
    assert documents == {"loop": {"tokens": 10}} and into["model.w"].eq(1).all()
    assert retention.pinned_by(path) == [str(branch)]
    for step in (2, 3):
        save(trunk, step)
    assert trunk.find(str(path)) == path
    retention.unpin(path, str(branch))
    retention.unpin(path, str(branch))
    save(trunk, 4)
    assert [p.name for p in path.parent.iterdir()] == ["step-00000004"]


def test_retention(make, save, tmp_path):
    checkpointer = make(keep_last=2, keep_every=4)
    root = tmp_path / "checkpoints"
    for step in range(1, 10):
        save(checkpointer, step)
        if step == 3:
            retention.pin(root / "step-00000003", "runs/a")
            retention.pin(root / "step-00000003", "runs/b")
            retention.pin(root / "step-00000003", "runs/b")
    assert sorted(p.name for p in root.iterdir() if p.is_dir()) == [f"step-{step:08d}" for step in (3, 4, 8, 9)]
    assert sorted(retention.pinned_by(root / "step-00000003")) == ["runs/a", "runs/b"]


def test_broken_checkpoints_do_not_count_as_kept(make, save):
    checkpointer = make(keep_last=2)
    paths = [save(checkpointer, step) for step in (1, 2)]
    (paths[1] / "COMMIT").unlink()
    save(checkpointer, 3)
    assert paths[0].exists() and make().find("true").name == "step-00000003"


def test_an_old_checkpoint_that_cannot_be_deleted_is_no_failed_save(make, save, caplog):
    class Sticky(LocalStorage):
        def remove(self, path: Path) -> None:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    checkpointer = make(storage=Sticky(), keep_last=1)
    save(checkpointer, 1)
    save(checkpointer, 2)
    assert "could not be deleted" in caplog.text


@pytest.mark.parametrize("wrong", [{"every": -1}, {"keep_last": 0}, {"keep_every": -2}])
def test_config_ranges(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CheckpointConfig(**wrong)


def test_identity_may_not_shadow_the_manifest(tmp_path):
    from lmtrain.checkpoint.checkpointer import Checkpointer

    with pytest.raises(ValueError, match="step"):
        Checkpointer(tmp_path, CheckpointConfig(), start_id="x", identity={"step": 3})


def test_fsync_of_a_local_file_empties_its_buffer_first(tmp_path):
    storage = LocalStorage()
    file = storage.create(tmp_path / "x")
    file.write(b"abcdef")
    file.fsync()
    assert storage.read(tmp_path / "x") == b"abcdef"
    file.close()
    assert storage.read(tmp_path / "x", 4, 10) == b"ef"
    with pytest.raises(FileExistsError):
        storage.create(tmp_path / "x")
