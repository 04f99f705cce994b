"""Workers end with the process that started them, even when it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from lmtrain.data.ingest.reading import Chunk, Line, SourceOptions
from lmtrain.data.processes import Workers
from lmtrain.errors import DataError, StorageError

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


def kill_own_process(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_killed_worker_is_one_line() -> None:
    with Workers(2, "lmtrain.data.ingest.reading") as workers:
        results = workers.ordered(kill_own_process, ((i, i) for i in range(9)))
        with pytest.raises(StorageError, match=r"^one of 2 worker processes was killed.* memory .*workers=1$"):
            list(results)
        with pytest.raises(StorageError, match="was killed"):
            list(workers.ordered(abs, iter([(0, 0)])))


def test_workers_do_one_kind_of_work_after_another_and_give_errors_in_order() -> None:
    def chunk(*lines: bytes) -> Chunk:
        return Chunk("a", SourceOptions("x"), 0, 0, [Line(line, "x.jsonl", i, 0) for i, line in enumerate(lines, 1)])

    chunks = [chunk(b'{"text": "a"}'), chunk(b'{"text": "b"}', b'{"text": '), chunk(b'{"other": 1}')]
    for count in (1, 2):
        with Workers(count, "lmtrain.data.ingest.reading") as workers:
            assert list(workers.ordered(abs, ((i, -i) for i in range(9)))) == [(i, i) for i in range(9)]
            parsed = workers.ordered(Chunk.documents, enumerate(chunks))
            assert [document.text for document in next(parsed)[1]] == ["a"]
            with pytest.raises(DataError, match=r"^x\.jsonl:2: malformed JSON"):
                next(parsed)
