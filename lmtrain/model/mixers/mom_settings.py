"""Settings of a mixture of memories."""

from __future__ import annotations

from dataclasses import dataclass

from lmtrain.errors import UsageError
from lmtrain.model.answers import Answers
from lmtrain.model.settings import at_least, positive, taps
from lmtrain.ops import delta, routed_conv
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
        positive(self, "norm_eps")
        if self.top_k > self.num_memories:
            raise UsageError(f"mom: top_k: expected at most num_memories {self.num_memories}, got {self.top_k}")

    @property
    def memories(self) -> int:
        """The shared one included."""
        return self.num_memories + self.shared_memory

    def scan_cost(self, d_model: int, seq_len: int) -> Cost:
        """Of convolutions and delta rule; the model's FLOPs are those of the memories that a token uses."""

        def of(memories: int) -> tuple[Cost, Cost]:
            rates = (1, seq_len, memories * self.num_heads)
            keys = (*rates, self.head_dim)
            routed = (1, seq_len, memories)
            conv = routed_conv.cost((*routed, self._channels), routed, (self._channels, self.conv_width))
            return conv, delta.cost((*rates, self.value_dim), keys, keys, rates, rates)

        executed, model = of(self.memories), of(self.top_k + self.shared_memory)
        return Cost(
            sum(cost.model_flops for cost in model),
            sum(cost.executed_flops for cost in executed),
            sum(cost.bytes for cost in executed),
        )

    def flops_per_token(self, d_model: int, seq_len: int, executed: bool = False) -> int:
        """Without the taps, which are no weights that a token passes once: ``scan_cost`` has them."""
        taps = self._channels * self.conv_width
        return super().flops_per_token(d_model, seq_len, executed) - 2 * taps

    @property
    def _channels(self) -> int:
        """Of q, k and v of one memory."""
        return self.num_heads * (2 * self.head_dim + self.value_dim)
