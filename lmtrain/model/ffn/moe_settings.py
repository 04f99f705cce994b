"""Settings of a mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lmtrain.errors import UsageError
from lmtrain.model.ffn.mlp import GATED, Activation, MLPConfig
from lmtrain.model.settings import at_least, positive


@dataclass(frozen=True)
class MoEConfig:
    """Mixture-of-experts branch."""

    num_experts: int
    """Routed experts."""
    top_k: int
    """Experts a token uses."""
    d_expert: int
    """Hidden width of a routed expert."""
    kind: str = "moe"
    """moe"""
    num_shared: int = 0
    """Shared experts, which every token uses; together they are one MLP."""
    d_shared: int | None = None
    """Hidden width of one shared expert; default: d_expert."""
    shared_gate: bool = False
    """Multiply what the shared experts give by a sigmoid of the input (Qwen3-Next)."""
    activation: Activation = "swiglu"
    """As in mlp."""
    bias: bool = False
    """Biases in the routed experts and the router (gpt-oss)."""
    router: Literal["softmax", "sigmoid", "expert_choice"] = "softmax"
    """How scores become weights: softmax over all experts, or a sigmoid of each."""
    normalise_weights: bool = True
    """Divide the chosen weights by their sum; not with top_k 1."""
    scale: float = 1.0
    """Factor on the routed experts' sum."""
    num_groups: int = 1
    """Groups that the experts stand in, one after another."""
    top_groups: int = 1
    """Groups that a token's experts come from."""
    balance: Literal["aux", "bias", "none"] = "aux"
    """aux: a loss per row; bias: a selection bias moved once per step; none."""
    aux_weight: float = 0.01
    """Weight of the balancing loss."""
    bias_rate: float = 1e-3
    """How far the selection bias moves in a step."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_experts", "top_k", "d_expert", "num_groups", "top_groups")
        at_least(self, 0, "num_shared", "aux_weight", "bias_rate")
        positive(self, "scale")
        if self.top_k > self.num_experts:
            raise UsageError(f"moe: top_k: expected at most num_experts {self.num_experts}, got {self.top_k}")
        if self.d_shared is not None and (self.d_shared < 1 or not self.num_shared):
            raise UsageError(f"moe: d_shared {self.d_shared}: it needs at least 1, and num_shared of at least 1")
        if self.top_k == 1 and self.num_experts > 1 and self.normalise_weights:
            raise UsageError(
                "moe: top_k 1 with normalise_weights: the weight is always 1, so that the router learns nothing of "
                "what it chooses; set normalise_weights false, or top_k 2"
            )
        if self.shared_gate and not self.num_shared:
            raise UsageError("moe: shared_gate: there are no shared experts; set num_shared")
        if self.router == "expert_choice":
            raise UsageError(
                "moe: router expert_choice: experts that choose among all tokens of a row see later tokens, which a "
                "causal model may not; use router=softmax or sigmoid, with balance=aux or bias"
            )
        self._check_groups()

    def _check_groups(self) -> None:
        groups = self.num_groups
        if self.num_experts % groups:
            raise UsageError(f"moe: num_groups {groups} does not divide num_experts {self.num_experts}")
        if self.top_groups > groups:
            raise UsageError(f"moe: top_groups: expected at most num_groups {groups}, got {self.top_groups}")
        reachable = self.num_experts // groups * self.top_groups
        if groups > 1 and self.top_k > reachable:
            raise UsageError(f"moe: top_k: {self.top_groups} groups hold {reachable} experts, got {self.top_k}")

    @property
    def gated(self) -> bool:
        return self.activation in GATED

    @property
    def shared(self) -> MLPConfig | None:
        """The shared experts as one MLP."""
        width = self.num_shared * (self.d_shared or self.d_expert)
        return MLPConfig(d_ff=width, activation=self.activation) if width else None

    def num_params(self, d_model: int, active: bool = False, of_kind: int = 1) -> int:
        return self._matrices(d_model, active) + self._biases(d_model, active)

    def _matrices(self, d_model: int, active: bool) -> int:
        expert = d_model * self.d_expert * (3 if self.gated else 2)
        shared = self.shared.num_params(d_model) + (d_model if self.shared_gate else 0) if self.shared else 0
        return d_model * self.num_experts + shared + expert * (self.top_k if active else self.num_experts)

    def _biases(self, d_model: int, active: bool) -> int:
        expert = self.d_expert * (2 if self.gated else 1) + d_model
        used = self.top_k if active else self.num_experts
        return self.num_experts + expert * used if self.bias else 0

    def flops_per_token(self, d_model: int, seq_len: int, executed: bool = False) -> int:
        return 2 * self._matrices(d_model, active=True)

    def state_bytes(self, d_model: int, batch: int, seq_len: int) -> int:
        return 0
