"""DeepseekV3: latent attention; SwiGLU in the first layers, then a mixture of experts in groups.

Facts of transformers 5.23: keys and values come from one matrix, packed by head; the norms of the latents have an
epsilon of 1e-6 of their own, as ours; the rotary channels turn in pairs (2i, 2i + 1), as ours; there always are a
selection bias and shared experts, whose width is a multiple of a routed one's. KimiLinear has the same attention,
without positions, and the same experts.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from lmtrain.hub.experts import BALANCING, experts, shared
from lmtrain.hub.layers import Layered, unless
from lmtrain.hub.llama import MLP
from lmtrain.hub.settings import differing, distinct, usual
from lmtrain.hub.table import CONCAT, KNOWN, Rule, Transform, by_head, same
from lmtrain.model.config import ModelConfig
from lmtrain.model.ffn.moe_settings import MoEConfig
from lmtrain.model.mixers.mla import MLAConfig

MLA_SETTINGS = "kind num_heads kv_rank q_rank nope_dim rope_dim value_dim rope rope_theta"
MOE_SETTINGS = f"{KNOWN['moe']} num_groups top_groups"
FIRST_NORM = same("norm.weight", "input_layernorm.weight")
SECOND_NORM = same("norm.weight", "post_attention_layernorm.weight")
ZERO_BIAS = Transform(
    lambda ours: [ours[0], torch.zeros_like(ours[1])], lambda disk, shapes: [disk[0], torch.zeros_like(disk[1])]
)
"""A router whose selection bias takes no part in the choice, and must not do so there."""


def moe_reasons(settings: list[MoEConfig]) -> list[str]:
    """Why a mixture of experts is not the one of DeepSeek."""
    found = unless("moe", settings, activation="swiglu", router="sigmoid")
    for one in settings:
        width = one.shared.d_ff if one.shared else 0
        if not width or width % one.d_expert:
            found.append(
                f"moe: its shared experts are {width} wide together, it has a multiple of d_expert {one.d_expert}"
            )
        if one.num_experts // one.num_groups < 2:
            found.append(f"moe.num_groups is {one.num_groups}, it needs two experts in each")
    return found + differing("moe", settings, except_for=BALANCING)


def mla_rules(mla: MLAConfig) -> list[Rule]:
    """Latent attention below ``self_attn.``."""
    query = [same("branch.q.weight", "self_attn.q_proj.weight")]
    if mla.q_rank is not None:
        query = [
            same("branch.q_down.weight", "self_attn.q_a_proj.weight"),
            same("branch.q_norm.weight", "self_attn.q_a_layernorm.weight"),
            same("branch.q.weight", "self_attn.q_b_proj.weight"),
        ]
    return [
        *query,
        Rule(("branch.latent.weight", "branch.k_rope.weight"), ("self_attn.kv_a_proj_with_mqa.weight",), CONCAT),
        same("branch.latent_norm.weight", "self_attn.kv_a_layernorm.weight"),
        Rule(("branch.k.weight", "branch.v.weight"), ("self_attn.kv_b_proj.weight",), by_head(mla.num_heads)),
        same("branch.o.weight", "self_attn.o_proj.weight"),
    ]


def mla_config(mla: MLAConfig) -> dict[str, Any]:
    return {
        "num_attention_heads": mla.num_heads,
        "num_key_value_heads": mla.num_heads,
        "q_lora_rank": mla.q_rank,
        "kv_lora_rank": mla.kv_rank,
        "qk_nope_head_dim": mla.nope_dim,
        "qk_rope_head_dim": mla.rope_dim,
        "v_head_dim": mla.value_dim,
    }


def router_rule(moe: MoEConfig, prefix: str) -> Rule:
    disk = (f"{prefix}.weight", f"{prefix}.e_score_correction_bias")
    ours = ("branch.router.weight", "branch.router_bias")
    return Rule(ours, disk, keep_fp32=True) if moe.balance == "bias" else Rule(ours, disk, ZERO_BIAS, keep_fp32=True)


def moe_config(moe: MoEConfig) -> dict[str, Any]:
    """What DeepseekV3 and KimiLinear call alike."""
    assert moe.shared is not None
    return {
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.d_expert,
        "n_shared_experts": moe.shared.d_ff // moe.d_expert,
        "n_group": moe.num_groups,
        "topk_group": moe.top_groups,
        "norm_topk_prob": moe.normalise_weights,
        "routed_scaling_factor": moe.scale,
    }


class DeepseekV3(Layered):
    """See the module."""

    name = "DeepseekV3"
    model_type = "deepseek_v3"
    mixers = ("mla",)
    feed_forwards = ("mlp", "moe")
    knows: ClassVar[dict[str, str]] = {"mla": MLA_SETTINGS, "moe": MOE_SETTINGS}

    def reasons(self, cfg: ModelConfig) -> list[str]:
        mla, mlp = distinct(cfg, "mla"), distinct(cfg, "mlp")
        found = self.order_reasons(cfg)
        kinds = [cfg.branches[name].kind for name in cfg.order() if cfg.branches[name].kind in self.feed_forwards]
        found += ["mlp stands after moe, its dense layers are the first"] * (
            kinds != sorted(kinds, key=self.feed_forwards.index)
        )
        found += unless("mla", mla, rope=True) + unless("mlp", mlp, activation="swiglu")
        return found + differing("mla", mla) + differing("mlp", mlp) + moe_reasons(distinct(cfg, "moe"))

    def block(self, cfg: ModelConfig, settings: Any) -> list[Rule]:
        if settings.kind == "mla":
            return [FIRST_NORM, *mla_rules(settings)]
        if settings.kind == "mlp":
            return MLP
        moe = [router_rule(settings, "mlp.gate"), *experts(settings, "mlp.experts"), *shared("mlp.shared_experts")]
        return [SECOND_NORM, *moe]

    def config(self, cfg: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
        layers = self.layers(cfg)
        mla: MLAConfig = distinct(cfg, "mla")[0]
        settings: dict[str, Any] = {
            **usual(cfg, vocab_size, seq_len),
            "num_hidden_layers": len(layers),
            "first_k_dense_replace": sum(ffn.kind == "mlp" for _, ffn in layers),
            "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": mla.rope_theta},
            "rope_theta": mla.rope_theta,  # where transformers 4 and llama.cpp look
            "rope_interleave": True,
            "num_mtp_layers": 0,
            "pretraining_tp": 1,
            "output_router_logits": False,
        } | mla_config(mla)
        for mlp in distinct(cfg, "mlp")[:1]:
            settings["intermediate_size"] = mlp.d_ff
        for moe in distinct(cfg, "moe")[:1]:
            settings |= {"n_routed_experts": moe.num_experts} | moe_config(moe)
        return settings
