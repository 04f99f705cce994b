"""Settings of the data room: what is read, in which proportion, in which lengths."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lmtrain.data.order.steps import check_ramp
from lmtrain.data.policies.config import PolicyConfig


@dataclass(frozen=True)
class SourceConfig:
    """One source of training text."""

    path: str | None = None
    """A folder made by launch/prepare.py, the prefix of a Megatron .bin/.idx pair, or a .ds or flat .npy file."""
    weight: float = 1.0
    """Share of the blocks, relative to the other sources."""
    synthetic: str | None = None
    """Instead of a path: package.module:function, which makes document i (docs/data.md)."""
    arguments: dict[str, int | float | str | bool] = field(default_factory=dict)
    """synthetic: further arguments of the function."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.synthetic is None):
            raise ValueError("path: give a folder made by launch/prepare.py, or synthetic; one of them")
        if self.arguments and self.synthetic is None:
            raise ValueError("arguments: are those of a synthetic source; this one has a path")
        if self.weight < 0:
            raise ValueError(f"weight: must not be negative, got {self.weight}")


@dataclass(frozen=True)
class DataConfig:
    """What is read."""

    tokenizer: str
    """Path of a tokenizer.json (Hugging Face tokenizers) or .model (sentencepiece)."""
    seq_len: int
    """Tokens in a row."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Named sources; names are part of the data order, adding one does not reorder the others."""
    block_tokens: int | None = None
    """Unit of sampling in tokens, the longest seq_len of the run; a multiple of seq_len. Default: seq_len."""
    packing: Literal["concat", "best_fit", "unpacked"] = "concat"
    """Documents in blocks: end to end; whole ones by launch/prepare.py pack; one per block, the rest padding."""
    run_blocks: int = 1
    """Stateful training: rows go on with the state of the block before, in runs of so many blocks of one source. 1:
    every block begins without state."""
    max_epochs: float = 16.0
    """Refuse a run that reads a source more often than this."""
    seq_lens: list[tuple[int, int]] = field(default_factory=list)
    """Length curriculum: pairs [tokens read, tokens in a row] from 0 tokens on; the last length is seq_len."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """The first mixture, and what changes it during the run."""

    @property
    def block_length(self) -> int:
        """Tokens of a block."""
        return self.block_tokens or self.seq_len

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise ValueError(f"seq_len: must be at least 1, got {self.seq_len}")
        if self.block_tokens is not None and (self.block_tokens < 1 or self.block_tokens % self.seq_len):
            raise ValueError(f"block_tokens: must be a multiple of seq_len {self.seq_len}, got {self.block_tokens}")
        check_ramp("seq_lens", self.seq_lens, self.seq_len, "seq_len")
        for _, length in self.seq_lens:
            if self.block_length % length:
                raise ValueError(
                    f"seq_lens: {length} does not divide a block of {self.block_length} tokens (block_tokens, by "
                    "default seq_len)"
                )
        self._check_runs()
        if self.max_epochs <= 0:
            raise ValueError(f"max_epochs: must be positive, got {self.max_epochs}")
        for name in self.sources:
            if not name.isidentifier():
                raise ValueError(
                    f"sources: {name!r} is no name; use letters, digits and _ (it becomes a metric's name)"
                )
        endless = [name for name, source in self.sources.items() if source.synthetic and source.weight > 0]
        if self.policy.first in ("proportional", "temperature") and endless:
            raise ValueError(
                f"policy.first: {self.policy.first} goes by the tokens a source has; source {endless[0]} is synthetic "
                "and has no end: use weights or unimax, or give it weight 0"
            )
        if self.sources and not any(source.weight for source in self.sources.values()):
            raise ValueError("sources: every weight is 0; give at least one source a positive weight")

    def _check_runs(self) -> None:
        if self.run_blocks < 1:
            raise ValueError(f"run_blocks: must be at least 1, got {self.run_blocks}")
        if self.run_blocks == 1:
            return
        if self.packing != "concat":
            raise ValueError(
                f"run_blocks: with packing {self.packing} no document goes on in the next block; use packing: concat, "
                "or run_blocks: 1"
            )
        if made := [name for name, source in self.sources.items() if source.synthetic]:
            raise ValueError(
                f"run_blocks: no document of the synthetic source {made[0]} goes on in the next block; leave the "
                "source out, or use run_blocks: 1"
            )
        if self.seq_lens or self.block_length != self.seq_len:
            key = "seq_lens" if self.seq_lens else "block_tokens"
            raise ValueError(
                f"run_blocks: {key} makes several rows of a block, which are read side by side and not one after the "
                f"other; leave out {key}, or use run_blocks: 1"
            )
