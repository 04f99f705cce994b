"""The console: lines on a pipe, the bar on a terminal, and a stream that goes away."""

import contextlib
import io
import os
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest

from lmtrain.train.console import Console, duration, scaled, sources_line, step_line

ROW: dict[str, Any] = {
    "step": 120, "loss": 3.21412, "grad_norm": 0.412, "lr": 3e-4, "tokens_per_second": 21400.0, "mfu": None,
    "memory_bytes": int(1.2 * 2**30), "data_wait_seconds": 0.003,
}  # fmt: skip
LINE = (
    "step 120/750  loss 3.2141  grad_norm 0.41  lr 3.0e-04  tok/s 21.4k  mfu n/a  mem 1.2G  data_wait 0.3%  eta 1m04s"
)


def test_the_line() -> None:
    assert step_line(ROW, 750, 1.0, 63.2) == LINE
    skipped = {**ROW, "loss": None, "grad_norm": None, "mfu": 0.431, "skipped": "non-finite gradient norm"}
    assert "loss n/a  grad_norm n/a" in step_line(skipped, 750, 1.0, 0)
    assert step_line(skipped, 750, 1.0, 0).endswith("SKIPPED: non-finite gradient norm") and "mfu 43.1%" in step_line(
        skipped, 750, 1, 0
    )


def test_the_line_of_the_sources() -> None:
    row = {
        **{"step": 40, "source_tokens.code": 1_234_567, "source_epochs.code": 0.34},
        **{"source_tokens.a.b": 8000, "source_epochs.a.b": 4.0, "source_effective_tokens.a.b": 7460.0},
        "source_effective_tokens.code": 1_234_567.0,
    }
    assert sources_line(row) == (
        "sources after step 40: code 1.2M tokens (0.34 epochs); a.b 8.0k tokens (4.00 epochs, worth 7.5k new tokens)"
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.2, "1m00s"), (3599, "59m59s"), (12000, "3h20m"), (100800, "1d04h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "base", "text"),
    [(0, 1000, "0.0"), (999.96, 1000, "1.0k"), (21400, 1000, "21.4k"), (85 * 2**30, 1024, "85.0G")],
)
def test_scales(value: float, base: int, text: str) -> None:
    assert scaled(value, base) == text


def run(stream: Any, log_every: int = 2) -> None:
    with Console(6, log_every, stream) as console:
        console.banner(["lmtrain trains \x1b[31m[bold]a model[/bold]", "x" * 300])
        for step in range(1, 7):
            console.step({**ROW, "step": step}, 1.0)
        console.note("checkpoint \rstep-00000006")
        console.summary(["done in 6s"])


def test_plain_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    run(stream)
    text = stream.getvalue()
    assert "\r" not in text and "\x1b" not in text
    assert [int(step) for step in re.findall(r"^step (\d+)/6  loss", text, re.M)] == [1, 2, 4, 6]
    assert "[bold]a model[/bold]" in text and "checkpoint step-00000006\n" in text and "| done in 6s |" in text
    assert all(len(line) <= 120 for line in text.splitlines())
    assert re.search(r"^step 4/6 .* eta 2s$", text, re.M)


def test_each_line_is_flushed() -> None:
    class Stream(io.StringIO):
        unflushed = 0
        seen = 0

        def write(self, text: str) -> int:
            self.unflushed += 1
            return super().write(text)

        def flush(self) -> None:
            self.unflushed, self.seen = 0, self.seen + 1

    stream = Stream()
    console = Console(6, 1, stream)
    console.note("one")
    assert stream.unflushed == 0 and stream.seen >= 1


def test_eta_is_a_median_so_one_slow_step_does_not_move_it() -> None:
    stream = io.StringIO()
    console = Console(106, 100, stream)
    for step in range(1, 101):
        console.step({**ROW, "step": step}, 500.0 if step == 50 else 2.0)
    assert re.search(r"^step 100/106 .* eta 12s$", stream.getvalue(), re.M)


def on_a_terminal(action: Callable[[Any], None]) -> str:
    """What ``action`` writes to a pseudo-terminal."""
    outer, inner = os.openpty()
    received = bytearray()

    def read() -> None:
        # Linux ends a closed pseudo-terminal with EIO.
        with contextlib.suppress(OSError):
            while part := os.read(outer, 65536):
                received.extend(part)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(inner, "w", encoding="utf-8") as stream:
        action(stream)
    reader.join()
    os.close(outer)
    return received.decode()


@pytest.mark.parametrize("no_color", [False, True])
def test_a_terminal_has_a_bar_below_the_lines(monkeypatch: pytest.MonkeyPatch, no_color: bool) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "130")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    text = on_a_terminal(run)
    assert "100%" in text and "eta 0s" in text and "\x1b[?25h" in text
    assert "step 4/6  loss" in text and "\x1b[31m[bold]a model" not in text
    coloured = re.search(r"\x1b\[[\d;]*3[0-8][;m]", text) is not None
    assert coloured is not no_color and ("╭" in text) is not no_color


def test_a_closed_stream_does_not_stop_training() -> None:
    read, write = os.pipe()
    os.close(read)
    stream = os.fdopen(write, "w", encoding="utf-8")
    console = Console(6, 1, stream)
    for step in range(1, 4):
        console.step({**ROW, "step": step}, 1.0)
    console.summary(["done"])
    # What is left in the buffer of the broken pipe would fail once more at garbage collection.
    with pytest.raises(BrokenPipeError):
        stream.close()
