"""Settings of softmax attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lmtrain.errors import UsageError
from lmtrain.model.answers import Answers
from lmtrain.model.rope import RopeScaling
from lmtrain.model.settings import at_least, positive
from lmtrain.ops.op import Cost


@dataclass(frozen=True)
class AttentionConfig(Answers):
    """Softmax attention mixer."""

    num_heads: int
    """Query heads."""
    kind: str = "attention"
    """attention"""
    num_kv_heads: int | None = None
    """Key and value heads; default: num_heads."""
    head_dim: int | None = None
    """Channels per head; default: d_model / num_heads."""
    rope: bool = True
    """Rotary positions; false: none (NoPE)."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths."""
    rope_fraction: float = 1.0
    """Part of a head's channels that turn, from the first."""
    rope_interleaved: bool = False
    """Turn pairs (2i, 2i + 1) instead of halves (i, i + K/2)."""
    rope_scaling: RopeScaling | None = None
    """Slower rotations for a longer context: llama3 or yarn; null: none."""
    qk_norm: bool = False
    """RMSNorm of queries and keys before the rotation (Qwen3)."""
    qk_norm_over: Literal["head", "all"] = "head"
    """head: each head by itself; all: the heads together (OLMo-2)."""
    qk_norm_eps: float = 1e-6
    """Added to the mean square of the query and key norms."""
    window: int | None = None
    """Tokens a query sees, itself included; null: its whole document."""
    bias: Literal["none", "qkv", "out", "all"] = "none"
    """Projections with a bias: query, key and value (qkv, Qwen2), the output (out, Griffin), or all four (gpt-oss)."""
    softcap: float | None = None
    """Scores become softcap tanh(score / softcap); null: as they are."""
    sinks: bool = False
    """One learned logit per head that takes part in the softmax and has no value (gpt-oss)."""
    output_gate: bool = False
    """Multiply every head's output by a sigmoid of the input (Qwen3-Next)."""
    persistent: int = 0
    """Learned keys and values per head that every token sees (arXiv 1907.01470)."""
    head_embedding: Literal["none", "add", "mul"] = "none"
    """One projection for all heads, told apart by an embedding per head: x W + e, or x W * (1 + e). Without rope, e of
    the keys under add changes no score of one query: what acts is that of queries and values."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_heads", "num_kv_heads", "head_dim", "window")
        at_least(self, 0, "persistent")
        if self.num_heads % self.kv_heads:
            raise UsageError(f"attention: num_kv_heads {self.kv_heads} does not divide num_heads {self.num_heads}")
        if not 0 < self.rope_fraction <= 1:
            raise UsageError(f"attention: rope_fraction: expected more than 0 and at most 1, got {self.rope_fraction}")
        positive(self, "rope_theta", "qk_norm_eps", "softcap")
        if self.rope_scaling is not None and not self.rope:
            raise UsageError("attention: rope_scaling: nothing turns without rope; leave one of them out")
        if self.head_embedding != "none" and (self.qk_norm or self.bias != "none"):
            raise UsageError("attention: head_embedding has one projection for all heads; leave out qk_norm and bias")

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def biased(self) -> str:
        """Letters of the projections that have a bias."""
        return {"none": "", "qkv": "qkv", "out": "o", "all": "qkvo"}[self.bias]

    def width(self, d_model: int) -> int:
        """Channels per head. Raises UsageError where it is neither given nor a whole number, or odd under rope."""
        if self.head_dim is None and d_model % self.num_heads:
            lower = max(h for h in range(1, self.num_heads + 1) if d_model % h == 0)
            raise UsageError(
                f"attention: d_model {d_model} does not divide by num_heads {self.num_heads}; "
                f"set head_dim, or num_heads {lower}"
            )
        width = self.head_dim or d_model // self.num_heads
        if self.rope and (int(width * self.rope_fraction) % 2 or width * self.rope_fraction < 2):
            turned = "" if self.rope_fraction == 1 else f" of which {self.rope_fraction:g} turn"
            raise UsageError(f"attention: rope needs an even head_dim, got {width}{turned}")
        return width

    def scan_cost(self, d_model: int, seq_len: int) -> Cost:
        """Two products per query, head and key: of all keys as executed, of those seen by definition."""
        span = min(self.window or seq_len, seq_len)
        seen = span * seq_len - span * (span - 1) // 2  # pairs of query and key
        pair = 4 * self.num_heads * self.width(d_model)
        extra = self.persistent * seq_len
        return Cost(pair * (seen + extra), pair * (seq_len**2 + extra), 0)

    def state_bytes(self, d_model: int, batch: int, seq_len: int) -> int:
        kept = seq_len if self.window is None else min(seq_len, self.window - 1)
        return 4 * batch * kept * 2 * self.kv_heads * self.width(d_model)
