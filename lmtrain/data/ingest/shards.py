"""A pass over all text, shard by shard: what a run that was cut short finished, the next one does not do again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, TypeVar

from lmtrain.data.ingest.reading import Chunk, SourceOptions, read_chunks
from lmtrain.data.processes import Workers
from lmtrain.data.store.store import sync_folder

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_pass(
    folder: Path,
    suffix: str,
    sources: Mapping[str, SourceOptions],
    task: Callable[[Chunk], Task],
    work: Callable[[Task], Result],
    workers: Workers,
    finish: Callable[[Path, str, Iterator[Result]], None],
) -> dict[str, list[Path]]:
    """Do ``work(task(chunk))`` for every chunk of every source; returns per source the files of its shards, in order.

    work: picklable; runs in ``workers``. finish: makes the shard's file (durably and by rename), given
    the source's name and the shard's results in the order of the text. A file that is there is not made again; its
    lines are read and passed over.
    """
    complete = folder / "complete"
    if not complete.exists():
        folder.mkdir(exist_ok=True)

        def tasks() -> Iterator[tuple[tuple[Path, str], Task]]:
            for name, options in sources.items():
                for chunk in read_chunks(name, options):
                    path = folder / f"{name}-{chunk.shard:06d}{suffix}"
                    if not path.exists():
                        yield (path, name), task(chunk)

        for (path, name), group in groupby(workers.ordered(work, tasks()), key=lambda result: result[0]):
            finish(path, name, (result for _, result in group))
        with made_durably(complete):
            pass
    return {name: sorted(folder.glob(f"{name}-*{suffix}")) for name in sources}


@contextmanager
def made_durably(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears under its name when it is whole and on disk; an OSError names it."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise
