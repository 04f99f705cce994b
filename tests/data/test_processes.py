"""Workers end with the process that started them, even when it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

PARENT = """
import os, sys
from lmtrain.data.processes import die_with_parent
parent = os.getpid()
if os.fork() == 0:
    die_with_parent(parent)
    os.write(int(sys.argv[1]), b"up")
    while True: os.read(0, 1)
while True: os.read(0, 1)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_worker_ends_when_its_parent_is_killed() -> None:
    ours, theirs = os.pipe()
    stdin, keep_open = os.pipe()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(theirs)], stdin=stdin, pass_fds=[theirs], env=environment
    )
    os.close(theirs)
    assert os.read(ours, 2) == b"up"
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert os.read(ours, 1) == b""  # the worker held the other end: it is gone
    for end in (ours, stdin, keep_open):
        os.close(end)
