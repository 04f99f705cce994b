"""What a person sees of a run on rank 0: a banner, a line every few steps, a progress bar on a terminal, a summary."""

from __future__ import annotations

import math
import statistics
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TextIO

from rich import box
from rich.console import Console as Screen
from rich.control import strip_control_codes
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

PLAIN_WIDTH = 120
ETA_STEPS = 100
TOKENS_OF = "source_tokens."


class _Screen(Screen):
    """rich would end the process, with 1, when the reader of a pipe goes away."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class Console:
    """Prints to ``stream``; a view of the metrics rows that never stops training (a closed stream ends the printing).

    On a terminal a progress bar stays below the lines (colourless with NO_COLOR); elsewhere output is plain lines, each
    flushed, without carriage returns or escape codes. Close it (or leave the ``with``) before the process ends.
    """

    def __init__(self, total_steps: int, log_every: int, stream: TextIO | None = None) -> None:
        self.total_steps, self.log_every = total_steps, log_every
        stream = sys.stdout if stream is None else stream
        self._terminal = stream.isatty()
        self._screen: Screen | None = _Screen(
            file=stream,
            force_jupyter=False,
            width=None if self._terminal else PLAIN_WIDTH,
            highlight=False,
            markup=False,
            emoji=False,
        )
        self._box = box.ASCII if self._screen.no_color or not self._terminal else box.ROUNDED
        self._seconds: deque[float] = deque(maxlen=ETA_STEPS)
        self._progress: Progress | None = None
        self._first = True

    def banner(self, lines: Sequence[str]) -> None:
        """The start of a run in words, boxed: what, where, how long, resumed from what."""
        self._print(Panel.fit(_clean("\n".join(lines)), box=self._box))

    def summary(self, lines: Sequence[str]) -> None:
        """The end of a run, boxed like the banner; the progress bar is gone."""
        self.close()
        self.banner(lines)

    def note(self, text: str) -> None:
        """One line on its own: an evaluation, a checkpoint, a warning."""
        self._print(_clean(text))

    def step(self, row: Mapping[str, Any], seconds: float) -> None:
        """Takes the metrics row of a finished step and the time it took, evaluation and saving excluded.

        Prints the first step of this process, the last of the run, and every ``log_every``-th.
        """
        self._seconds.append(seconds)
        left = max(self.total_steps - row["step"], 0) * statistics.median(self._seconds)
        if self._first or left == 0 or row["step"] % self.log_every == 0:
            self._print(_clean(step_line(row, self.total_steps, seconds, left)))
        self._first = False
        self._advance(row["step"], left)

    def close(self) -> None:
        """Takes the progress bar away and restores the terminal."""
        if self._progress is not None:
            self._guarded(self._progress.stop)
            self._progress = None

    def __enter__(self) -> Console:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _advance(self, step: int, left: float) -> None:
        if not self._terminal or self._screen is None:
            return
        if self._progress is None:
            columns = (BarColumn(), TaskProgressColumn(), TextColumn("eta {task.fields[eta]}"))
            self._progress = Progress(*columns, console=self._screen, transient=True, refresh_per_second=2)
            self._progress.add_task("", total=self.total_steps, eta=duration(left))
            self._guarded(self._progress.start)
        self._progress.update(self._progress.task_ids[0], completed=step, eta=duration(left))

    def _print(self, content: Panel | Text) -> None:
        if (screen := self._screen) is not None:
            self._guarded(lambda: screen.print(content, soft_wrap=isinstance(content, Text)))

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError:
            self._screen = None


def step_line(row: Mapping[str, Any], total_steps: int, seconds: float, left: float) -> str:
    """The console line of a metrics row; ``seconds`` the step took, ``left`` until the end of the run."""
    mfu = "n/a" if row["mfu"] is None else f"{row['mfu']:.1%}"
    wait = row["data_wait_seconds"] / seconds if seconds > 0 else 0.0
    parts = [
        f"step {row['step']}/{total_steps}",
        f"loss {_number(row['loss'], '.4f')}",
        f"grad_norm {_number(row['grad_norm'], '.2f')}",
        f"lr {row['lr']:.1e}",
        f"tok/s {scaled(row['tokens_per_second'], 1000)}",
        f"mfu {mfu}",
        f"mem {scaled(row['memory_bytes'], 1024)}",
        f"data_wait {wait:.1%}",
        f"eta {duration(left)}",
    ]
    if row.get("skipped"):
        parts.append(f"SKIPPED: {row['skipped']}")
    return "  ".join(parts)


def sources_line(row: Mapping[str, Any]) -> str:
    """How much of every source was read up to a metrics row, how often, and what that is worth where it is less."""
    parts = []
    for name in (key.removeprefix(TOKENS_OF) for key in row if key.startswith(TOKENS_OF)):
        tokens, epochs = row[f"{TOKENS_OF}{name}"], row[f"source_epochs.{name}"]
        worth = f", worth {scaled(row[f'source_effective_tokens.{name}'], 1000)} new tokens" if epochs > 1 else ""
        parts.append(f"{name} {scaled(tokens, 1000)} tokens ({epochs:.2f} epochs{worth})")
    return f"sources after step {row['step']}: {'; '.join(parts)}"


def scaled(value: float, base: int) -> str:
    """``21.4k``, ``1.2G``: powers of 1000 (counts) or of 1024 (bytes)."""
    power = 0
    # 999.95 would print as 1000.0.
    while abs(value) >= base - 0.05 and power < 4:
        value, power = value / base, power + 1
    return f"{value:.1f}{' kMGT'[power].strip()}"


def duration(seconds: float) -> str:
    """Two units at most: ``12s``, ``1m04s``, ``3h20m``, ``1d04h``."""
    whole = math.ceil(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days}d{hours % 24:02d}h"
    if hours:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


def _number(value: float | None, form: str) -> str:
    return "n/a" if value is None else format(value, form)


def _clean(text: str) -> Text:
    """Text from recipes and file names, without the control codes that would steer a terminal."""
    return Text(strip_control_codes(text).replace("\x1b", ""))
