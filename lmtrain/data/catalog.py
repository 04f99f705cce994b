"""The sources that a run trains on, as blocks: those of the recipe, then those that came during the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmtrain.data.blocks.blocks import Blocks, ConcatBlocks
from lmtrain.data.blocks.function import DocumentFunction
from lmtrain.data.blocks.packing import BestFitBlocks, UnpackedBlocks
from lmtrain.data.blocks.synthetic import SyntheticBlocks
from lmtrain.data.config import DataConfig
from lmtrain.data.order.schedule import AddedSource, Event
from lmtrain.data.sources import (
    Source,
    bytes_per_token,
    content_digest,
    manifests_of,
    open_source,
    open_sources,
    open_train,
)
from lmtrain.data.store.apart import warn_of_sources_apart
from lmtrain.data.store.store import Store
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import DataError, UsageError, nearest


@dataclass(frozen=True)
class Arrival:
    """A source that came during the run and was checked by the main process, for a process of its own to open.

    seed: of the run.
    """

    name: str
    source: AddedSource
    seed: int

    def blocks(self, cfg: DataConfig) -> Blocks:
        """Raises DataError if the content is another by now."""
        _check_content(self.name, self.source)
        if self.source.path is None:
            return SyntheticBlocks(_function(self.name, self.source), cfg.block_length, self.seed)
        return packed(open_train(self.name, self.source.path, cfg), cfg)


@dataclass(frozen=True)
class Opened:
    """A source as blocks; ``stored`` is None for one without files."""

    name: str
    blocks: Blocks
    bytes_per_token: float
    stored: Source | None


class Catalog:
    """Raises DataError for the first source of ``cfg`` that cannot be read, was made with another tokenizer, or makes
    tokens that the tokenizer does not have; UsageError for a function that cannot be called.

    blocks, bytes_per_token (UTF-8 text, on average; 1 where there is no text): by name, in the order of source ids.
    added, stored: those that came later, and those with files. seed: of the run.
    """

    def __init__(self, cfg: DataConfig, tokenizer: Tokenizer, seed: int) -> None:
        self.cfg, self.tokenizer, self.seed = cfg, tokenizer, seed
        self.blocks: dict[str, Blocks] = {}
        self.bytes_per_token: dict[str, float] = {}
        self.added: dict[str, Arrival] = {}
        self.stored: dict[str, Source] = {}
        stored = {source.name: source for source in open_sources(cfg, tokenizer)}
        for name, settings in cfg.sources.items():
            if settings.synthetic is None:
                self._take(self._packed(stored[name]))
            else:
                self._take(self._made(DocumentFunction(name, settings.synthetic, settings.arguments)))

    def sizes(self) -> dict[str, int]:
        """Blocks of one epoch by name."""
        return {name: blocks.num_blocks for name, blocks in self.blocks.items()}

    def check(self, events: Sequence[Event]) -> tuple[list[Opened], dict[str, int]]:
        """The sources that ``events`` add, opened but not taken, and their blocks by name.

        Raises UsageError or DataError for one that cannot be read, or a mixture that names what cannot be.
        """
        opened: list[Opened] = []
        new: dict[str, int] = {}
        for event in events:
            for name, added in event.sources.items():
                if name in self.blocks:
                    raise UsageError(f"the schedule adds source {name}, which there is; give it another name")
                opened.append(self._open(name, added))
                new[name] = opened[-1].blocks.num_blocks
        sizes = self.sizes() | new
        # an added source without a share too: it may get one, and its epochs are counted
        for name in [*new, *sorted({name for event in events for name in event.weights})]:
            if name not in sizes:
                raise UsageError(f"the schedule names source {name}, data.sources does not{nearest(name, sizes)}")
            if sizes[name] < 1:
                length = self.cfg.block_length
                raise DataError(
                    f"data.sources.{name}: has less than one block, which needs {length + 1:,} tokens "
                    "(data.block_tokens or data.seq_len, and the last target)"
                )
        came = [each.stored for each in opened if each.stored is not None]
        if came:
            warn_of_sources_apart(manifests_of([*self.stored.values(), *came]))
        return opened, new

    def add(self, events: Sequence[Event]) -> dict[str, int]:
        """Take the sources that ``events`` add, with the next ids; their blocks by name. An error changes nothing."""
        opened, new = self.check(events)
        for event in events:
            self.added |= {name: Arrival(name, source, self.seed) for name, source in event.sources.items()}
        for each in opened:
            self._take(each)
        return new

    def _open(self, name: str, added: AddedSource) -> Opened:
        if added.path is None and self.cfg.run_blocks > 1:
            raise UsageError(
                f"the schedule adds source {name}, a function, whose documents go on in no next block: with "
                "data.run_blocks > 1 add the path of prepared data"
            )
        _check_content(name, added)
        if added.path is None:
            return self._made(_function(name, added))
        return self._packed(open_source(name, added.path, self.tokenizer))

    def _packed(self, source: Source) -> Opened:
        return Opened(source.name, packed(source.train, self.cfg), bytes_per_token(source, self.tokenizer), source)

    def _made(self, function: DocumentFunction) -> Opened:
        blocks = SyntheticBlocks(function, self.cfg.block_length, self.seed)
        function.check_vocabulary(self.tokenizer.vocab_size)
        return Opened(function.source, blocks, 1.0, None)

    def _take(self, opened: Opened) -> None:
        self.blocks[opened.name], self.bytes_per_token[opened.name] = opened.blocks, opened.bytes_per_token
        if opened.stored is not None:
            self.stored[opened.name] = opened.stored


def packed(store: Store, cfg: DataConfig) -> Blocks:
    """The documents of ``store`` in blocks, as ``data.packing`` says."""
    match cfg.packing:
        case "best_fit":
            return BestFitBlocks(store, cfg.block_length)
        case "unpacked":
            return UnpackedBlocks(store, cfg.block_length)
        case "concat":
            return ConcatBlocks(store, cfg.block_length)


def added_source(name: str, where: str, arguments: Mapping[str, Any]) -> AddedSource:
    """The source ``name`` at the path, or of the function, ``where``, with its digest. UsageError, DataError."""
    if not is_function(where):
        return AddedSource(where, content_digest(where))
    digest = DocumentFunction(name, where, arguments).digest()
    return AddedSource(None, digest, where, dict(arguments))


def is_function(where: str) -> bool:
    """Whether ``where`` is package.module:function; a path of that form is meant by one that begins with ./ or /."""
    module, colon, function = where.partition(":")
    return bool(colon) and function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def _function(name: str, added: AddedSource) -> DocumentFunction:
    return DocumentFunction(name, added.synthetic or "", added.arguments)


def _check_content(name: str, added: AddedSource) -> None:
    found = _function(name, added).digest() if added.path is None else content_digest(added.path)
    if found == added.digest:
        return
    digests = f"of source {name} in the schedule (digest {found[:12]}, expected {added.digest[:12]})"
    if added.path is None:
        raise DataError(
            f"{added.origin}: makes other documents than those {digests}; put the old function, and the libraries it "
            "draws from, back (one that is not a pure function of its seed and index cannot be a source)"
        )
    raise DataError(f"{added.path}: the content differs from that {digests}; put the old data back")
