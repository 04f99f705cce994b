"""KimiLinear: Kimi Delta Attention and latent attention without positions in any order, each followed by SwiGLU or a
mixture of experts.

Facts of transformers 5.23: it ignores ``tie_word_embeddings``, and cannot use its cache without a layer of latent
attention. On disk: three convolutions, ``A_log`` as ``[1, 1, H, 1]``, experts under ``block_sparse_moe`` as w1, w3, w2.
"""

from __future__ import annotations

from typing import Any, ClassVar

from lmtrain.hub.deepseek_v3 import (
    FIRST_NORM,
    MLA_SETTINGS,
    MOE_SETTINGS,
    SECOND_NORM,
    mla_config,
    mla_rules,
    moe_config,
    moe_reasons,
    router_rule,
)
from lmtrain.hub.experts import NUMBERED, experts, shared
from lmtrain.hub.layers import Layered, other_eps, unless
from lmtrain.hub.llama import MLP
from lmtrain.hub.settings import differing, distinct, usual
from lmtrain.hub.table import CONCAT_CONV, Rule, Transform, same
from lmtrain.model.config import ModelConfig
from lmtrain.model.ffn.moe_settings import MoEConfig

BY_HEAD = Transform(lambda ours: [ours[0].view(1, 1, -1, 1)], lambda disk, shapes: [disk[0].flatten()])
DELTA = [
    FIRST_NORM,
    *(same(f"branch.inputs.{name}.weight", f"self_attn.{name}_proj.weight") for name in "qkv"),
    *(
        Rule((f"branch.inputs.{name}_conv.weight",), (f"self_attn.{name}_conv1d.weight",), CONCAT_CONV)
        for name in "qkv"
    ),
    same("branch.decay_in.weight", "self_attn.f_a_proj.weight"),
    same("branch.decay_out.weight", "self_attn.f_b_proj.weight"),
    Rule(("branch.decay.A_log",), ("self_attn.A_log",), BY_HEAD, keep_fp32=True),
    Rule(("branch.decay.dt_bias",), ("self_attn.dt_bias",), keep_fp32=True),
    same("branch.inputs.beta.weight", "self_attn.b_proj.weight"),
    same("branch.out.gate.0.weight", "self_attn.g_a_proj.weight"),
    same("branch.out.gate.1.weight", "self_attn.g_b_proj.weight"),
    same("branch.out.norm.weight", "self_attn.o_norm.weight"),
    same("branch.out.o.weight", "self_attn.o_proj.weight"),
]


def _moe(moe: MoEConfig) -> list[Rule]:
    place = "block_sparse_moe"
    routed = [router_rule(moe, f"{place}.gate"), *experts(moe, f"{place}.experts", NUMBERED)]
    return [SECOND_NORM, *routed, *shared(f"{place}.shared_experts")]


class KimiLinear(Layered):
    """See the module."""

    name = "KimiLinear"
    model_type = "kimi_linear"
    mixers = ("kda", "mla")
    feed_forwards = ("mlp", "moe")
    ties = False
    knows: ClassVar[dict[str, str]] = {
        "kda": "kind num_heads head_dim conv_width norm_eps",
        "mla": MLA_SETTINGS,
        "moe": MOE_SETTINGS,
    }

    def reasons(self, cfg: ModelConfig) -> list[str]:
        kda, mla, mlp = (distinct(cfg, kind) for kind in ("kda", "mla", "mlp"))
        found = self.order_reasons(cfg) + unless("mla", mla, rope=False) + unless("mlp", mlp, activation="swiglu")
        found += other_eps(cfg, "kda", kda) + differing("kda", kda, except_for=("norm_eps",))
        found += differing("mla", mla, except_for=("rope_theta",)) + differing("mlp", mlp)
        return found + moe_reasons(distinct(cfg, "moe"))

    def cached(self, cfg: ModelConfig) -> bool:
        return bool(distinct(cfg, "mla"))

    def block(self, cfg: ModelConfig, settings: Any) -> list[Rule]:
        if settings.kind == "mla":
            return [FIRST_NORM, *mla_rules(settings)]
        if settings.kind == "moe":
            return _moe(settings)
        return DELTA if settings.kind == "kda" else MLP

    def config(self, cfg: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
        layers = self.layers(cfg)
        settings: dict[str, Any] = {
            **usual(cfg, vocab_size, seq_len),
            "num_hidden_layers": len(layers),
            "layer_types": ["full_attention" if mixer.kind == "mla" else "linear_attention" for mixer, _ in layers],
            "mlp_layer_types": ["dense" if ffn.kind == "mlp" else "sparse" for _, ffn in layers],
            "tie_word_embeddings": False,
            "attention_bias": False,
            "pretraining_tp": 1,
            "output_router_logits": False,
        }
        for kda in distinct(cfg, "kda")[:1]:
            settings |= {
                "linear_num_heads": kda.num_heads,
                "linear_head_dim": kda.head_dim,
                "linear_conv_kernel_dim": kda.conv_width,
            }
        for mla in distinct(cfg, "mla")[:1]:
            settings |= mla_config(mla)
        for mlp in distinct(cfg, "mlp")[:1]:
            settings["intermediate_size"] = mlp.d_ff
        for moe in distinct(cfg, "moe")[:1]:
            settings |= {"num_local_experts": moe.num_experts} | moe_config(moe)
        return settings
