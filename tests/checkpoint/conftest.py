"""What the checkpoint tests share: a small state, and saving it."""

from __future__ import annotations

import errno
import logging
import os
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from lmtrain.checkpoint.checkpointer import Checkpointer
from lmtrain.checkpoint.config import CheckpointConfig


@dataclass
class Node:
    """A file (``entries`` None) or a directory, as it is now and as it is on the disk since its last sync."""

    entries: dict[str, Node] | None = None
    data: bytearray = field(default_factory=bytearray)
    durable_entries: dict[str, Node] = field(default_factory=dict)
    durable_data: bytes = b""


class MemoryFile:
    def __init__(self, storage: MemoryStorage, path: Path) -> None:
        self.storage, self.path = storage, path

    def write(self, data: bytes) -> None:
        self.storage.do("write", self.path, bytes(data))

    def fsync(self) -> None:
        self.storage.do("fsync", self.path)

    def close(self) -> None:
        pass


class MemoryStorage:
    """A file system in memory that logs every operation, and knows which bytes and names a power cut would leave."""

    def __init__(self, log: Iterable[tuple[Any, ...]] = ()) -> None:
        self.root = Node(entries={})
        self.log: list[tuple[Any, ...]] = []
        for operation in log:
            self.do(*operation)

    @classmethod
    def copy_of(cls, path: Path) -> MemoryStorage:
        storage = cls()
        storage.makedirs(path)
        for file in sorted(path.rglob("*")):
            if file.is_dir():
                storage.mkdir(file)
            else:
                storage.create(file).write(file.read_bytes())
        return storage

    def makedirs(self, path: Path) -> None:
        """``path`` and its parents, already on the disk."""
        node = self.root
        for part in path.parts[1:]:
            node = node.entries.setdefault(part, Node(entries={}))
        self.sync_all(self.root)

    def sync_all(self, node: Node) -> None:
        node.durable_data, node.durable_entries = bytes(node.data), dict(node.entries or {})
        for child in (node.entries or {}).values():
            self.sync_all(child)

    def node(self, path: Path) -> Node:
        node = self.root
        for part in path.parts[1:]:
            if node.entries is None or part not in node.entries:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            node = node.entries[part]
        return node

    def do(self, operation: str, path: Path, *rest: Any) -> None:
        parent = self.node(path.parent).entries
        if operation in ("mkdir", "create"):
            if path.name in parent:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
            parent[path.name] = Node(entries={} if operation == "mkdir" else None)
        elif operation == "write":
            self.node(path).data += rest[0]
        elif operation == "fsync":
            self.node(path).durable_data = bytes(self.node(path).data)
        elif operation == "fsync_dir":
            self.node(path).durable_entries = dict(self.node(path).entries)
        elif operation == "rename":
            self.node(rest[0].parent).entries[rest[0].name] = self.node(path)
            del parent[path.name]
        elif operation == "remove":
            # what it holds goes first: a cut may leave the directory without its files
            (self.node(path).entries or {}).clear()
            del parent[path.name]
        self.log.append((operation, path, *rest))

    def mkdir(self, path: Path) -> None:
        self.do("mkdir", path)

    def create(self, path: Path) -> MemoryFile:
        self.do("create", path)
        return MemoryFile(self, path)

    def fsync_dir(self, path: Path) -> None:
        self.do("fsync_dir", path)

    def rename(self, source: Path, target: Path) -> None:
        self.do("rename", source, target)

    def remove(self, path: Path) -> None:
        self.do("remove", path)

    def content(self, path: Path) -> bytearray:
        return self.node(path).data

    def listdir(self, path: Path) -> list[str]:
        return sorted(self.node(path).entries)

    def read(self, path: Path, offset: int = 0, size: int | None = None) -> bytearray:
        return self.node(path).data[offset : None if size is None else offset + size]

    def exists(self, path: Path) -> bool:
        try:
            return self.node(path) is not None
        except FileNotFoundError:
            return False

    def is_dir(self, path: Path) -> bool:
        return self.exists(path) and self.node(path).entries is not None

    def size(self, path: Path) -> int:
        return len(self.node(path).data)

    def free(self, path: Path) -> int:
        return 1 << 40

    def after_power_cut(self, names: str, data: str, rng: random.Random) -> MemoryStorage:
        """What the disk holds after a cut. names: kept | lost | mixed, data: kept | lost | part | zeros | mixed."""
        survivor = MemoryStorage()
        survivor.root = self._survive(self.root, names, data, rng)
        return survivor

    def _survive(self, node: Node, names: str, data: str, rng: random.Random) -> Node:
        if node.entries is None:
            unsynced = len(node.data) - len(node.durable_data)
            kind = rng.choice(["kept", "lost", "part", "zeros"]) if data == "mixed" else data
            tail = {
                "kept": node.data[len(node.durable_data) :],
                "lost": b"",
                "part": node.data[len(node.durable_data) :][: rng.randrange(unsynced) if unsynced else 0],
                "zeros": bytes(unsynced),
            }[kind]
            return Node(data=bytearray(node.durable_data + bytes(tail)))
        kept: dict[str, Node] = {}
        for name in sorted(node.entries.keys() | node.durable_entries.keys()):
            now, before = node.entries.get(name), node.durable_entries.get(name)
            child = {"kept": now, "lost": before, "mixed": rng.choice([now, before])}[names]
            if child is not None:
                kept[name] = self._survive(child, names, data, rng)
        return Node(entries=kept)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture(autouse=True)
def no_debug_lines_of_dcp(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)


@pytest.fixture
def memory() -> type[MemoryStorage]:
    return MemoryStorage


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Checkpointer]:
    """``make(storage=, keep_last=, ...)``: a Checkpointer of the run in tmp_path."""

    def build(run_dir: Path = tmp_path, storage: Any = None, start_id: str = "one", **cfg: Any) -> Checkpointer:
        settings = CheckpointConfig(**{"asynchronous": False, "keep_last": 9, **cfg})
        return Checkpointer(run_dir, settings, start_id=start_id, identity={"mesh": {"dp": 1}}, storage=storage)

    return build


@pytest.fixture
def state() -> Callable[[float], dict[str, torch.Tensor]]:
    def of(value: float) -> dict[str, torch.Tensor]:
        return {"model.w": torch.full((2, 3), float(value)), "optimizer.step.w": torch.tensor(int(value))}

    return of


@pytest.fixture
def save(state: Callable[[float], dict[str, torch.Tensor]]) -> Callable[[Checkpointer, int], Path]:
    """``save(checkpointer, step)``: a checkpoint whose weights are all ``step``."""

    def run(checkpointer: Checkpointer, step: int) -> Path:
        checkpointer.save(step, state(step), {"loop": {"tokens": 10 * step}})
        checkpointer.wait()
        result = checkpointer.poll()
        assert result is not None and result.error is None, result
        return result.path

    return run
