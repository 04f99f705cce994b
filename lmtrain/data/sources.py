"""Opening the data a recipe names: prepared folders and foreign ``.bin/.idx`` pairs, and what to say when they miss."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lmtrain.data.config import DataConfig
from lmtrain.data.manifest import NAME, Manifest, file_digest
from lmtrain.data.store import Store
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import DataError, LmtrainError, nearest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A source of training text. ``heldout`` and ``manifest`` are None for a foreign pair."""

    name: str
    path: str
    train: Store
    heldout: Store | None = None
    manifest: Manifest | None = None


def open_sources(cfg: DataConfig, tokenizer: Tokenizer) -> list[Source]:
    """All sources of ``cfg``, in its order; each held to ``tokenizer``. Raises DataError for the first that is not."""
    if not cfg.sources:
        raise DataError(f"data.sources: none given; {_prepare_command('NAME', 'data/x')}")
    sources = []
    for name, source in cfg.sources.items():
        opened = _open(name, source.path)
        _check_tokenizer(opened, tokenizer)
        sources.append(opened)
    return sources


def check_sources(cfg: DataConfig) -> list[str]:
    """What is wrong with the tokenizer or the sources, a sentence each, all of them; nothing is raised."""
    problems = []
    tokenizer = None
    try:
        tokenizer = Tokenizer.load(cfg.tokenizer)
    except LmtrainError as error:
        problems.append(f"data.tokenizer: {error}")
    for name, source in cfg.sources.items():
        try:
            opened = _open(name, source.path)
            if tokenizer is not None:
                _check_tokenizer(opened, tokenizer)
        except LmtrainError as error:
            problems.append(str(error))
    if not cfg.sources:
        problems.append("data.sources: none given")
    return problems


def _open(name: str, path: str) -> Source:
    folder = Path(path)
    if (folder / NAME).is_file():
        manifest = Manifest.read(folder)
        for split in ("train", "heldout"):
            # Small and read at open anyway: a damaged border between documents would otherwise go unseen.
            index = folder / f"{split}.idx"
            if index.is_file() and file_digest(index) != manifest.file(index.name).xxh3_128:
                raise DataError(f"{index}: differs from the manifest; see python launch/prepare.py verify {path}")
        return Source(name, path, _store(name, folder / "train"), _store(name, folder / "heldout"), manifest)
    prefix = folder / "train" if (folder / "train.idx").is_file() else folder
    store = _store(name, prefix)
    _warn_foreign(name, path)
    return Source(name, path, store)


@cache
def _warn_foreign(name: str, path: str) -> None:
    """Once per process, however often the source is opened."""
    log.warning("data.sources.%s: %s has no %s; its tokenizer is taken on trust", name, path, NAME)


def _store(name: str, prefix: Path) -> Store:
    for suffix in (".idx", ".bin"):
        if not os.path.exists(f"{prefix}{suffix}"):
            raise DataError(
                f"data.sources.{name}.path: {prefix}{suffix} is missing{_sibling(prefix)}; "
                f"{_prepare_command(name, str(prefix.parent.parent if prefix.name == 'train' else prefix.parent))}"
            )
    return Store(prefix)


def _sibling(prefix: Path) -> str:
    """The nearest readable source beside the missing one."""
    if not prefix.parent.is_dir():
        return "; there is no such folder"
    pairs = [entry.name.removesuffix(".idx") for entry in prefix.parent.glob("*.idx")]
    folders = [entry.parent.name for entry in prefix.parent.glob(f"*/{NAME}")]
    return nearest(prefix.name, {*pairs, *folders})


def _prepare_command(name: str, out: str) -> str:
    return f"make it with: python launch/prepare.py out={out} tokenizer=train:8192 sources.{name}.path=YOUR_TEXT"


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
