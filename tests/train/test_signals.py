"""Signals, each in a process of its own; every wait is a poll with a deadline."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import lmtrain

ROOT = Path(lmtrain.__file__).parents[1]
DEADLINE = 20.0
STOPPABLE = """
import time
from lmtrain.train.signals import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print(stop.reason, flush=True)
    {then}
print("left", flush=True)
"""
# As in a collective that never returns: the main thread sits in C code and runs no Python handler.
STUCK = """
import ctypes
from lmtrain.train.signals import StopRequest
with StopRequest() as stop:
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    print("ready", flush=True)
    libc.pthread_mutex_lock(mutex)
"""
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
print(child.stdout.readline().strip(), flush=True)
time.sleep(1000)
"""
CHILD = """
import os, time
from lmtrain.train.signals import die_with_parent
die_with_parent()
print(os.getpid(), flush=True)
time.sleep(1000)
"""


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "nothing happened before the deadline"
        time.sleep(0.02)


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def run(code: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        environment = {k: v for k, v in os.environ.items() if k != "TORCHELASTIC_RUN_ID"}
        environment |= {"PYTHONPATH": str(ROOT), **variables}
        command = [sys.executable, "-c", code, *arguments]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_only_sets_the_flag_however_often(
    start: Callable[..., subprocess.Popen[str]], number: signal.Signals
) -> None:
    process = start(STOPPABLE.format(then="time.sleep(0.2)"))
    assert line(process) == "ready"
    for _ in range(3):
        process.send_signal(number)
    assert line(process) == number.name
    assert process.communicate(timeout=DEADLINE)[0].split() == ["left"] and process.returncode == 0


def test_repeated_sigterm_is_harmless_also_much_later(start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start(STOPPABLE.format(then="time.sleep(1.5)"))
    assert line(process) == "ready"
    process.send_signal(signal.SIGTERM)
    assert line(process) == "SIGTERM"
    begun = time.monotonic()
    wait_for(lambda: time.monotonic() - begun > 1.1)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=DEADLINE)[0].split() == ["left"] and process.returncode == 0


@pytest.mark.parametrize("code", [STOPPABLE.format(then="time.sleep(1000)"), STUCK])
def test_a_second_interrupt_ends_the_process_even_inside_c_code(
    start: Callable[..., subprocess.Popen[str]], code: str
) -> None:
    process = start(code)
    assert line(process) == "ready"
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    wait_for(lambda: time.monotonic() - begun > 1.1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=DEADLINE) == 130


def test_a_worker_dies_with_its_torchrun(start: Callable[..., subprocess.Popen[str]]) -> None:
    parent = start(PARENT, CHILD, TORCHELASTIC_RUN_ID="x")
    child = psutil.Process(int(line(parent)))
    parent.kill()
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_without_torchrun_a_run_outlives_its_shell(start: Callable[..., subprocess.Popen[str]]) -> None:
    parent = start(PARENT, CHILD)
    child = psutil.Process(int(line(parent)))
    parent.kill()
    wait_for(lambda: child.ppid() != parent.pid)
    assert child.is_running() and child.status() != psutil.STATUS_ZOMBIE
    child.kill()


def test_handlers_come_back() -> None:
    from lmtrain.train.signals import StopRequest

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_for(lambda: stop.requested)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
