"""Documents to tokens, by one process or several, in the order in which they came."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.overlap import THRESHOLD, overlap
from lmtrain.data.processes import die_with_parent
from lmtrain.data.reading import SourceOptions
from lmtrain.data.selection import Selection, Side, heldout_text, selected
from lmtrain.data.tokenizer import Tokenizer

CHUNK_BYTES = 1 << 20


class Job(NamedTuple):
    """whole: False for a held-out document that was cut, which therefore does not end."""

    text: str
    heldout: bool
    whole: bool


def jobs_of(options: SourceOptions, selection: Selection) -> Iterator[list[Job]]:
    """What is to be tokenized of a source, in lists of about a megabyte."""
    jobs: list[Job] = []
    size = 0
    for document, side in selected(options, selection, Side.TRAIN, Side.HELDOUT):
        text = heldout_text(document.text) if side == Side.HELDOUT else document.text
        jobs.append(Job(text, side == Side.HELDOUT, len(text) == len(document.text)))
        size += len(text)
        if size >= CHUNK_BYTES:
            yield jobs
            jobs, size = [], 0
    if jobs:
        yield jobs


Encoded = list[NDArray[np.int32] | None]


class Encoder:
    """Tokens of each job, eod included; None for a training document that nearly equals held-out text."""

    def __init__(self, tokenizer: str, eod: str, heldout: str) -> None:
        self.arguments = (tokenizer, eod, heldout)
        self.tokenizer = Tokenizer.load(tokenizer, eod)
        self.known = np.load(heldout)

    def __call__(self, jobs: list[Job]) -> Encoded:
        kept = [job.heldout or overlap(job.text, self.known) < THRESHOLD for job in jobs]
        encoded = iter(self.tokenizer.encode_batch([job.text for job, keep in zip(jobs, kept, strict=True) if keep]))
        eod = np.array([self.tokenizer.eod_id], dtype=np.int32)
        return [
            np.concatenate([next(encoded), eod[: job.whole]]) if keep else None
            for job, keep in zip(jobs, kept, strict=True)
        ]


_encoder: Encoder  # of this worker process


def _start_worker(parent: int, arguments: tuple[str, str, str]) -> None:
    global _encoder
    die_with_parent(parent)
    _encoder = Encoder(*arguments)


def _encode(jobs: list[Job]) -> Encoded:
    return _encoder(jobs)


def encoded(
    encoder: Encoder, chunks: Iterator[list[Job]], workers: int
) -> Iterator[tuple[Job, NDArray[np.int32] | None]]:
    """Jobs with their tokens, in order, whatever the number of workers; a few chunks are under way at a time."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per process: `workers` says how many cores are used
    if workers == 1:
        for jobs in chunks:
            yield from zip(jobs, encoder(jobs), strict=True)
        return
    pool = ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=_start_worker, initargs=(os.getpid(), encoder.arguments)
    )
    waiting: deque[tuple[list[Job], Future[Encoded]]] = deque()
    with pool:
        for jobs in chunks:
            waiting.append((jobs, pool.submit(_encode, jobs)))
            if len(waiting) > 2 * workers:
                first, future = waiting.popleft()
                yield from zip(first, future.result(), strict=True)
        for first, future in waiting:
            yield from zip(first, future.result(), strict=True)
