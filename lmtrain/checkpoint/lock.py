"""One writer per run folder: ``run.lock``, held by the kernel for as long as the process lives (stdlib only)."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lmtrain.errors import StorageError

LOCK = "run.lock"


def holder(run_dir: Path) -> dict[str, Any] | None:
    """Who wrote run.lock last: ``{host, pid, start_id, attempt, since}``, alive or not; None if nobody ever did."""
    try:
        value = json.loads((run_dir / LOCK).read_text(encoding="utf-8") or "{}")
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def describe(held: dict[str, Any]) -> str:
    """``host H, pid P, since T`` for a message."""
    since = held.get("since")
    when = datetime.fromtimestamp(since, UTC).isoformat(timespec="seconds") if isinstance(since, int | float) else "?"
    return f"host {held.get('host', '?')}, pid {held.get('pid', '?')}, since {when}"


class RunLock:
    """An exclusive lock on a run folder; ``release`` or the end of the process gives it back."""

    def __init__(self, run_dir: Path, start_id: str, attempt: int = 0) -> None:
        """Take the lock. Raises StorageError naming the holder (host, pid, since) if another process has it."""
        self.run_dir, self.start_id = run_dir, start_id
        path = run_dir / LOCK
        try:
            # close-on-exec is Python's default; a child that kept the descriptor would keep the lock
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StorageError(f"{path} cannot be opened by uid {os.getuid()}: {error.strerror}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._fd)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise StorageError(f"{path}: this file system has no file locks ({error.strerror})") from error
            raise StorageError(f"{run_dir} is in use by another run: {describe(holder(run_dir) or {})}") from error
        os.register_at_fork(after_in_child=self._close)
        held = {"host": socket.gethostname(), "pid": os.getpid(), "start_id": start_id, "attempt": attempt}
        text = json.dumps({**held, "since": time.time()}) + "\n"
        # written in place: a rename would give the path another inode than the one that is locked
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, text.encode(), 0)
        os.fsync(self._fd)

    def still_mine(self) -> bool:
        """Whether run.lock is still the file we locked and names our start (nobody deleted and retook it)."""
        try:
            ours, there = os.fstat(self._fd), os.stat(self.run_dir / LOCK)
        except OSError:
            return False
        return os.path.samestat(ours, there) and (holder(self.run_dir) or {}).get("start_id") == self.start_id

    def release(self) -> None:
        """Give the lock back; the file stays, with the last holder's name in it."""
        self._close()

    def _close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._fd)
        self._fd = -1


class Fence:
    """The check a writer makes before it publishes: does run.lock still name its start?"""

    def __init__(self, run_dir: Path, start_id: str) -> None:
        self.run_dir, self.start_id = run_dir, start_id
        self.locked = (holder(run_dir) or {}).get("start_id") == start_id

    def check(self) -> None:
        """Raise StorageError if another start holds run.lock, or if ours is gone. No run.lock at all is no fence."""
        held = holder(self.run_dir)
        if held is None and not self.locked:
            return
        if held is None or held.get("start_id") != self.start_id:
            other = f"taken by {describe(held)}" if held else "gone"
            raise StorageError(f"{self.run_dir / LOCK} is not ours ({other}): not writing beside another run")
