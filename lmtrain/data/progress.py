"""How far a long pass over text has come: a bar on a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import Progress as Bar

LOG_SECONDS = 30.0

log = logging.getLogger(__name__)


class Progress:
    """Counts bytes of text under a label. ``total``: bytes expected, None if not known."""

    def __init__(self, label: str, total: int | None) -> None:
        self.label = label
        self.total = total
        self.done = 0
        self._started = self._logged = time.monotonic()
        self._bar = Bar(console=Console(stderr=True), transient=True) if sys.stderr.isatty() else None
        self._task = self._bar.add_task(label, total=total) if self._bar else None

    def advance(self, size: int) -> None:
        self.done += size
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done)
        elif time.monotonic() - self._logged > LOG_SECONDS:
            self._logged = time.monotonic()
            of = f" of about {self.total / 1e6:.0f}" if self.total else ""
            log.info("%s: %.0f%s MB", self.label, self.done / 1e6, of)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is None:
            log.info("%s: %.1f MB of text in %.1f s", self.label, self.done / 1e6, time.monotonic() - self._started)
