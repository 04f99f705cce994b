"""A power cut after any operation of a save leaves the old or the new checkpoint, and after ``save`` returned the new.

The save runs once over a recording file system. Every prefix of its log is then cut off under every policy of what an
unsynced byte or name may become, and read by the resume of a fresh start. A directory named step-* is always whole.
The proof that this can fail: without any
single one of the syncs, it does.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lmtrain.checkpoint import commit
from lmtrain.checkpoint.checkpointer import HASHER
from lmtrain.errors import DataError

RUN = Path("/runs/x")
ROOT = RUN / "checkpoints"
POLICIES = list(product(["kept", "lost", "mixed"], ["kept", "lost", "part", "zeros", "mixed"]))


@dataclass
class History:
    """Two saves: the log, its length when each returned, and what each checkpoint holds."""

    log: list[tuple[Any, ...]]
    returned: list[int]
    content: dict[str, dict[str, bytes]]
    damaged: int | None  # where the log puts a directory of step 2 that does not verify on the disk


@pytest.fixture(params=[{"keep_last": 1}, {"keep_last": 9}, {"keep_last": 1, "damage": True}], ids=str)
def history(request, make, save, memory) -> History:
    settings = dict(request.param)
    damage = settings.pop("damage", False)
    storage = memory()
    storage.makedirs(RUN)
    checkpointer = make(run_dir=RUN, storage=storage, **settings)
    returned, content, damaged = [], {}, None
    for step in (1, 2):
        if damage and step == 2:
            # a step 2 of an earlier start that does not verify has to make place first
            storage.mkdir(ROOT / "step-00000002")
            damaged = len(storage.log)
            storage.fsync_dir(ROOT)
        path = save(checkpointer, step)
        returned.append(len(storage.log))
        content[path.name] = contents(storage, path)
    return History(storage.log, returned, content, damaged)


def contents(storage, path: Path) -> dict[str, bytes]:
    return {name: bytes(storage.content(path / name)) for name in storage.listdir(path)}


def fault(history: History, make, memory, log: list[Any], cut: int, policy: tuple[str, str], seed: int) -> str | None:
    """What is wrong with the disk after a power cut behind ``log[:cut]``; None if it is as promised."""
    storage = memory()
    storage.makedirs(RUN)
    for operation in log[:cut]:
        if operation is not None:
            storage.do(*operation)
    disk = storage.after_power_cut(*policy, random.Random(seed))
    try:
        found = make(run_dir=RUN, storage=disk, start_id="two").find("auto")
    except DataError as error:
        return f"refused to start: {error}"
    done = sum(cut >= length for length in history.returned)
    name = found.name if found else None
    if name not in [None, *history.content][done : done + 2]:
        return f"after {done} saves returned: {name}"
    if found and contents(disk, found) != history.content[name]:
        return f"{name}: other content"
    if history.damaged and done == 2 and not disk.exists(ROOT / "quarantine" / "step-00000002-0"):
        return "the damaged step 2 is lost"
    for path in commit.committed(disk, ROOT):
        if not (history.damaged and disk.listdir(path) == []):
            try:
                commit.verify(disk, path, "hash", HASHER)
            except DataError as error:
                return f"visible and not whole: {error}"
    return None


def cuts(history: History, policies: list[tuple[str, str]], num: int) -> list[tuple[int, tuple[str, str], int]]:
    seeds = {policy: range(num) if "mixed" in policy or "part" in policy else range(1) for policy in policies}
    return [(cut, policy, seed) for policy in policies for seed in seeds[policy] for cut in range(len(history.log) + 1)]


def test_every_cut_under_every_policy(history, make, memory):
    for cut, policy, seed in cuts(history, POLICIES, 3):
        wrong = fault(history, make, memory, history.log, cut, policy, seed)
        assert wrong is None, f"{wrong} (cut {cut} after {history.log[cut - 1]}, policy {policy}, seed {seed})"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 200), seed=st.integers(0, 2**32 - 1))
@example(cut=0, seed=0)
def test_random_mixtures(history, make, memory, cut, seed):
    cut %= len(history.log) + 1
    assert fault(history, make, memory, history.log, cut, ("mixed", "mixed"), seed) is None


def test_no_sync_is_superfluous(history, make, memory):
    syncs = [n for n, (name, *_) in enumerate(history.log) if name.startswith("fsync") and n != history.damaged]
    assert len(syncs) >= 2 * 7 + 1
    for missing in syncs:
        without = [None if n == missing else operation for n, operation in enumerate(history.log)]
        trials = cuts(history, [("kept", "lost"), ("lost", "kept"), ("mixed", "mixed")], 30)
        # from the end: a sync is missed most after save returned
        unseen = all(fault(history, make, memory, without, *trial) is None for trial in reversed(trials))
        assert not unseen, f"without {history.log[missing]} nothing goes wrong"
