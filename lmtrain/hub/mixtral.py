"""Mixtral: Mistral with a mixture of experts in every layer. What it shares with Qwen3Moe is here.

On disk: one tensor per expert, of which ``w1`` is the gate, ``w3`` the way up and ``w2`` the way down.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from lmtrain.hub.experts import BALANCING, NUMBERED, PROJECTIONS, biased, experts, router
from lmtrain.hub.layers import unless
from lmtrain.hub.llama import HEAD, MLP, OUTSIDE, Llama
from lmtrain.hub.mistral import Mistral
from lmtrain.hub.settings import differing, distinct
from lmtrain.hub.table import Rule
from lmtrain.model.config import ModelConfig
from lmtrain.model.ffn.mlp import MLPConfig
from lmtrain.model.ffn.moe_settings import MoEConfig


def mixture_reasons(settings: list[MoEConfig]) -> list[str]:
    """Why a mixture of experts is none of a softmax router without shared experts."""
    found = unless("moe", settings, activation="swiglu", router="softmax", scale=1.0, num_shared=0)
    return found + biased(settings) + differing("moe", settings, except_for=BALANCING)


def mixture_rules(moe: MoEConfig, prefix: str, projections: Mapping[str, str]) -> list[Rule]:
    """Its table, below ``prefix``; ``projections``: our matrices of an expert and their names on disk."""
    return [MLP[0], router(f"{prefix}.gate.weight"), *experts(moe, f"{prefix}.experts", projections)]


class Mixture(Llama):
    """What the classes with mixtures share: in every second place stands one of ``ffn``."""

    ffn: ClassVar[tuple[str, ...]] = ("moe",)
    prefix: ClassVar[str] = "mlp"
    """Of a mixture on disk."""
    projections: ClassVar[dict[str, str]] = PROJECTIONS
    """Our matrices of an expert and their names on disk."""

    def reasons(self, cfg: ModelConfig) -> list[str]:
        return super().reasons(cfg) + mixture_reasons(distinct(cfg, "moe"))

    def _order(self, cfg: ModelConfig) -> list[str]:
        kinds = [cfg.branches[name].kind for name in cfg.order()]
        others = sorted(set(kinds) - {"attention", *self.ffn})
        if others:
            return [f"no {kind}" for kind in others]
        repeated = len(kinds) % 2 == 0 and set(kinds[::2]) == {"attention"} and set(kinds[1::2]) <= set(self.ffn)
        found = [] if repeated else [f"the order is not (attention {' or '.join(self.ffn)}) repeated"]
        return found if "moe" in kinds else [*found, "there is no moe"]

    def rules(self, cfg: ModelConfig) -> list[Rule]:
        found = list(OUTSIDE) if cfg.tie_embeddings else [*OUTSIDE, HEAD]
        fixed = {"attention": self.attention, "mlp": self.mlp}
        for index, name in enumerate(cfg.order()):
            one = cfg.branches[name]
            mixture = one.kind == "moe"
            table = mixture_rules(one, self.prefix, self.projections) if mixture else fixed[one.kind]
            found += [rule.at(f"blocks.{index}.", f"model.layers.{index // 2}.") for rule in table]
        return found

    def config(self, cfg: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
        """As of a model with one expert in place of each mixture, and what says that there are more."""
        alone = {name: MLPConfig(d_ff=one.d_expert) if one.kind == "moe" else one for name, one in cfg.branches.items()}
        moe: MoEConfig = distinct(cfg, "moe")[0]
        return super().config(dataclasses.replace(cfg, branches=alone), vocab_size, seq_len) | {
            "num_experts_per_tok": moe.top_k,
            "output_router_logits": False,
            "router_aux_loss_coef": moe.aux_weight,
        }


class Mixtral(Mixture, Mistral):
    """See the module."""

    name = "Mixtral"
    model_type = "mixtral"
    prefix: ClassVar[str] = "block_sparse_moe"
    projections: ClassVar[dict[str, str]] = NUMBERED

    def reasons(self, cfg: ModelConfig) -> list[str]:
        return super().reasons(cfg) + unless("moe", distinct(cfg, "moe"), normalise_weights=True)

    def config(self, cfg: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
        count = distinct(cfg, "moe")[0].num_experts
        return super().config(cfg, vocab_size, seq_len) | {"num_local_experts": count, "router_jitter_noise": 0.0}
