"""Worker processes that do not outlive the process that started them, and give results in order."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from functools import lru_cache
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from lmtrain.errors import StorageError

Key = TypeVar("Key")
Task = TypeVar("Task")
Result = TypeVar("Result")


def die_with_parent(parent: int) -> None:
    """Called first thing in a worker: let the kernel end it when process ``parent`` ends, however that happens."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)  # it ended before the call


class Workers:
    """``count`` processes for several kinds of work, to be used in a ``with``; of one, this process is the one.

    They start at once, while the caller does something else. module: what they import then. Where one of them is
    killed, ``ordered`` raises StorageError: as a rule the machine had no memory left.
    """

    def __init__(self, count: int, module: str) -> None:
        self.count = count
        self._open = ExitStack()
        self._kinds = 0
        if count > 1:
            self._folder = Path(self._open.enter_context(TemporaryDirectory()))
            pool = ProcessPoolExecutor(
                count, get_context("spawn"), initializer=_start_worker, initargs=(os.getpid(), module)
            )
            self._pool = self._open.enter_context(pool)
            for _ in range(count):  # a process is started when there is something to do
                self._pool.submit(os.getpid)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def ordered(
        self, work: Callable[[Task], Result], tasks: Iterator[tuple[Key, Task]]
    ) -> Iterator[tuple[Key, Result]]:
        """Each key with ``work(task)``, in order, whatever the number of workers; a few are under way at a time.

        work: with more than one worker it is unpickled once per process.
        """
        if self.count == 1:
            for key, task in tasks:
                yield key, work(task)
            return
        try:
            yield from self._by_processes(work, tasks)
        except BrokenProcessPool:
            raise StorageError(
                f"one of {self.count} worker processes was killed, most likely because the machine ran out of memory "
                f"(dmesg tells); take fewer: workers={max(1, self.count // 2)}"
            ) from None

    def _by_processes(
        self, work: Callable[[Task], Result], tasks: Iterator[tuple[Key, Task]]
    ) -> Iterator[tuple[Key, Result]]:
        self._kinds += 1
        path = self._folder / str(self._kinds)
        path.write_bytes(ForkingPickler.dumps(work))
        waiting: deque[tuple[Key, Future[Result]]] = deque()
        for key, task in tasks:
            waiting.append((key, self._pool.submit(_work, path, task)))
            if len(waiting) > 2 * self.count:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()


def _start_worker(parent: int, module: str) -> None:
    die_with_parent(parent)
    import_module(module)


def _work(path: Path, task: Any) -> Any:
    return _unpickled(path)(task)


@lru_cache(maxsize=1)
def _unpickled(path: Path) -> Any:
    # of the parent's own private folder, and as the pool itself takes its tasks
    return ForkingPickler.loads(path.read_bytes())
