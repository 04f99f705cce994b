"""Several stores of one tokenizer into one: the documents of the first, then of the second, and so on."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash

import lmtrain
from lmtrain.data.counted import counted
from lmtrain.data.store.locate import Located, locate
from lmtrain.data.store.manifest import SPLITS, HeldoutEntry, Manifest, file_entries
from lmtrain.data.store.store import READ_TOKENS, Store, StoreWriter, sync_folder
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import DataError, StorageError, UsageError

CUT_TOKENS = 1024
"""Of a held-out document of which only the beginning was kept, so many are compared."""


def merge(out: str, paths: Sequence[str], tokenizer: Tokenizer | None = None) -> Store:
    """Write ``out`` from the sources at ``paths``, in that order; returns its (training) store.

    Prepared folders give a prepared folder, held-out documents with held-out ones; stores of any other format give the
    pair ``out.bin``, ``out.idx``, for which ``tokenizer`` is needed. The bytes depend on the inputs and their order
    alone. Nothing appears under ``out`` before it is complete. Raises UsageError if something is there already or
    both kinds are given, DataError if the inputs were made with different tokenizers or one trains on a document that
    is held out in another, token by token, StorageError.
    """
    found = [each for path in paths for each in locate(path, tokenizer)]
    if len({each.manifest is None for each in found}) > 1:
        raise UsageError("merge: prepared folders and stores without a manifest cannot be merged into one")
    for taken in (out, f"{out}.bin", f"{out}.idx"):
        if os.path.exists(taken):
            raise UsageError(f"{taken}: is there already; choose another out=, or remove it")
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        if found[0].manifest is None:
            _write(out, [each.stores[""] for each in found], found[0].required_tokenizer().vocab_size)
            return Store(out)
        _merge_prepared(Path(out), found)
        return Store(Path(out) / "train")
    except OSError as error:
        raise StorageError(f"{error.filename or out}: {error.strerror or error}") from error


def _write(prefix: str | Path, stores: Sequence[Store], vocab_size: int) -> None:
    with StoreWriter(prefix, vocab_size) as writer:
        for store in stores:
            store.check_range(vocab_size)  # names the store and its document, where the writer could not
            for first, lengths in store.document_lengths():
                at = int(store.borders.starts(first, first + 1)[0])
                for part in _parts(lengths):
                    writer.extend(store.tokens(at, int(part.sum())), part)
                    at += int(part.sum())


def _parts(lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Consecutive documents, of READ_TOKENS tokens at most if there are several."""
    group = np.cumsum(lengths) // READ_TOKENS
    return iter(np.split(lengths, np.flatnonzero(np.diff(group)) + 1))


def _merge_prepared(out: Path, found: Sequence[Located]) -> None:
    manifests = [each.manifest for each in found if each.manifest is not None]
    first = manifests[0]
    for each, manifest in zip(found, manifests, strict=True):
        if manifest.tokenizer.fingerprint != first.tokenizer.fingerprint:
            raise DataError(
                f"{each.path}: made with tokenizer {manifest.tokenizer.name} ({manifest.tokenizer.fingerprint[:12]}), "
                f"{found[0].path} with {first.tokenizer.name} ({first.tokenizer.fingerprint[:12]})"
            )
        if manifest.eod_appended != first.eod_appended:
            raise DataError(f"{each.path}: eod_appended is {manifest.eod_appended}, of {found[0].path} it is not")
    _refuse_trained_on(found)
    with _work_folder(out) as work:
        for split in SPLITS:
            _write(work / split, [each.stores[split] for each in found], first.tokenizer.vocab_size)
        merged = replace(
            first,
            source=out.name,
            uri=", ".join(each.path for each in found),
            created_by=f"lmtrain {lmtrain.__version__}",
            inputs=xxhash.xxh3_128_hexdigest("\n".join(manifest.inputs for manifest in manifests).encode()),
            files=[entry for split in SPLITS for entry in file_entries(work, split)],
            bytes_of_text={split: sum(manifest.bytes_of_text[split] for manifest in manifests) for split in SPLITS},
            heldout=_heldout(manifests),
            pipeline=[{"step": "merge", "sources": [_summary(manifest) for manifest in manifests]}],
        )
        merged.write(work)
        os.rename(work, out)
    sync_folder(out.parent)


def _refuse_trained_on(found: Sequence[Located]) -> None:
    """Raise DataError if a training document has the tokens of a held-out one; of one that was cut, the first ones."""
    heldout: dict[tuple[int, int], str] = {}
    for each in found:
        eod = each.manifest.tokenizer.eod_id if each.manifest else -1
        for _, document in _documents(each.stores["heldout"]):
            whole = document[-1] == eod
            key = len(document) if whole else min(len(document) - 1, CUT_TOKENS)  # its last token may be cut, too
            heldout.setdefault((key if whole else -key, _hash(document[:key])), each.path)
    cuts = sorted({-length for length, _ in heldout if length < 0})
    for each in found:
        hits = [
            (number, path)
            for number, document in _documents(each.stores["train"])
            for length in (len(document), *(-cut for cut in cuts if cut < len(document)))
            if (path := heldout.get((length, _hash(document[: abs(length)])))) is not None
        ]
        if hits:
            raise DataError(
                f"merge: {each.path}: trains on {counted(len(hits), 'document')} held out in another input (first: "
                f"{hits[0][0]}, held out in {hits[0][1]}); prepare its text again with decontaminate={hits[0][1]}, or "
                "the text of both in one call"
            )


def _documents(store: Store) -> Iterator[tuple[int, np.ndarray]]:
    """Number and tokens of every document that has any."""
    for first, lengths in store.document_lengths():
        at, number = int(store.borders.starts(first, first + 1)[0]), first
        for part in _parts(lengths):
            tokens = store.tokens(at, int(part.sum()))
            for document in np.split(tokens, np.cumsum(part)[:-1]):
                if len(document):
                    yield number, document
                number += 1
            at += len(tokens)


def _hash(tokens: np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(tokens).data)


def _heldout(manifests: Sequence[Manifest]) -> HeldoutEntry:
    entries = [manifest.heldout for manifest in manifests]
    return HeldoutEntry(
        rule="; ".join(dict.fromkeys(entry.rule for entry in entries)),
        share=max(entry.share for entry in entries),
        hashes=[value for entry in entries for value in entry.hashes],
        bytes=[value for entry in entries for value in entry.bytes],
    )


def _summary(manifest: Manifest) -> dict[str, object]:
    """What the merged manifest keeps of an input, and where to look for the rest."""
    train = manifest.file("train.bin")
    return {
        "source": manifest.source,
        "uri": manifest.uri,
        "inputs": manifest.inputs,
        "documents": train.documents,
        "tokens": train.tokens,
        "pipeline": manifest.pipeline,
    }


@contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """``OUT.partial``, empty and ours alone; gone afterwards if it was not renamed."""
    work = out.with_name(f"{out.name}.partial")
    work.mkdir(exist_ok=True)
    handle = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise StorageError(f"{work}: another merge is writing there") from None
    try:
        for entry in work.iterdir():  # of a call that was cut short
            entry.unlink()
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(handle)
