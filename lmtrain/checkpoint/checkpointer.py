"""Save, find and load checkpoints of a run: what the training loop calls. All methods but ``poll`` are collective."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor

from lmtrain.checkpoint import commit, retention
from lmtrain.checkpoint import tensors as sharded
from lmtrain.checkpoint.config import CheckpointConfig
from lmtrain.checkpoint.lock import Fence
from lmtrain.checkpoint.manifest import (
    JSON,
    MANIFEST,
    FileRecord,
    Hasher,
    canonical,
    directory_name,
    manifest_files,
    read_json,
    read_manifest,
    step_of,
)
from lmtrain.checkpoint.ranks import Ranks, as_error, unwrapped
from lmtrain.checkpoint.storage import LocalStorage, Storage
from lmtrain.checkpoint.table import METADATA, Signature, check_table, compare, signature, signatures
from lmtrain.errors import DataError, LmtrainError, StorageError

HASHER = Hasher("xxh3_128", xxhash.xxh3_128)
MAX_FAILURES = 3
_RESERVED = {"format_version", "step", "tokens", "created_unix", "world", "torch", "start_id", "tensors", "files"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaveResult:
    """A save that ended. ``error`` is None if the checkpoint is on disk; else nothing of it is left."""

    step: int
    path: Path
    seconds: float  # from the call of save to the end, in the background or not
    stalled: float  # of these, seconds the call waited for the save before it
    bytes: int
    error: LmtrainError | None = None


class Checkpointer:
    """Checkpoints of the run in ``run_dir``. Take ``run.lock`` first: saving beside another start is refused.

    identity: facts for the manifest (mesh, recipe_sha256, fingerprints of model and tokenizer, kernel backends).
    process_group: gloo, used by nothing else, for saves run beside training; made here if None.
    """

    def __init__(
        self,
        run_dir: Path,
        cfg: CheckpointConfig,
        *,
        start_id: str,
        identity: Mapping[str, JSON],
        process_group: dist.ProcessGroup | None = None,
        storage: Storage | None = None,
    ) -> None:
        if clash := _RESERVED & identity.keys():
            raise ValueError(f"identity: {', '.join(sorted(clash))} are the manifest's own")
        self.run_dir, self.root = run_dir, run_dir / "checkpoints"
        self.cfg, self.start_id, self.identity = cfg, start_id, dict(identity)
        self.storage = LocalStorage() if storage is None else storage
        self.ranks = Ranks(process_group)
        self._thread: threading.Thread | None = None
        self._results: deque[SaveResult] = deque()
        self._failures: list[LmtrainError] = []
        self._verified: set[Path] = set()
        self._fence = Fence(run_dir, start_id)
        if self.ranks.rank == 0 and self._fence.locked:
            for name in commit.remove_leftovers(self.storage, self.root, start_id):
                logger.info("removed %s, left by a start that is gone", self.root / name)

    # ------------------------------------------------------------------------------------------------ save

    def save(self, step: int, tensors: Mapping[str, Tensor], documents: Mapping[str, JSON]) -> None:
        """Copy ``tensors`` and ``documents`` as they are now, then write them, in the background if so configured.

        Of the documents rank 0's are kept. Waits first for a save still under way; a save that fails is told by
        ``poll``. Raises TypeError for what cannot be stored, StorageError after the third failure in a row.
        """
        began = time.monotonic()
        self._join()
        stalled = time.monotonic() - began
        self._raise_if_failing()
        pieces = sharded.stage(tensors)
        encoded = {_document_file(name): canonical(value) for name, value in documents.items()}
        loop = documents.get("loop")
        tokens = loop.get("tokens") if isinstance(loop, Mapping) else None
        if stalled > 1:
            logger.warning("step %d waited %.1f s for the save before it: checkpoint.every is too small", step, stalled)

        work = partial(self._run, step, began, stalled, tokens, pieces, encoded)
        if self.cfg.asynchronous:
            # a daemon: a disk that hangs must not keep a dying process alive
            self._thread = threading.Thread(target=work, name=f"save-{step}", daemon=True)
            self._thread.start()
        else:
            work()
            self._raise_if_failing()

    def poll(self) -> SaveResult | None:
        """The oldest save that ended and was not told yet, without waiting. Raises StorageError after 3 failures."""
        self._raise_if_failing()
        return self._results.popleft() if self._results else None

    def wait(self) -> None:
        """Wait for a save under way. Raises StorageError after 3 failures in a row."""
        self._join()
        self._raise_if_failing()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _raise_if_failing(self) -> None:
        if len(self._failures) >= MAX_FAILURES:
            count, last, self._failures = len(self._failures), self._failures[-1], []
            raise StorageError(f"{count} saves in a row failed; the last: {last}")

    def _path(self, step: int) -> Path:
        return self.root / directory_name(step)

    def _run(
        self,
        step: int,
        began: float,
        stalled: float,
        tokens: JSON,
        pieces: Mapping[str, sharded.Piece],
        documents: Mapping[str, bytes],
    ) -> None:
        written, failure = 0, None
        try:
            written = self._write(step, tokens, pieces, documents)
        except Exception as raised:
            failure = as_error(raised, f"checkpoint of step {step}")
            logger.error("no checkpoint of step %d: %s", step, failure)
        self._failures = [*self._failures, failure] if failure else []
        seconds = time.monotonic() - began
        self._results.append(SaveResult(step, self._path(step), seconds, stalled, written, failure))

    def _write(
        self, step: int, tokens: JSON, pieces: Mapping[str, sharded.Piece], documents: Mapping[str, bytes]
    ) -> int:
        path = self.ranks.on_first(lambda: self._begin(step))
        try:
            writer = sharded.ShardWriter(path, self.ranks.rank, self.ranks.size, self.storage, HASHER)
            with unwrapped():
                dcp.save(
                    dict(pieces),
                    storage_writer=writer,
                    planner=sharded.PiecePlanner(),
                    process_group=self.ranks.group,
                )
            records = self.ranks.together(lambda: (writer.name, writer.record))
            shards = {name: record for name, record in records if record is not None}
            return self.ranks.on_first(lambda: self._commit(path, step, tokens, writer.table, shards, documents))
        except Exception:
            # the steps above end on all ranks together, so nobody writes any more; nobody reports before it is gone
            with contextlib.suppress(Exception):
                self.ranks.on_first(lambda: self.storage.remove(path))
            raise

    def _begin(self, step: int) -> Path:
        self._fence.check()
        return commit.begin(self.storage, self.root, step, self.start_id)

    def _commit(
        self,
        path: Path,
        step: int,
        tokens: JSON,
        table: dict[str, Any],
        shards: Mapping[str, FileRecord],
        documents: Mapping[str, bytes],
    ) -> int:
        check_table(table, shards, path / METADATA)
        files = dict(shards)
        for name, content in {**documents, METADATA: canonical(table)}.items():
            files[name] = commit.write_file(self.storage, path / name, [content], HASHER)
        facts = {
            **self.identity,
            "tokens": tokens,
            "created_unix": int(time.time()),
            "start_id": self.start_id,
            "world": {"size": self.ranks.size, "mesh": self.identity.get("mesh")},
            "torch": torch.__version__,
            "tensors": {
                name: {"shape": list(shape), "dtype": dtype} for name, (shape, dtype) in signatures(table).items()
            },
        }
        commit.seal(self.storage, path, step, facts, files, HASHER)
        self._fence.check()
        final = self._path(step)
        if not commit.publish(self.storage, path, final, lambda there: self._verify_here(there, 0, 1)):
            logger.warning("%s was there and verifies: kept, and this start's own step %d dropped", final, step)
        self._retain(final)
        return sum(record.bytes for record in files.values())

    def _retain(self, final: Path) -> None:
        keep = {"keep_last": self.cfg.keep_last, "keep_every": self.cfg.keep_every}
        try:
            for path in retention.retain(self.storage, self.root, HASHER, protected={final}, **keep):
                logger.info("deleted %s", path)
        except OSError as error:
            # the new checkpoint stands: what could not be deleted is tried again after the next save
            logger.warning("old checkpoints under %s could not be deleted: %s", self.root, error)

    # ------------------------------------------------------------------------------------------------ find, load

    def find(self, resume: str, key: str = "resume") -> Path | None:
        """The checkpoint to go on from; None is a start at step 0. The same on all ranks.

        ``false``: None. ``auto``: the newest that verifies, None only if there is none at all. ``true``: the same,
        but there must be one. Else a checkpoint, or a run folder whose newest is meant. ``key``: the setting that
        an error names. Raises DataError.
        """
        if resume == "false":
            self._warn_of_newer(None)
            return None
        named = resume not in ("auto", "true")
        candidates = self.ranks.on_first(lambda: self._candidates(Path(resume) if named else self.run_dir))
        if not candidates and resume == "auto":
            return None
        found = commit.newest_verified(candidates, self._verify)
        if found is None:
            where = resume if named else self.root
            if not candidates:
                raise DataError(f"{key}={resume}: there is no checkpoint in {where}")
            raise DataError(
                f"{key}={resume}: none of the {len(candidates)} checkpoints in {where} verifies "
                f"({', '.join(path.name for path in candidates[:5])}); not starting at step 0 beside them"
            )
        if named and found.parent.absolute() == self.root.absolute():
            self._warn_of_newer(found)
        return found

    def _warn_of_newer(self, found: Path | None) -> None:
        there = commit.committed(self.storage, self.root)[:1] if self.ranks.rank == 0 else []
        if there and (found is None or there[0].name != found.name):
            logger.warning(
                "%s is there already: where this run comes to a step that is there and verifies, the old checkpoint "
                "stays and the new one is dropped; use another run.dir, or branch_from=",
                there[0],
            )

    def _candidates(self, place: Path) -> list[Path]:
        for root in (place / "checkpoints", place):
            if paths := commit.committed(self.storage, root):
                return paths
        is_checkpoint = step_of(place.name) is not None or self.storage.exists(place / MANIFEST)
        return [place] if is_checkpoint and self.storage.is_dir(place) else []

    def _verify(self, path: Path) -> None:
        self._join()
        self.ranks.together(lambda: self._verify_here(path, self.ranks.rank, self.ranks.size))
        self._verified.add(path)

    def _verify_here(self, path: Path, part: int, parts: int) -> None:
        commit.verify(self.storage, path, self.cfg.verify, HASHER, part, parts)

    def manifest(self, path: Path) -> dict[str, Any]:
        """What the manifest of checkpoint ``path`` says (identity, tokens, world, ...). Raises DataError."""
        return read_manifest(self.storage, path, HASHER)

    def load(self, path: Path, tensors: Mapping[str, Tensor], *, prefix: str = "") -> dict[str, Any]:
        """Fill ``tensors`` (this rank's part of them) in place and return the documents by name.

        The names must be those of the checkpoint that start with ``prefix``, with the same shapes and dtypes.
        Raises DataError: it does not verify (checked unless ``find`` just did), or is of another model.
        """
        if path not in self._verified:
            self._verify(path)
        self._join()
        asked_here = {name: signature(name, tensor) for name, tensor in tensors.items()}
        table: dict[str, Any] | None = None
        documents: dict[str, Any] = {}
        asked: dict[str, Signature] = {}

        def read() -> dict[str, Signature]:
            nonlocal table, documents
            table, documents = self._read_json(path)
            return asked_here

        for names in self.ranks.together(read):
            asked.update(names)
        assert table is not None
        saved = {name: s for name, s in signatures(table).items() if name.startswith(prefix)}
        compare(asked, saved, path)
        planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        reader = sharded.ShardReader(path, table, self.storage)
        with unwrapped():
            dcp.load(dict(tensors), storage_reader=reader, planner=planner, process_group=self.ranks.group)
        return documents

    def _read_json(self, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        files = manifest_files(self.manifest(path), path, HASHER)
        content = {
            name: read_json(self.storage, path / name, record, HASHER)
            for name, record in files.items()
            if name.endswith(".json")
        }
        table = check_table(content.pop(METADATA, None), files, path / METADATA)
        return table, {name.removesuffix(".json"): value for name, value in content.items()}


def init_from(checkpointer: Checkpointer, source: str, tensors: Mapping[str, Tensor], prefix: str = "model.") -> Path:
    """Weights only: fill ``tensors`` from the checkpoint (or the newest of the run) ``source``. Raises DataError."""
    path = checkpointer.find(str(source), "init_from")
    assert path is not None
    checkpointer.load(path, tensors, prefix=prefix)
    return path


def branch_from(checkpointer: Checkpointer, source: str, tensors: Mapping[str, Tensor]) -> tuple[Path, dict[str, Any]]:
    """Everything: continue the state of ``source`` as this run, and pin it there. Raises DataError, StorageError."""
    path = checkpointer.find(str(source), "branch_from")
    assert path is not None
    by = str(checkpointer.run_dir.absolute())
    # pinned before it is read: the other run may be deleting old ones at this moment
    checkpointer.ranks.on_first(lambda: retention.pin(path, by, checkpointer.storage))
    return path, checkpointer.load(path, tensors)


def _document_file(name: str) -> str:
    if not name.isidentifier() or f"{name}.json" in (MANIFEST, METADATA):
        raise ValueError(f"document {name!r}: not a plain name, or one the checkpoint itself uses")
    return f"{name}.json"
