"""Opening the data a recipe names, and what to say when it misses."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lmtrain.data.config import DataConfig
from lmtrain.data.store.apart import warn_of_sources_apart
from lmtrain.data.store.foreign import index_file, open_store
from lmtrain.data.store.locate import prepared_folders
from lmtrain.data.store.manifest import NAME, SPLITS, Manifest, file_digest, open_split
from lmtrain.data.store.store import Store
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import DataError, LmtrainError, nearest

SAMPLE_TOKENS = 1 << 16

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A source of training text on disk. ``heldout`` and ``manifest`` are None for a foreign store."""

    name: str
    path: str
    train: Store
    heldout: Store | None = None
    manifest: Manifest | None = None


def open_sources(cfg: DataConfig, tokenizer: Tokenizer) -> list[Source]:
    """All sources of ``cfg`` that have a path, in its order. Raises DataError for the first that does not fit."""
    if not cfg.sources:
        raise DataError(f"data.sources: none given; {_prepare_command('NAME', 'data/x', tokenizer)}")
    opened = [
        open_source(name, source.path, tokenizer) for name, source in cfg.sources.items() if source.path is not None
    ]
    warn_of_sources_apart(manifests_of(opened))
    return opened


def manifests_of(opened: Iterable[Source]) -> dict[str, Manifest]:
    """Of those that have one, by name."""
    return {source.name: source.manifest for source in opened if source.manifest is not None}


def open_source(name: str, path: str, tokenizer: Tokenizer) -> Source:
    """The source at ``path``. Raises DataError if it is missing, damaged or made with another tokenizer."""
    opened = _open(name, path, tokenizer)
    _check_tokenizer(opened, tokenizer)
    return opened


def open_train(name: str, path: str, cfg: DataConfig) -> Store:
    """The training tokens of a source of a run with ``cfg`` that was opened, and so checked, before."""
    folder = Path(path)
    if (folder / NAME).is_file():
        return _split(name, folder, "train", Manifest.read(folder), None)
    return _foreign(name, path, Tokenizer.load(cfg.tokenizer) if folder.suffix == ".npy" else None)


def content_digest(path: str) -> str:
    """xxh3-128, hex, of what names the content of a source. Raises DataError if there is nothing at ``path``.

    Of a prepared source that is its manifest, which holds the checksums of all its files, piece by piece of 64 MiB:
    other tokens or documents make another manifest, and pieces that differ from it are refused as they are read. A
    foreign store has no checksums: its index is hashed, and other tokens in documents of the same lengths go unseen.
    """
    folder = Path(path)
    _refuse_folder_around(path)
    named = folder / NAME if (folder / NAME).is_file() else index_file(_prefix(folder))
    try:
        return file_digest(named)
    except OSError as error:
        raise DataError(f"{named}: {error.strerror}; a source is a folder made by launch/prepare.py") from None


def bytes_per_token(source: Source, tokenizer: Tokenizer) -> float:
    """UTF-8 bytes of text that a token stands for, on average: of the manifest, else of the first tokens, decoded."""
    if source.manifest is not None and source.train.num_tokens:
        return source.manifest.bytes_of_text["train"] / source.train.num_tokens
    sample = source.train.tokens(0, min(source.train.num_tokens, SAMPLE_TOKENS))
    return len(tokenizer.decode(sample).encode()) / max(len(sample), 1)


def check_sources(cfg: DataConfig) -> list[str]:
    """What is wrong with the tokenizer or the sources, a sentence each, all of them; nothing is raised."""
    problems = []
    found = []
    tokenizer = None
    try:
        tokenizer = Tokenizer.load(cfg.tokenizer)
    except LmtrainError as error:
        problems.append(f"data.tokenizer: {error}")
    for name, source in cfg.sources.items():
        try:
            if source.path is None:
                continue
            opened = _open(name, source.path, tokenizer)
            found.append(opened)
            if tokenizer is not None:
                _check_tokenizer(opened, tokenizer)
        except LmtrainError as error:
            problems.append(str(error))
    if not cfg.sources:
        problems.append("data.sources: none given")
    warn_of_sources_apart(manifests_of(found))
    return problems


def _open(name: str, path: str, tokenizer: Tokenizer | None) -> Source:
    folder = Path(path)
    if (folder / NAME).is_file():
        manifest = Manifest.read(folder)
        train, heldout = (_split(name, folder, split, manifest, tokenizer) for split in SPLITS)
        return Source(name, path, train, heldout, manifest)
    _refuse_folder_around(path)
    store = _foreign(name, path, tokenizer)
    _warn_foreign(name, path)
    return Source(name, path, store)


def _refuse_folder_around(path: str) -> None:
    """Raise DataError, naming what lies inside, if ``path`` is the folder that a prepare call wrote sources into."""
    inside = [str(folder) for folder in prepared_folders(path)]
    if inside and inside != [str(Path(path))]:
        meant = f"did you mean {inside[0]}?" if len(inside) == 1 else f"give one of {', '.join(inside)}"
        raise DataError(f"{path}: is the folder around prepared sources; {meant}")


def _split(name: str, folder: Path, split: str, manifest: Manifest, tokenizer: Tokenizer | None) -> Store:
    _check_there(name, folder / split, tokenizer)
    return open_split(folder, split, manifest)


def _foreign(name: str, path: str, tokenizer: Tokenizer | None) -> Store:
    prefix = _prefix(Path(path))
    if prefix.suffix not in (".ds", ".npy") and not prefix.is_dir():
        _check_there(name, prefix, tokenizer)
    return open_store(prefix, tokenizer)


def _prefix(path: Path) -> Path:
    """Of the foreign pair that ``path`` names, itself or as the folder around it."""
    return path / "train" if (path / "train.idx").is_file() else path


@cache
def _warn_foreign(name: str, path: str) -> None:
    """Once per process, however often the source is opened."""
    log.warning("data.sources.%s: %s has no %s; its tokenizer is taken on trust", name, path, NAME)


def _check_there(name: str, prefix: Path, tokenizer: Tokenizer | None) -> None:
    """Raise DataError, saying how to make it, unless there is a pair of that prefix."""
    for suffix in (".idx", ".bin"):
        if not os.path.exists(f"{prefix}{suffix}"):
            out = str(prefix.parent.parent if prefix.name == "train" else prefix.parent)
            raise DataError(
                f"data.sources.{name}.path: {prefix}{suffix} is missing{_sibling(prefix)}; "
                f"{_prepare_command(name, out, tokenizer)}"
            )


def _sibling(prefix: Path) -> str:
    """The nearest readable source beside the missing one."""
    if not prefix.parent.is_dir():
        return "; there is no such folder"
    pairs = [entry.name.removesuffix(".idx") for entry in prefix.parent.glob("*.idx")]
    folders = [entry.parent.name for entry in prefix.parent.glob(f"*/{NAME}")]
    return nearest(prefix.name, {*pairs, *folders})


def _prepare_command(name: str, out: str, tokenizer: Tokenizer | None) -> str:
    made_with = tokenizer.path if tokenizer else "train:8192"
    return f"make it with: python launch/prepare.py out={out} tokenizer={made_with} sources.{name}.path=YOUR_TEXT"


def _check_tokenizer(source: Source, tokenizer: Tokenizer) -> None:
    entry = source.manifest.tokenizer if source.manifest else None
    if entry and entry.fingerprint != tokenizer.fingerprint:
        own = Path(source.path).parent / "tokenizer.json"
        raise DataError(
            f"data.sources.{source.name}: {source.path} was made with tokenizer {own if own.is_file() else entry.name} "
            f"({entry.fingerprint[:12]}), data.tokenizer is {tokenizer.path} ({tokenizer.fingerprint[:12]}); use the "
            f"former, or tokenize again: python launch/prepare.py out=NEW tokenizer={tokenizer.path} "
            f"sources.{source.name}.path=YOUR_TEXT"
        )
    if entry is None and source.train.num_tokens:  # without a manifest: at least a sample must fit the vocabulary
        sample = source.train.tokens(0, min(source.train.num_tokens, 1 << 20))
        if int(sample.max()) >= tokenizer.vocab_size or int(sample.min()) < 0:
            wrong = int(((sample >= tokenizer.vocab_size) | (sample < 0)).argmax())
            raise source.train.out_of_range(wrong, tokenizer.vocab_size)
