"""``... | head``: a program whose reader went away ends as others do, and one with another trouble tells it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lmtrain.pipe import ends_with_its_reader

ROOT = Path(__file__).parents[1]


def test_a_verb_without_a_reader_ends_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(ROOT / "launch" / "prepare.py"), "--help"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=environment, check=False)
    os.close(writer)
    assert (run.returncode, run.stderr) == (-signal.SIGPIPE, b"")


def test_every_verb_does() -> None:
    for path in (ROOT / "launch").glob("[!_]*.py"):
        inside = ROOT / "lmtrain" / "pretrain" / "command.py" if path.stem == "pretrain" else path
        assert "with ends_with_its_reader():" in inside.read_text(encoding="utf-8"), path


def test_another_broken_pipe_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BrokenPipeError, match="a worker"), ends_with_its_reader():
        raise BrokenPipeError("a worker")
