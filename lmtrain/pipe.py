"""What a program does when the reader of its output goes away, as in ``inspect PATH | head``: it ends, quietly."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ends_with_its_reader() -> Iterator[None]:
    """Whoever prints in here to a pipe that nobody reads ends as other programs do: by SIGPIPE, without a word."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        if not _nobody_reads():
            raise  # it was another pipe
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGPIPE)


def _nobody_reads() -> bool:
    found = select.poll()
    found.register(sys.stdout.fileno(), 0)  # errors are told unasked
    return any(event & select.POLLERR for _, event in found.poll(0))
