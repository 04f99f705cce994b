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
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path

import xxhash

import lmtrain
from lmtrain.data.counted import counted
from lmtrain.data.ingest.assembly import join, shuffle
from lmtrain.data.ingest.elsewhere import folders_elsewhere, names_of, prepared_among, read_elsewhere
from lmtrain.data.ingest.encoding import (
    NEAR_HELDOUT,
    ROUND_TRIPS,
    Encoded,
    Encoder,
    EncoderSettings,
    Marked,
    marked,
    read_counts,
    write_shard,
)
from lmtrain.data.ingest.filters.decontaminate import evaluation_files, read_evaluations
from lmtrain.data.ingest.fim import NAMES as FIM_NAMES
from lmtrain.data.ingest.fim import FimTokens
from lmtrain.data.ingest.overlap import SHINGLE, THRESHOLD, HeldoutText
from lmtrain.data.ingest.reading import Chunk, SourceOptions, inputs_digest, read_documents
from lmtrain.data.ingest.selection import RULE, TRAIN, Selection, select
from lmtrain.data.ingest.shards import made_durably, run_pass
from lmtrain.data.ingest.survey import survey
from lmtrain.data.ingest.tokenizer_training import make_tokenizer, to_train
from lmtrain.data.processes import Workers
from lmtrain.data.progress import Progress
from lmtrain.data.store.apart import STEP, kept_out
from lmtrain.data.store.manifest import HeldoutEntry, Manifest, TokenizerEntry, file_digest, file_entries
from lmtrain.data.store.store import sync_folder
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import DataError, StorageError, UsageError

PIPELINE_VERSION = 3
"""Raised whenever equal inputs would give another output."""
WORK_VERSION = 3
"""Raised whenever the files of unfinished work hold something else."""
TOKENIZER_BYTES = 1 << 28
"""Text a tokenizer is trained on, at most; a share of every source, chosen by the hash of the text."""
SAMPLE, SAMPLE_LENGTH = 1000, 2000
"""Documents, and characters of each, on which a faster engine must give the same ids."""
MAX_BYTE_TOKENS = 0.05

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrepareConfig:
    """What launch/prepare.py is told."""

    out: str
    """Folder that gets tokenizer.json and one folder per source."""
    tokenizer: str
    """train:N for a byte-level BPE of N ids, train-sp:N for sentencepiece's, or the path of a tokenizer.json or
    sentencepiece .model."""
    sources: dict[str, SourceOptions] = field(default_factory=dict)
    """Named sources, each with path and, as needed, text_field, id_field, config, split and what is left out of it."""
    heldout: float = 0.01
    """Share of ids held out: documents that share an id go together; without ids, of documents."""
    workers: int = 1
    """Processes that tokenize."""
    eod: str | None = None
    """Text of the end-of-document token; default: the tokenizer's own."""
    decontaminate: str = ""
    """Evaluation files or folders (.csv, .jsonl, .parquet, .txt; comma between): what shares 13 words in a row is left
    out. Or prepared folders: what is held out there, nearly, or holds it, is left out, as it is of those in `out` and
    beside the tokenizer without being named."""
    seed: int = 0
    """Of what is drawn per document: which are rearranged by fim_rate, and where they are cut."""
    overwrite: bool = False
    """Replace what other settings or other text made."""


def prepare(cfg: PrepareConfig) -> tuple[dict[str, Manifest], bool]:
    """Make ``out/<source>/`` and ``out/tokenizer.json``; returns the manifests, and False if they were there already.

    Raises UsageError (settings, other data in ``out``), DataError (text, tokenizer), StorageError. Whatever happens,
    a folder under its final name is complete.
    """
    _check(cfg)
    out = Path(cfg.out)
    settings = _settings(cfg)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _locked(out):
            done = _existing(cfg, out, settings)
            if done is not None:
                _work(out, None)
                return done, False
            elsewhere = folders_elsewhere(prepared_among(cfg.decontaminate)[1], out, list(cfg.sources), cfg.tokenizer)
            inputs = _digest(settings, names_of(elsewhere))
            work = _work(out, inputs)
            manifests = _build(cfg, work, inputs, elsewhere)
            _publish(out, work, manifests)
            return manifests, True
    except OSError as error:
        raise StorageError(f"{error.filename or out}: {error.strerror or error}") from error


def _work(out: Path, inputs: str | None) -> Path:
    """The folder for what is unfinished: an earlier run's, if made from the same ``inputs``; None: nothing is."""
    work = out / ".partial"
    note, mark = work / "inputs", f"{inputs} {WORK_VERSION}"
    if inputs is not None and note.is_file() and note.read_text(encoding="utf-8") == mark:
        log.info("%s: going on where an earlier run stopped", work)
        return work
    shutil.rmtree(work, ignore_errors=True)
    if inputs is not None:
        work.mkdir()
        with made_durably(note) as file:
            file.write(mark.encode())
    return work


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
    wanted, marks = to_train(cfg.tokenizer), _marks(cfg)
    if wanted is not None and wanted[1] < 257 + len(marks):
        needed = ", ".join(["256 bytes, the end of a document", *marks])
        raise UsageError(f"tokenizer={cfg.tokenizer}: at least {257 + len(marks)} ids are needed ({needed})")
    if wanted is None and marks:
        FimTokens.of(Tokenizer.load(cfg.tokenizer, cfg.eod))


def _marks(cfg: PrepareConfig) -> tuple[str, ...]:
    """The tokens that a new tokenizer gets for fim_rate."""
    return FIM_NAMES[0] if any(options.fim_rate for options in cfg.sources.values()) else ()


def _settings(cfg: PrepareConfig) -> list[object]:
    """All that decides the output but for what was held out elsewhere; no path does."""
    tokenizer = cfg.tokenizer if to_train(cfg.tokenizer) else Tokenizer.load(cfg.tokenizer, cfg.eod).fingerprint
    sources = {name: [asdict(replace(each, path="")), inputs_digest(each)] for name, each in cfg.sources.items()}
    files = evaluation_files(prepared_among(cfg.decontaminate)[0])
    evaluations = [[path.name, file_digest(path)] for path in files]
    return [PIPELINE_VERSION, tokenizer, cfg.eod, cfg.heldout, cfg.seed, evaluations, list(sources.items())]


def _digest(settings: list[object], elsewhere: list[dict[str, str]]) -> str:
    """``Manifest.inputs``. elsewhere: by name and digest, what was held out in other calls."""
    return xxhash.xxh3_128_hexdigest(json.dumps([*settings, [row["heldout"] for row in elsewhere]]).encode())


def _existing(cfg: PrepareConfig, out: Path, settings: list[object]) -> dict[str, Manifest] | None:
    """The manifests if all is done, None if there is work to do; UsageError if that would replace other data."""
    there = [name for name in cfg.sources if (out / name).exists()]
    manifests = {name: Manifest.read(out / name) for name in there if (out / name / "manifest.json").exists()}
    # What came to lie beside them later does not make them others.
    same = [name for name, made in manifests.items() if made.inputs == _digest(settings, kept_out(made))]
    tokenizer = next((path for path in (out / "tokenizer.json", out / "tokenizer.model") if path.exists()), None)
    if len(same) == len(cfg.sources) and tokenizer is not None:
        return manifests
    if cfg.overwrite:
        return None
    others = sorted(set(there) - set(same))
    if others:
        raise UsageError(
            f"{out / others[0]}: made from other text or settings ({_difference(cfg, others[0], manifests)}); "
            f"overwrite=true replaces it, or choose another out={_adding(cfg, tokenizer)}"
        )
    if tokenizer is not None and not same and not _same_file(tokenizer, Path(cfg.tokenizer)):
        raise UsageError(
            f"{tokenizer}: a tokenizer is there already; tokenizer={tokenizer} adds sources made with it, "
            "overwrite=true replaces it"
        )
    return None


def _difference(cfg: PrepareConfig, name: str, manifests: Mapping[str, Manifest]) -> str:
    """What the manifest of source ``name`` shows to be another setting; a digest of the text says no more than that."""
    if name not in manifests:
        return "it has no manifest.json"
    made, options = manifests[name], cfg.sources[name]
    pairs = {
        "tokenizer": (made.tokenizer.name, cfg.tokenizer),
        "heldout": (made.heldout.share, cfg.heldout),
        f"sources.{name}.path": (made.uri, options.path),
    }
    found = [f"{key}: was {was}, is {now}" for key, (was, now) in pairs.items() if was != now]
    return ", ".join(found) or "its text, the set of sources, another setting, or another version of lmtrain"


def _adding(cfg: PrepareConfig, tokenizer: Path | None) -> str:
    """How to add sources where a tokenizer would be trained anew."""
    if tokenizer is None or to_train(cfg.tokenizer) is None:
        return ""
    return f"; {cfg.tokenizer} would train on the new set: to add sources, name only these, with tokenizer={tokenizer}"


def _same_file(a: Path, b: Path) -> bool:
    return b.is_file() and a.read_bytes() == b.read_bytes()


def _build(cfg: PrepareConfig, work: Path, inputs: str, elsewhere: list[Path]) -> dict[str, Manifest]:
    """Everything, inside ``work``; what an earlier run finished there is used."""
    with Workers(cfg.workers, Encoder.__module__) as workers:
        return _build_with(workers, cfg, work, inputs, elsewhere)


def _build_with(
    workers: Workers, cfg: PrepareConfig, work: Path, inputs: str, elsewhere: list[Path]
) -> dict[str, Manifest]:
    evaluations = read_evaluations(prepared_among(cfg.decontaminate)[0])
    facts = survey(cfg.sources, cfg.heldout, evaluations, workers, work / "survey")
    selections, heldout = select(facts, evaluations, read_elsewhere(elsewhere))
    del facts
    for name, selection in selections.items():
        if not selection.train_bytes:
            lower = ", or lower heldout" if selection.hashes else ""
            raise DataError(
                f"sources.{name}: {cfg.sources[name].path}: no text to train on ({_counts(selection)}); "
                f"give more{lower}"
            )
        if cfg.heldout and not selection.hashes:
            log.warning("%s: nothing held out (%s); raise heldout, or give more documents", name, _counts(selection))
    tokenizer = make_tokenizer(cfg.tokenizer, cfg.eod, _marks(cfg), _training_text(cfg, selections), work)
    (work / "heldout").mkdir(exist_ok=True)
    for name in HeldoutText._fields:
        with made_durably(work / "heldout" / f"{name}.npy") as file:
            heldout.write(name, file)
    encoder = Encoder(_encoder_settings(cfg, work, selections, tokenizer), tokenizer)
    paths = _encode(cfg, work, selections, encoder, workers)
    kept: list[dict[str, object]] = [{"step": STEP, "sources": names_of(elsewhere)}] if elsewhere else []
    return {
        name: _assemble(cfg, name, work, inputs, selections[name], tokenizer, paths[name], kept) for name in cfg.sources
    }


def _training_text(cfg: PrepareConfig, selections: Mapping[str, Selection]) -> Iterator[str]:
    total = sum(selection.train_bytes for selection in selections.values())
    limit = 2**64 * TOKENIZER_BYTES // max(total, TOKENIZER_BYTES)
    for text in _train_texts(cfg, selections):
        if xxhash.xxh3_64_intdigest(text.encode()) <= limit:
            yield text


def _train_texts(cfg: PrepareConfig, selections: Mapping[str, Selection]) -> Iterator[str]:
    for name, options in cfg.sources.items():
        for document, verdict in zip(read_documents(options), selections[name].verdicts, strict=True):
            if verdict == TRAIN:
                yield document.text


def _encoder_settings(
    cfg: PrepareConfig, work: Path, selections: Mapping[str, Selection], tokenizer: Tokenizer
) -> EncoderSettings:
    sample = [text[:SAMPLE_LENGTH] for text in islice(_train_texts(cfg, selections), SAMPLE)]
    reason = tokenizer.accelerate(sample)
    if reason is not None:
        log.info("tokenizing with %s: %s", type(tokenizer).__name__, reason)
    checked = {name: min(ROUND_TRIPS / len(selections[name].verdicts), 1.0) for name in cfg.sources}
    fim = {name: options.fim_rate for name, options in cfg.sources.items()}
    heldout = str(work / "heldout")
    return EncoderSettings(tokenizer.path, tokenizer.eod, reason is None, heldout, fim, checked, cfg.seed)


def _encode(
    cfg: PrepareConfig, work: Path, selections: Mapping[str, Selection], encoder: Encoder, workers: Workers
) -> dict[str, list[Path]]:
    """The shards of tokens of every source."""
    vocab = encoder.tokenizer.vocab_size
    with Progress("tokenizing", sum(selection.train_bytes for selection in selections.values())) as progress:

        def counted(results: Iterator[Encoded]) -> Iterator[Encoded]:
            for encoded in results:
                progress.advance(encoded.counts.train_bytes)
                yield encoded

        def finish(path: Path, source: str, results: Iterator[Encoded]) -> None:
            write_shard(path, counted(results), vocab)

        def task(chunk: Chunk) -> Marked:
            return marked(chunk, selections[chunk.source])

        return run_pass(work / "tokens", ".json", cfg.sources, task, encoder, workers, finish)


def _assemble(
    cfg: PrepareConfig,
    name: str,
    work: Path,
    inputs: str,
    selection: Selection,
    tokenizer: Tokenizer,
    paths: list[Path],
    kept_apart: list[dict[str, object]],
) -> Manifest:
    """One source's stores from its shards, into ``work/name``, complete with its manifest."""
    options, folder, counts = cfg.sources[name], work / name, read_counts(paths)
    share = counts.byte_tokens / max(counts.tokens, 1)
    if counts.differ:
        log.warning(
            "%s: %d of %d documents do not decode to their text; the tokenizer loses it",
            name, counts.differ, counts.checked,
        )  # fmt: skip
    if share > MAX_BYTE_TOKENS:
        log.warning("%s: %.0f %% of the tokens are parts of characters; another tokenizer suits it", name, 100 * share)
    if not counts.train_bytes:
        raise DataError(
            f"sources.{name}: every training document nearly equals, or holds, a held-out one; lower heldout"
        )
    folder.mkdir(exist_ok=True)
    shuffle([path.with_suffix(".train") for path in paths], folder / "train", tokenizer.vocab_size, name)
    join([path.with_suffix(".heldout") for path in paths], folder / "heldout", tokenizer.vocab_size)
    with made_durably(folder / "filters.jsonl") as file:
        for example in counts.examples:
            file.write((json.dumps(example, ensure_ascii=False) + "\n").encode())
    manifest = Manifest(
        source=name,
        uri=options.path,
        created_by=f"lmtrain {lmtrain.__version__}",
        inputs=inputs,
        tokenizer=TokenizerEntry(
            cfg.tokenizer, tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eod, tokenizer.eod_id
        ),
        files=[*file_entries(folder, "train"), *file_entries(folder, "heldout")],
        bytes_of_text={"train": counts.train_bytes, "heldout": sum(counts.heldout_bytes)},
        heldout=HeldoutEntry(RULE, cfg.heldout, selection.hashes, counts.heldout_bytes),
        pipeline=[
            {"step": "read", "documents": len(selection.verdicts)},
            *({"step": step, "removed": count} for step, count in selection.removed.items()),
            *([{"step": "evaluations", "found": selection.found}] if selection.found else []),
            *([{"step": "heldout", **selection.ids._asdict()}] if selection.ids.of else []),
            *kept_apart,
            {"step": NEAR_HELDOUT, "removed": counts.near, "words": SHINGLE, "threshold": THRESHOLD},
            *([{"step": "fim", "documents": counts.rearranged, "seed": cfg.seed}] if options.fim_rate else []),
            {"step": "round_trip", "documents": counts.checked, "differ": counts.differ},
            {"step": "byte_tokens", "share": round(share, 6)},
            {"step": "shuffle_documents"},
        ],
    )
    manifest.write(folder)
    return manifest


def _counts(selection: Selection) -> str:
    parts = {**selection.removed, "held out": len(selection.hashes)}
    reasons = [f"{count:,} {step}" for step, count in parts.items()]
    return ", ".join([counted(len(selection.verdicts), "document"), *reasons])


def _publish(out: Path, work: Path, manifests: Mapping[str, Manifest]) -> None:
    """Rename into place: sources, then the tokenizer, so that a run that was cut short is seen to be unfinished."""
    for name in manifests:
        if (out / name).exists():
            shutil.rmtree(work / f"{name}.old", ignore_errors=True)
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
