"""Stop requests from signals, and workers that do not outlive their launcher."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from lmtrain.errors import EXIT_INTERRUPTED

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
BURST_SECONDS = 1.0
END = b"\0"
PR_SET_PDEATHSIG = 1


class StopRequest:
    """While entered, SIGTERM, SIGINT and SIGUSR1 only set ``requested``; ``reason`` is the first signal's name.

    Repeats are harmless, since a launcher and a scheduler may both deliver the same stop. The exception is a SIGINT
    more than a second after the first: the process ends at once with 130, even if the main thread sits in a collective.
    Enter it in the main thread. Forked loader processes inherit the flag-only handlers: their parent ends them.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a stop was asked for."""
        return self.reason is not None

    def __enter__(self) -> StopRequest:
        self._read_fd, self._write_fd = os.pipe()
        os.set_blocking(self._write_fd, False)
        self._previous_fd = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        self._watcher = threading.Thread(target=self._watch, name="second-interrupt", daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        # Not by closing the pipe: a forked loader process may hold it open.
        os.write(self._write_fd, END)
        self._watcher.join()
        os.close(self._write_fd)
        os.close(self._read_fd)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.reason is None:
            self.reason = signal.Signals(number).name

    def _watch(self) -> None:
        """Python runs handlers only between bytecodes of the main thread; the wake-up pipe is written at once."""
        first: float | None = None
        while END not in (received := os.read(self._read_fd, 64)):
            if signal.SIGINT in received:
                now = time.monotonic()
                first = now if first is None else first
                if now - first > BURST_SECONDS:
                    os._exit(EXIT_INTERRUPTED)


def die_with_parent() -> None:
    """On Linux, have the kernel SIGKILL this process when the one that started it ends.

    torchrun leaves its workers running when it is killed: they would go on writing checkpoints beside the next job.
    Does nothing elsewhere, nor without torchrun: what ``nohup python launch/pretrain.py &`` started outlives its shell.
    """
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
    # The parent may have died before the kernel knew of the wish.
    if os.getppid() != parent:
        os._exit(EXIT_INTERRUPTED)
