"""Ranks on this machine for tests: processes started once, which run many checks over gloo.

Importing torch dominates a launch, so processes stay; every check gets a fresh world.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=60)
Check = Callable[..., Any]


class Ranks:
    """``run(world, check, *args)`` calls ``check(*args)`` on every rank of a fresh world and returns all results.

    ``check`` must be importable (a function of a module); arguments and results are pickled. Processes are started when
    first needed and reused. When a rank fails all of them are ended, and its traceback is raised.
    """

    def __init__(self) -> None:
        self.workers: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []

    def run(self, world: int, check: Check, *args: Any) -> list[Any]:
        return self.run_each(world, check, [args] * world)

    def run_each(self, world: int, check: Check, args: list[tuple[Any, ...]]) -> list[Any]:
        """As ``run`` with arguments of its own for every rank."""
        self._submit(world, [(world, rank, check, args[rank]) for rank in range(world)])
        return self._collect(world)

    def run_alone(self, check: Check, args: list[tuple[Any, ...]], processes: int = 2) -> list[Any]:
        """``check(*a)`` in a world of its own for every ``a``, side by side in a few processes; results in order."""
        results = []
        for first in range(0, len(args), processes):
            batch = args[first : first + processes]
            self._submit(len(batch), [(1, 0, check, a) for a in batch])
            results += self._collect(len(batch))
        return results

    def close(self) -> None:
        for process, connection in self.workers:
            connection.close()
            process.terminate()
            process.join()
        self.workers = []

    def _submit(self, count: int, jobs: list[tuple[int, int, Check, tuple[Any, ...]]]) -> None:
        spawn = multiprocessing.get_context("spawn")
        while len(self.workers) < count:
            here, there = spawn.Pipe()
            process = spawn.Process(target=_work, args=(there,), daemon=True)
            process.start()
            there.close()
            self.workers.append((process, here))
        descriptor, store = tempfile.mkstemp(prefix="lmtrain-ranks-")
        os.close(descriptor)
        self.store = Path(store)
        for index, ((_, connection), job) in enumerate(zip(self.workers, jobs, strict=False)):
            # ranks of one world meet in one file; worlds of one rank each have their own
            _send(connection, (f"{store}.{index if job[0] == 1 else 'world'}", *job))

    def _collect(self, count: int) -> list[Any]:
        answers: list[tuple[bool, Any]] = []
        for process, connection in self.workers[:count]:
            try:
                answers.append(_receive(connection))
            except EOFError:
                process.join()
                answers.append((False, f"a rank died with exit code {process.exitcode}"))
        for path in self.store.parent.glob(f"{self.store.name}*"):
            path.unlink()
        failures = [answer for ok, answer in answers if not ok]
        if failures:
            self.close()
            # a rank whose peer failed says only that the connection closed
            raise AssertionError(min(failures, key=lambda text: "onnection closed by peer" in text))
        return [answer for _, answer in answers]


def _send(connection: Connection, value: Any) -> None:
    """By value: ``Connection.send`` would put tensors into memory that both sides share."""
    connection.send_bytes(pickle.dumps(value))


def _receive(connection: Connection) -> Any:
    return pickle.loads(connection.recv_bytes())


def _work(connection: Connection) -> None:
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError):
        while True:
            store, world, rank, check, args = _receive(connection)
            try:
                dist.init_process_group(
                    "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=TIMEOUT
                )
                answer = (True, check(*args))
                dist.barrier()  # who leaves while a peer still connects breaks the peer's connection
            except BaseException:
                answer = (False, traceback.format_exc())
            if dist.is_initialized():
                dist.destroy_process_group()
            _send(connection, answer)
