"""One writer: the second is refused and told who is first; a killed one frees the lock, its orphans do not hold it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lmtrain.checkpoint.lock import Fence, RunLock, holder
from lmtrain.errors import StorageError

HOLD = """
import os, sys
from pathlib import Path
from lmtrain.checkpoint.lock import RunLock
lock = RunLock(Path(sys.argv[1]), "first", attempt=3)
if "fork" not in sys.argv or os.fork() == 0:
    print("ready", flush=True)
sys.stdin.read()
"""


def start(run_dir: Path, *extra: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run_dir), *extra], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("extra", [[], ["fork"]])
def test_a_second_writer_is_refused_until_the_first_is_killed(tmp_path, extra):
    first = start(tmp_path, *extra)
    try:
        with pytest.raises(
            StorageError, match=rf"in use by another run: host \S+, pid {first.pid}, since 20\S+\+00:00"
        ):
            RunLock(tmp_path, "second")
        assert holder(tmp_path)["attempt"] == 3
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    # with "fork" a child of the first still lives, waiting on stdin
    lock = RunLock(tmp_path, "second")
    assert lock.still_mine() and holder(tmp_path)["start_id"] == "second"
    lock.release()
    first.stdin.close()
    first.stdout.close()


def test_still_mine_sees_a_lock_file_that_was_replaced(tmp_path):
    lock = RunLock(tmp_path, "one")
    assert lock.still_mine()
    (tmp_path / "run.lock").unlink()
    assert not lock.still_mine()
    other = RunLock(tmp_path, "two")
    assert other.still_mine() and not lock.still_mine()
    with pytest.raises(StorageError, match="taken by host"):
        Fence(tmp_path, "one").check()
    lock.release()
    assert not lock.still_mine()
    other.release()
    other.release()


def test_fence(tmp_path):
    Fence(tmp_path, "one").check()
    lock = RunLock(tmp_path, "one")
    fence = Fence(tmp_path, "one")
    fence.check()
    for garbage in ("", "{", "[]"):
        (tmp_path / "run.lock").write_text(garbage, encoding="utf-8")
        with pytest.raises(StorageError, match="is not ours"):
            fence.check()
        assert not lock.still_mine()
    lock.release()


def test_a_missing_run_folder_is_told(tmp_path):
    with pytest.raises(StorageError, match=rf"cannot be opened by uid {os.getuid()}: No such file"):
        RunLock(tmp_path / "nowhere", "one")


def test_the_protocol_needs_no_torch():
    names = "commit storage lock manifest retention config"
    code = (
        f"import sys; [__import__('lmtrain.checkpoint.' + n) for n in '{names}'.split()]; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
