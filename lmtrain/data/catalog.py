"""The sources that a run trains on, as blocks: those of the recipe, then those that came during the run."""

from __future__ import annotations

from collections.abc import Sequence

from lmtrain.data.blocks.blocks import Blocks, ConcatBlocks
from lmtrain.data.blocks.packing import BestFitBlocks, UnpackedBlocks
from lmtrain.data.blocks.synthetic import SyntheticBlocks
from lmtrain.data.config import DataConfig
from lmtrain.data.order.schedule import AddedSource, Event
from lmtrain.data.sources import Source, bytes_per_token, content_digest, open_source, open_sources, open_train
from lmtrain.data.store.store import Store
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import DataError, UsageError, nearest


class Catalog:
    """Raises DataError for the first source of ``cfg`` that cannot be read or was made with another tokenizer.

    blocks, bytes_per_token (UTF-8 text, on average; 1 where there is no text): by name, in the order of source ids.
    added: those that came later. seed: of the run.
    """

    def __init__(self, cfg: DataConfig, tokenizer: Tokenizer, seed: int) -> None:
        self.cfg, self.tokenizer = cfg, tokenizer
        self.blocks: dict[str, Blocks] = {}
        self.bytes_per_token: dict[str, float] = {}
        self.added: dict[str, AddedSource] = {}
        stored = {source.name: source for source in open_sources(cfg, tokenizer)}
        for name, settings in cfg.sources.items():
            if settings.synthetic is None:
                self._take(stored[name])
            else:
                self.blocks[name] = SyntheticBlocks(
                    name, settings.synthetic, cfg.block_length, seed, settings.arguments
                )
                self.bytes_per_token[name] = 1.0

    def sizes(self) -> dict[str, int]:
        """Blocks of one epoch by name."""
        return {name: blocks.num_blocks for name, blocks in self.blocks.items()}

    def check(self, events: Sequence[Event]) -> tuple[list[Source], dict[str, int]]:
        """The sources that ``events`` add, opened but not taken, and their blocks by name.

        Raises UsageError or DataError for one that cannot be read, or a mixture that names what cannot be.
        """
        opened: list[Source] = []
        new: dict[str, int] = {}
        for event in events:
            for name, added in event.sources.items():
                if name in self.blocks:
                    raise UsageError(f"the schedule adds source {name}, which there is; give it another name")
                opened.append(self._open(name, added))
                new[name] = packed(opened[-1].train, self.cfg).num_blocks
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
        return opened, new

    def add(self, events: Sequence[Event]) -> dict[str, int]:
        """Take the sources that ``events`` add, with the next ids; their blocks by name. An error changes nothing."""
        opened, new = self.check(events)
        self.added |= {name: added for event in events for name, added in event.sources.items()}
        for source in opened:
            self._take(source)
        return new

    def _open(self, name: str, added: AddedSource) -> Source:
        _check_content(name, added)
        return open_source(name, added.path, self.tokenizer)

    def _take(self, source: Source) -> None:
        self.blocks[source.name] = packed(source.train, self.cfg)
        self.bytes_per_token[source.name] = bytes_per_token(source, self.tokenizer)


def packed(store: Store, cfg: DataConfig) -> Blocks:
    """The documents of ``store`` in blocks, as ``data.packing`` says."""
    match cfg.packing:
        case "best_fit":
            return BestFitBlocks(store, cfg.block_length)
        case "unpacked":
            return UnpackedBlocks(store, cfg.block_length)
        case "concat":
            return ConcatBlocks(store, cfg.block_length)


def open_added(cfg: DataConfig, name: str, added: AddedSource) -> Blocks:
    """The blocks of a source that the main process has checked, in a process of its own.

    Raises DataError if the content is another by now.
    """
    _check_content(name, added)
    return packed(open_train(name, added.path, cfg), cfg)


def _check_content(name: str, added: AddedSource) -> None:
    found = content_digest(added.path)
    if found != added.digest:
        raise DataError(
            f"{added.path}: the content differs from that of source {name} in the schedule (digest {found[:12]}, "
            f"expected {added.digest[:12]}); put the old data back"
        )
