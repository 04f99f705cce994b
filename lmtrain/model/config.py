"""Settings of a language model: named branches and the order they stand in."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from lmtrain.errors import nearest
from lmtrain.model.block import Multipliers, NormPlace
from lmtrain.model.norm import NormKind
from lmtrain.model.pattern import Blocks, expand


@dataclass(frozen=True)
class ModelConfig:
    """A model is a list of residual branches between an embedding and a head."""

    d_model: int
    """Width of the residual stream."""
    branches: dict[str, Any] = field(default_factory=dict)
    """Named branches; each has a ``kind`` and that kind's settings."""
    pattern: str | list[str] = ""
    """Order of the branches, e.g. "2 * (ssm mlp ssm mlp local mlp)", or a list of names; "ssm + local" side by side."""
    vocab_size: int | None = None
    """Rows of the embedding; default: the tokenizer's size rounded up to ``vocab_multiple``."""
    vocab_multiple: int = 128
    """Divisor of the default ``vocab_size``."""
    tie_embeddings: bool = False
    """The head reads the embedding's weight."""
    norm: NormKind = "rms"
    """rms, or layer (LayerNorm with bias)."""
    norm_eps: float = 1e-5
    """Added to the mean square in every norm of the residual stream."""
    norm_place: NormPlace = "pre"
    """pre: x + f(N(x)). post: x + N(f(x)). sandwich: both. through: N(x) + f(N(x))."""
    embedding_norm: bool = False
    """Normalise the embedding too (RWKV)."""
    embedding_scale: float = 1.0
    """Factor of the embedding's output."""
    logit_scale: float = 1.0
    """Factor of the logits."""
    logit_softcap: float | None = None
    """Logits become softcap tanh(logit / softcap) (Gemma, Griffin); null: as they are."""
    multipliers: dict[str, Multipliers] = field(default_factory=dict)
    """Constant factors around the branches of a name."""
    init_std: float = 0.02
    """Standard deviation of the embedding's and the head's initial weights."""

    def __post_init__(self) -> None:
        for key in ("d_model", "vocab_size", "vocab_multiple"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key}: must be at least 1, got {value}")
        for key in ("norm_eps", "init_std"):
            if getattr(self, key) <= 0:
                raise ValueError(f"{key}: must be positive, got {getattr(self, key)}")
        if self.logit_softcap is not None and self.logit_softcap <= 0:
            raise ValueError(f"logit_softcap: must be positive, got {self.logit_softcap}")
        for name in self.multipliers:
            if name not in self.branches:
                raise ValueError(f"multipliers: no branch is named {name!r}{nearest(name, self.branches)}")
            if self.multipliers[name].skip != 1 and any(len(b) > 1 and name in b for b in self.blocks()):
                raise ValueError(f"multipliers.{name}.skip: branches side by side share one residual; leave it at 1")

    def blocks(self) -> Blocks:
        """Names of the branches of each block, in order: one, or several side by side."""
        return expand(self.pattern, self.branches)

    def order(self) -> list[str]:
        """Branch names in the order they stand."""
        return [name for block in self.blocks() for name in block]

    @property
    def num_norms(self) -> int:
        """Norms of the residual stream."""
        return len(self.blocks()) * (2 if self.norm_place == "sandwich" else 1) + 1 + self.embedding_norm

    def num_params(self, vocab_size: int, active: bool = False) -> int:
        """Parameters of the built model; ``active``: those a token uses."""
        seen, branches = Counter[str](), 0
        for settings in (self.branches[name] for name in self.order()):
            branches += settings.num_params(self.d_model, active, seen[settings.kind])
            seen[settings.kind] += 1
        norms = self.num_norms * self.d_model * (2 if self.norm == "layer" else 1)
        return branches + norms + vocab_size * self.d_model * (1 if self.tie_embeddings else 2)

    def flops_per_token(self, vocab_size: int, seq_len: int, executed: bool = False) -> int:
        """Training FLOPs per token, forward and backward (three forward passes), without the norms."""
        forward = sum(self.branches[n].flops_per_token(self.d_model, seq_len, executed) for n in self.order())
        return 3 * (forward + 2 * vocab_size * self.d_model)

    def state_bytes(self, batch: int, seq_len: int) -> int:
        """Bytes of carried state of ``batch`` sequences after ``seq_len`` tokens."""
        return sum(self.branches[name].state_bytes(self.d_model, batch, seq_len) for name in self.order())
