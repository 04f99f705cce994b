"""GraniteMoeHybrid: Mamba-2 and attention in any order, each followed by SwiGLU, or by experts in every layer.

Facts of transformers 5.23: shared experts always stand beside the routed ones, and are the whole feed-forward where
there are none; the softmax is over the chosen experts alone, which is ours over all, normalised; positions are rotary
or none; scores are multiplied by ``attention_multiplier`` and logits divided by ``logits_scaling``; one
``residual_multiplier`` for all branches. Heads share d_model among them. Without attention it cannot use its cache. On
disk: fused experts, and the legacy names of layers, which llama.cpp knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmtrain.hub.experts import BALANCING, biased, router
from lmtrain.hub.layers import Layered, moved, multipliers, own_head_dim, unless
from lmtrain.hub.llama import ATTENTION
from lmtrain.hub.mamba2 import MIXER, UNLIMITED, mixer_reasons
from lmtrain.hub.settings import differing, distinct, usual
from lmtrain.hub.table import CONCAT, KNOWN, Rule, Shape, Transform, same
from lmtrain.model.config import ModelConfig


def _fused(ours: Sequence[Tensor]) -> list[Tensor]:
    return [torch.cat([experts.mT for experts in ours], dim=1)]


def _parted(disk: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
    return [part.mT.contiguous() for part in disk[0].split([shape[2] for shape in shapes], dim=1)]


FUSED = Transform(_fused, _parted)
"""Tensors ``[E, in, out_i]`` to one ``[E, out, in]``."""
SECOND_NORM = same("norm.weight", "post_attention_layernorm.weight")
MAMBA = [ATTENTION[0], *moved(MIXER[1:], ("", ""), ("mixer.", "mamba."))]


def _feed_forward(branch: str) -> list[Rule]:
    return [
        Rule((f"{branch}.gate.weight", f"{branch}.up.weight"), ("shared_mlp.input_linear.weight",), CONCAT),
        same(f"{branch}.down.weight", "shared_mlp.output_linear.weight"),
    ]


MLP = [SECOND_NORM, *_feed_forward("branch")]
MOE = [
    SECOND_NORM,
    router("block_sparse_moe.router.layer.weight"),
    Rule(("branch.experts.gate", "branch.experts.up"), ("block_sparse_moe.input_linear.weight",), FUSED),
    Rule(("branch.experts.down",), ("block_sparse_moe.output_linear.weight",), FUSED),
    *_feed_forward("branch.shared"),
]
TABLES = {"mamba2": MAMBA, "attention": ATTENTION, "mlp": MLP, "moe": MOE}


class GraniteMoeHybrid(Layered):
    """See the module."""

    name = "GraniteMoeHybrid"
    model_type = "granitemoehybrid"
    mixers = ("mamba2", "attention")
    feed_forwards = ("mlp", "moe")
    knows: ClassVar[dict[str, str]] = {"model": f"{KNOWN['model']} embedding_scale logit_scale multipliers"}

    def reasons(self, cfg: ModelConfig) -> list[str]:
        attention, mlp, moe = (distinct(cfg, kind) for kind in ("attention", "mlp", "moe"))
        found = self.order_reasons(cfg)
        found += ["both mlp and moe, it has experts in every layer or in none"] * bool(mlp and moe)
        found += unless("attention", attention, window=None, qk_norm=False) + own_head_dim(cfg)
        found += unless("mlp", mlp, activation="swiglu")
        found += unless("moe", moe, activation="swiglu", router="softmax", normalise_weights=True, scale=1.0)
        found += ["moe.num_shared is 0, it always has shared experts"] * any(one.shared is None for one in moe)
        found += biased(moe)
        around = multipliers(cfg, *self.mixers, *self.feed_forwards)
        found += unless("multipliers", around, input=1.0, skip=1.0)
        found += ["multipliers differ between branches, it has one"] * (len({one.output for one in around}) > 1)
        found += differing("attention", attention) + differing("mlp", mlp)
        return found + differing("moe", moe, except_for=BALANCING) + mixer_reasons(cfg)

    def cached(self, cfg: ModelConfig) -> bool:
        return bool(distinct(cfg, "attention"))

    def block(self, cfg: ModelConfig, settings: Any) -> list[Rule]:
        return TABLES[settings.kind]

    def config(self, cfg: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
        layers = self.layers(cfg)
        settings: dict[str, Any] = {
            **usual(cfg, vocab_size, seq_len),
            "num_hidden_layers": len(layers),
            "layer_types": ["attention" if mixer.kind == "attention" else "mamba" for mixer, _ in layers],
            "num_local_experts": 0,
            "attention_bias": False,
            "output_router_logits": False,
            "embedding_multiplier": cfg.embedding_scale,
            "logits_scaling": 1 / cfg.logit_scale,
            "residual_multiplier": multipliers(cfg, *self.mixers)[0].output,
            "position_embedding_type": None,
        }
        for attention in distinct(cfg, "attention")[:1]:
            settings |= {
                "num_attention_heads": attention.num_heads,
                "num_key_value_heads": attention.kv_heads,
                "attention_multiplier": attention.width(cfg.d_model) ** -0.5,
                "position_embedding_type": "rope" if attention.rope else None,
                "rope_parameters": {"rope_type": "default", "rope_theta": attention.rope_theta},
                "rope_theta": attention.rope_theta,  # where transformers 4 and llama.cpp look
            }
        # without Mamba-2 layers their default sizes would not fit every d_model
        settings |= {"mamba_expand": 1, "mamba_n_heads": 1, "mamba_d_head": cfg.d_model}
        for mixer in distinct(cfg, "mamba2")[:1]:
            settings |= {
                "mamba_n_heads": mixer.sizes(cfg.d_model)[1],
                "mamba_d_head": mixer.head_dim,
                "mamba_n_groups": mixer.num_groups,
                "mamba_d_state": mixer.d_state,
                "mamba_d_conv": mixer.conv_width,
                "mamba_expand": mixer.expand,
                "mamba_chunk_size": mixer.chunk,
                "mamba_conv_bias": True,
                "mamba_proj_bias": False,
                "time_step_limit": [0.0, UNLIMITED],
            }
        for mlp in distinct(cfg, "mlp")[:1]:
            settings["shared_intermediate_size"] = mlp.d_ff
        for moe in distinct(cfg, "moe")[:1]:
            settings |= {
                "num_local_experts": moe.num_experts,
                "num_experts_per_tok": moe.top_k,
                "intermediate_size": moe.d_expert,
                "shared_intermediate_size": moe.shared.d_ff,
            }
        return settings
