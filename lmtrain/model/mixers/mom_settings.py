"""Settings of a mixture of memories."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lmtrain.errors import UsageError
from lmtrain.model.answers import Answers
from lmtrain.model.settings import at_least, taps
from lmtrain.ops import delta
from lmtrain.ops.op import Cost


@dataclass(frozen=True)
class MoMConfig(Answers):
    """Mixture-of-memories mixer. Every token passes the projections of all memories, used or not."""

    kind: str = "mom"
    """mom"""
    num_memories: int = 4
    """Memories that tokens are routed to."""
    top_k: int = 2
    """Memories that a token uses; with 1, of weight 1, the router learns from the balancing loss alone."""
    shared_memory: bool = True
    """One more memory, which every token uses."""
    num_heads: int = 4
    """Heads of every memory."""
    head_dim: int = 256
    """Channels per head of queries and keys."""
    value_dim: int = 256
    """Channels per head of values."""
    conv_width: int = 4
    """Taps of the short convolutions."""
    aux_weight: float = 0.01
    """Weight of the loss that balances the memories, as moe's; 0: none."""
    norm_eps: float = 1e-5
    """Added to the mean square of the norm over each head."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_memories", "top_k", "num_heads", "head_dim", "value_dim")
        taps(self)
        at_least(self, 0, "aux_weight")
        if self.top_k > self.num_memories:
            raise UsageError(f"mom: top_k: expected at most num_memories {self.num_memories}, got {self.top_k}")

    @property
    def memories(self) -> int:
        """The shared one included."""
        return self.num_memories + self.shared_memory

    def scan_cost(self, d_model: int, seq_len: int) -> Cost:
        def of(memories: int) -> Cost:
            rates = (1, seq_len, memories * self.num_heads)
            keys = (*rates, self.head_dim)
            return delta.cost((*rates, self.value_dim), keys, keys, rates, rates)

        executed = of(self.memories)
        return replace(executed, model_flops=of(self.top_k + self.shared_memory).model_flops)
