"""Qwen3Next: Gated DeltaNet and gated attention in any order, each followed by SwiGLU or a mixture of experts.

Facts of transformers 5.23: ``in_proj_qkvz`` and ``in_proj_ba`` are packed by key head, the query projection by head
with its gate; the norms of the residual stream, of queries and of keys keep w - 1, the gated norm w; a shared expert
always stands beside the routed ones, behind a sigmoid of its own. Without an attention layer it cannot use its cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from lmtrain.hub.experts import BALANCING, biased, experts, router, shared
from lmtrain.hub.layers import Layered, other_eps, unless
from lmtrain.hub.llama import MLP
from lmtrain.hub.settings import differing, distinct, usual
from lmtrain.hub.table import CONCAT_CONV, KNOWN, Rule, by_head, less_one, same
from lmtrain.model.config import ModelConfig
from lmtrain.model.ffn.moe_settings import MoEConfig
from lmtrain.model.mixers.attention_settings import AttentionConfig
from lmtrain.model.mixers.gated_deltanet import GatedDeltaNetConfig

FIRST_NORM = less_one("norm.weight", "input_layernorm.weight")
SECOND_NORM = less_one("norm.weight", "post_attention_layernorm.weight")


class Qwen3Next(Layered):
    """See the module."""

    name = "Qwen3Next"
    model_type = "qwen3_next"
    mixers = ("gated_deltanet", "attention")
    feed_forwards = ("mlp", "moe")
    outside: ClassVar[list[Rule]] = [
        same("embed.weight", "model.embed_tokens.weight"),
        less_one("final_norm.weight", "model.norm.weight"),
    ]
    knows: ClassVar[dict[str, str]] = {
        "attention": f"{KNOWN['attention']} rope_fraction qk_norm_eps output_gate",
        "gated_deltanet": "kind num_heads num_value_heads head_dim value_dim conv_width norm_eps",
        "moe": f"{KNOWN['moe']} shared_gate",
    }

    def reasons(self, cfg: ModelConfig) -> list[str]:
        kinds = {kind: distinct(cfg, kind) for kind in self.mixers + self.feed_forwards}
        attention, moe = kinds["attention"], kinds["moe"]
        found = self.order_reasons(cfg)
        found += unless("attention", attention, qk_norm=True, output_gate=True, window=None)
        found += unless("mlp", kinds["mlp"], activation="swiglu")
        found += unless("moe", moe, activation="swiglu", router="softmax", scale=1.0)
        found += ["moe.shared_gate is false, it has a shared expert behind a gate"] * any(
            not one.shared_gate for one in moe
        )
        found += biased(moe)
        found += other_eps(cfg, "attention", attention, "qk_norm_eps")
        found += other_eps(cfg, "gated_deltanet", kinds["gated_deltanet"])
        except_for = ("qk_norm_eps", "norm_eps", *BALANCING)
        for kind, settings in kinds.items():
            found += differing(kind, settings, except_for=except_for)
        return found

    def cached(self, cfg: ModelConfig) -> bool:
        return bool(distinct(cfg, "attention"))

    def block(self, cfg: ModelConfig, settings: Any) -> list[Rule]:
        if settings.kind == "mlp":
            return [SECOND_NORM, *MLP[1:]]
        tables: dict[str, Callable[[Any], list[Rule]]]
        tables = {"gated_deltanet": _delta, "attention": _attention, "moe": _moe}
        return tables[settings.kind](settings)

    def config(self, cfg: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
        layers = self.layers(cfg)
        settings: dict[str, Any] = {
            **usual(cfg, vocab_size, seq_len),
            "num_hidden_layers": len(layers),
            "layer_types": [
                "full_attention" if mixer.kind == "attention" else "linear_attention" for mixer, _ in layers
            ],
            "mlp_only_layers": [index for index, (_, ffn) in enumerate(layers) if ffn.kind == "mlp"],
            "decoder_sparse_step": 1,
            "num_experts": 0,
            "attention_bias": False,
            "output_router_logits": False,
        }
        for attention in distinct(cfg, "attention")[:1]:
            settings |= _heads(attention, cfg.d_model)
        for delta in distinct(cfg, "gated_deltanet")[:1]:
            settings |= {
                "linear_num_key_heads": delta.num_heads,
                "linear_num_value_heads": delta.value_heads,
                "linear_key_head_dim": delta.head_dim,
                "linear_value_head_dim": delta.value_dim,
                "linear_conv_kernel_dim": delta.conv_width,
            }
        for mlp in distinct(cfg, "mlp")[:1]:
            settings["intermediate_size"] = mlp.d_ff
        for moe in distinct(cfg, "moe")[:1]:
            settings |= {
                "num_experts": moe.num_experts,
                "num_experts_per_tok": moe.top_k,
                "moe_intermediate_size": moe.d_expert,
                "shared_expert_intermediate_size": moe.shared.d_ff,
                "norm_topk_prob": moe.normalise_weights,
            }
        return settings


def _heads(attention: AttentionConfig, d_model: int) -> dict[str, Any]:
    return {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.width(d_model),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": attention.rope_theta,
            "partial_rotary_factor": attention.rope_fraction if attention.rope else 0.0,
        },
        "rope_theta": attention.rope_theta,  # where transformers 4 and llama.cpp look
    }


def _delta(delta: GatedDeltaNetConfig) -> list[Rule]:
    packed = tuple(f"branch.{name}.weight" for name in ("inputs.q", "inputs.k", "inputs.v", "out.gate.0"))
    convs = tuple(f"branch.inputs.{name}_conv.weight" for name in "qkv")
    return [
        FIRST_NORM,
        Rule(packed, ("linear_attn.in_proj_qkvz.weight",), by_head(delta.num_heads)),
        Rule(
            ("branch.inputs.beta.weight", "branch.a.weight"),
            ("linear_attn.in_proj_ba.weight",),
            by_head(delta.num_heads),
        ),
        Rule(convs, ("linear_attn.conv1d.weight",), CONCAT_CONV),
        Rule(("branch.decay.A_log",), ("linear_attn.A_log",), keep_fp32=True),
        Rule(("branch.decay.dt_bias",), ("linear_attn.dt_bias",), keep_fp32=True),
        same("branch.out.norm.weight", "linear_attn.norm.weight"),
        same("branch.out.o.weight", "linear_attn.out_proj.weight"),
    ]


def _attention(attention: AttentionConfig) -> list[Rule]:
    gated = Rule(("branch.q.weight", "branch.gate.weight"), ("self_attn.q_proj.weight",), by_head(attention.num_heads))
    plain = [same(f"branch.{name}.weight", f"self_attn.{name}_proj.weight") for name in "kvo"]
    norms = [less_one(f"branch.{name}_norm.weight", f"self_attn.{name}_norm.weight") for name in "qk"]
    return [FIRST_NORM, gated, *plain, *norms]


def _moe(moe: MoEConfig) -> list[Rule]:
    gate = same("branch.shared_gate.weight", "mlp.shared_expert_gate.weight")
    return [SECOND_NORM, router("mlp.gate.weight"), *experts(moe, "mlp.experts"), *shared("mlp.shared_expert"), gate]
