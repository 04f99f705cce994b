"""Settings of the data room: what is read, in which proportion, in which lengths."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class SourceConfig:
    """One source of training text."""

    path: str
    """A folder made by launch/prepare.py, or the prefix of a Megatron .bin/.idx pair."""
    weight: float = 1.0
    """Share of the blocks, relative to the other sources."""


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
    max_epochs: float = 16.0
    """Refuse a run that reads a source more often than this."""
