"""Text to prepared data: select, train or load the tokenizer, tokenize, shuffle, write, publish.

The output is a function of the settings and the input text: not of the number of workers, the time or the machine.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import xxhash

import lmtrain
from lmtrain.data.encoding import Encoder, encoded, jobs_of
from lmtrain.data.manifest import HeldoutEntry, Manifest, TokenizerEntry, file_entries
from lmtrain.data.overlap import SHINGLE, THRESHOLD
from lmtrain.data.permutation import permute
from lmtrain.data.progress import Progress
from lmtrain.data.reading import SourceOptions, inputs_digest
from lmtrain.data.selection import RULE, Selection, Side, select, selected
from lmtrain.data.store import Store, StoreWriter, sync_folder
from lmtrain.data.tokenizer import EOD, Tokenizer, train_bpe
from lmtrain.errors import DataError, StorageError, UsageError

PIPELINE_VERSION = 1
"""Raised whenever equal inputs would give another output."""
TOKENIZER_BYTES = 1 << 28
"""Text a tokenizer is trained on, at most; a share of every source, chosen by the hash of the text."""
ROUND_TRIPS = 100

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrepareConfig:
    """What launch/prepare.py is told."""

    out: str
    """Folder that gets tokenizer.json and one folder per source."""
    tokenizer: str
    """train:N for a byte-level BPE of N ids, or the path of a tokenizer.json or sentencepiece .model."""
    sources: dict[str, SourceOptions] = field(default_factory=dict)
    """Named sources, each with path, text_field, id_field, config, split."""
    heldout: float = 0.01
    """Share of documents held out."""
    workers: int = 1
    """Processes that tokenize."""
    eod: str | None = None
    """Text of the end-of-document token; default: the tokenizer's own."""
    overwrite: bool = False
    """Replace what other settings or other text made."""


def prepare(cfg: PrepareConfig) -> tuple[dict[str, Manifest], bool]:
    """Make ``out/<source>/`` and ``out/tokenizer.json``; returns the manifests, and False if they were there already.

    Raises UsageError (settings, other data in ``out``), DataError (text, tokenizer), StorageError. Whatever happens,
    a folder under its final name is complete.
    """
    _check(cfg)
    out = Path(cfg.out)
    inputs = _inputs(cfg)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _locked(out):
            work = out / ".partial"
            shutil.rmtree(work, ignore_errors=True)  # of a run that was cut short
            done = _existing(cfg, out, inputs)
            if done is not None:
                return done, False
            work.mkdir()
            manifests = _build(cfg, work, inputs)
            _publish(out, work, manifests)
            return manifests, True
    except OSError as error:
        raise StorageError(f"{error.filename or out}: {error.strerror or error}") from error


def _check(cfg: PrepareConfig) -> None:
    if not cfg.sources:
        raise UsageError("sources: none given; name one with sources.NAME.path=FILE_OR_FOLDER")
    for name in cfg.sources:
        if not name.isidentifier():
            raise UsageError(f"sources: {name!r} is no name; use letters, digits and _ (it becomes a folder)")
    if not 0 <= cfg.heldout < 1:
        raise UsageError(f"heldout: must be at least 0 and below 1, got {cfg.heldout}")
    if cfg.workers < 1:
        raise UsageError(f"workers: must be at least 1, got {cfg.workers}")
    if cfg.tokenizer.startswith("train:") and not cfg.tokenizer.removeprefix("train:").isdecimal():
        raise UsageError(f"tokenizer: expected train:N with a number of ids, got {cfg.tokenizer}")


def _inputs(cfg: PrepareConfig) -> str:
    """Digest of all that decides the output."""
    trained = cfg.tokenizer.startswith("train:")
    tokenizer = cfg.tokenizer if trained else Tokenizer.load(cfg.tokenizer, cfg.eod).fingerprint
    sources = {name: [asdict(options), inputs_digest(options)] for name, options in cfg.sources.items()}
    parts = [PIPELINE_VERSION, tokenizer, cfg.eod, cfg.heldout, list(sources.items())]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())


def _existing(cfg: PrepareConfig, out: Path, inputs: str) -> dict[str, Manifest] | None:
    """The manifests if all is done, None if there is work to do; UsageError if that would replace other data."""
    there = [name for name in cfg.sources if (out / name).exists()]
    manifests = {name: Manifest.read(out / name) for name in there if (out / name / "manifest.json").exists()}
    same = [name for name, manifest in manifests.items() if manifest.inputs == inputs]
    tokenizer = next((path for path in (out / "tokenizer.json", out / "tokenizer.model") if path.exists()), None)
    if len(same) == len(cfg.sources) and tokenizer is not None:
        return manifests
    if cfg.overwrite:
        return None
    others = sorted(set(there) - set(same))
    if others:
        raise UsageError(
            f"{out / others[0]}: made from other text or settings; overwrite=true replaces it, or choose another out="
        )
    if tokenizer is not None and not same and not _same_file(tokenizer, Path(cfg.tokenizer)):
        raise UsageError(
            f"{tokenizer}: a tokenizer is there already; tokenizer={tokenizer} adds sources made with it, "
            "overwrite=true replaces it"
        )
    return None


def _same_file(a: Path, b: Path) -> bool:
    return b.is_file() and a.read_bytes() == b.read_bytes()


def _build(cfg: PrepareConfig, work: Path, inputs: str) -> dict[str, Manifest]:
    """Everything, inside ``work``."""
    selections, known = select(cfg.sources, cfg.heldout)
    for name, selection in selections.items():
        if not selection.train_bytes:
            raise DataError(f"sources.{name}: no text to train on ({_counts(selection)}); give more, or lower heldout")
        if cfg.heldout and not selection.hashes:
            log.warning("%s: nothing held out (%s); raise heldout, or give more documents", name, _counts(selection))
    tokenizer = _tokenizer(cfg, work, selections)
    np.save(work / "heldout.npy", known)
    encoder = Encoder(tokenizer.path, tokenizer.eod, str(work / "heldout.npy"))
    return {name: _write_source(cfg, name, work, inputs, selections[name], tokenizer, encoder) for name in cfg.sources}


def _tokenizer(cfg: PrepareConfig, work: Path, selections: Mapping[str, Selection]) -> Tokenizer:
    """The tokenizer, as a file in ``work`` with its tokenizer_config.json."""
    if cfg.tokenizer.startswith("train:"):
        path = work / "tokenizer.json"
        size = int(cfg.tokenizer.removeprefix("train:"))
        log.info("training a tokenizer of %d ids", size)
        trained = train_bpe(_training_text(cfg, selections), size, path, cfg.eod or EOD)
        if trained.vocab_size < size:
            log.warning("tokenizer=train:%d: the text only yields %d ids", size, trained.vocab_size)
        eod = cfg.eod or EOD
    else:
        given = Tokenizer.load(cfg.tokenizer, cfg.eod)
        path = work / ("tokenizer.model" if given.path.endswith(".model") else "tokenizer.json")
        shutil.copyfile(given.path, path)
        eod = given.eod
    # Where Hugging Face keeps it: a later load finds the same token without being told.
    (work / "tokenizer_config.json").write_text(json.dumps({"eos_token": eod}) + "\n", encoding="utf-8")
    return Tokenizer.load(path)


def _training_text(cfg: PrepareConfig, selections: Mapping[str, Selection]) -> Iterator[str]:
    total = sum(selection.train_bytes for selection in selections.values())
    limit = 2**64 * TOKENIZER_BYTES // max(total, TOKENIZER_BYTES)
    for name, options in cfg.sources.items():
        for document, _ in selected(options, selections[name], Side.TRAIN):
            if xxhash.xxh3_64_intdigest(document.text.encode()) <= limit:
                yield document.text


def _write_source(
    cfg: PrepareConfig,
    name: str,
    work: Path,
    inputs: str,
    selection: Selection,
    tokenizer: Tokenizer,
    encoder: Encoder,
) -> Manifest:
    """Tokenize one source into ``work/name``, complete with its manifest."""
    options, folder = cfg.sources[name], work / name
    folder.mkdir()
    sizes: list[int] = []
    train_bytes = near = differ = checked = 0
    vocab = tokenizer.vocab_size
    with (
        StoreWriter(work / "unshuffled", vocab) as train,
        StoreWriter(folder / "heldout", vocab) as heldout,
        Progress(f"{name}: tokenizing", selection.train_bytes) as progress,
    ):
        for job, tokens in encoded(encoder, jobs_of(options, selection), cfg.workers):
            size = len(job.text.encode())
            progress.advance(size)
            if tokens is None:
                near += 1
                continue
            if job.heldout:
                heldout.add(tokens)
                sizes.append(size)
            else:
                train.add(tokens)
                train_bytes += size
            if checked < ROUND_TRIPS:
                checked += 1
                differ += tokenizer.decode(tokens[: len(tokens) - job.whole]) != job.text
    if differ:
        log.warning("%s: %d of %d documents do not decode to their text; the tokenizer loses it", name, differ, checked)
    if not train_bytes:
        raise DataError(f"sources.{name}: every training document nearly equals a held-out one; lower heldout")
    _shuffle(work / "unshuffled", folder / "train", vocab, name)
    manifest = Manifest(
        source=name,
        uri=options.path,
        created_by=f"lmtrain {lmtrain.__version__}",
        inputs=inputs,
        tokenizer=TokenizerEntry(cfg.tokenizer, tokenizer.fingerprint, vocab, tokenizer.eod, tokenizer.eod_id),
        files=[*file_entries(folder, "train"), *file_entries(folder, "heldout")],
        bytes_of_text={"train": train_bytes, "heldout": sum(sizes)},
        heldout=HeldoutEntry(RULE, cfg.heldout, selection.hashes, sizes),
        pipeline=[
            {"step": "read", "documents": len(selection.sides)},
            *({"step": step, "removed": count} for step, count in sorted(selection.removed.items())),
            {"step": "near_duplicate_of_heldout", "removed": near, "words": SHINGLE, "threshold": THRESHOLD},
            {"step": "round_trip", "documents": checked, "differ": differ},
            {"step": "shuffle_documents"},
        ],
    )
    manifest.write(folder)
    return manifest


def _counts(selection: Selection) -> str:
    parts = {"documents": len(selection.sides), **selection.removed, "held out": len(selection.hashes)}
    return ", ".join(f"{count} {step}" for step, count in parts.items())


def _shuffle(unshuffled: Path, final: Path, vocab_size: int, name: str) -> None:
    """Write the documents in a keyed order: blocks are shuffled later, the documents inside one block never again."""
    store = Store(unshuffled)
    key = np.uint64(xxhash.xxh3_64_intdigest(f"documents/{name}".encode()))
    piece = 1 << 20
    with StoreWriter(final, vocab_size) as writer:
        for start in range(0, store.num_documents, piece):
            at = np.arange(start, min(start + piece, store.num_documents))
            for j in permute(at, store.num_documents, key):
                writer.add(store.document(int(j)))
    for suffix in (".bin", ".idx"):
        os.remove(f"{unshuffled}{suffix}")


def _publish(out: Path, work: Path, manifests: Mapping[str, Manifest]) -> None:
    """Rename into place: sources, then the tokenizer, so that a run that was cut short is seen to be unfinished."""
    for name in manifests:
        if (out / name).exists():
            os.replace(out / name, work / f"{name}.old")
        os.replace(work / name, out / name)
    for name in ("tokenizer_config.json", "tokenizer.model", "tokenizer.json"):
        if (work / name).exists():
            os.replace(work / name, out / name)
    sync_folder(out)
    shutil.rmtree(work)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """One writer per folder; the kernel drops the lock with the process."""
    with open(out / ".lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(f"{out}: another prepare is writing there") from None
        yield
