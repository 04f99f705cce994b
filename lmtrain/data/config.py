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

    def __post_init__(self) -> None:
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
    max_epochs: float = 16.0
    """Refuse a run that reads a source more often than this."""

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise ValueError(f"seq_len: must be at least 1, got {self.seq_len}")
        if self.block_tokens is not None and (self.block_tokens < 1 or self.block_tokens % self.seq_len):
            raise ValueError(f"block_tokens: must be a multiple of seq_len {self.seq_len}, got {self.block_tokens}")
        if self.max_epochs <= 0:
            raise ValueError(f"max_epochs: must be positive, got {self.max_epochs}")
        for name in self.sources:
            if not name.isidentifier():
                raise ValueError(
                    f"sources: {name!r} is no name; use letters, digits and _ (it becomes a metric's name)"
                )
        if self.sources and not any(source.weight for source in self.sources.values()):
            raise ValueError("sources: every weight is 0; give at least one source a positive weight")
