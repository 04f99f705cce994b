"""Llama: (attention, SwiGLU) repeated, rotary positions, no window. Its table serves Mistral and Qwen3 too.

Names: what ``LlamaForCausalLM.save_pretrained`` of transformers 5.23 writes.
"""

from __future__ import annotations

from typing import Any, ClassVar

from lmtrain.hub.settings import differing, distinct, usual
from lmtrain.hub.table import KNOWN, HubClass, Rule, same
from lmtrain.model.config import ModelConfig
from lmtrain.model.ffn.mlp import MLPConfig
from lmtrain.model.mixers.attention_settings import AttentionConfig

ATTENTION = [
    same("norm.weight", "input_layernorm.weight"),
    same("branch.q.weight", "self_attn.q_proj.weight"),
    same("branch.k.weight", "self_attn.k_proj.weight"),
    same("branch.v.weight", "self_attn.v_proj.weight"),
    same("branch.o.weight", "self_attn.o_proj.weight"),
]
MLP = [
    same("norm.weight", "post_attention_layernorm.weight"),
    same("branch.gate.weight", "mlp.gate_proj.weight"),
    same("branch.up.weight", "mlp.up_proj.weight"),
    same("branch.down.weight", "mlp.down_proj.weight"),
]
OUTSIDE = [same("embed.weight", "model.embed_tokens.weight"), same("final_norm.weight", "model.norm.weight")]
HEAD = same("head.weight", "lm_head.weight")


def rotary(attention: AttentionConfig) -> dict[str, Any]:
    """What config.json says of rotary positions, also where transformers 4 and llama.cpp look."""
    base: dict[str, Any] = {"rope_theta": attention.rope_theta}
    scaling = attention.rope_scaling
    if scaling is None:
        return {"rope_parameters": {"rope_type": "default", **base}, **base}
    limits = ("low_freq_factor", "high_freq_factor") if scaling.kind == "llama3" else ("beta_slow", "beta_fast")
    slower = {
        "rope_type": scaling.kind,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_length,
        **dict(zip(limits, (scaling.slow, scaling.upper), strict=True)),
    }
    return {"rope_parameters": {**slower, **base}, "rope_scaling": slower, **base}


class Llama(HubClass):
    """See the module."""

    name = "Llama"
    model_type = "llama"
    knows: ClassVar[dict[str, str]] = {"attention": f"{KNOWN['attention']} rope_scaling"}
    attention: ClassVar[list[Rule]] = ATTENTION
    mlp: ClassVar[list[Rule]] = MLP

    def reasons(self, cfg: ModelConfig) -> list[str]:
        found = self._order(cfg)
        attention = distinct(cfg, "attention")
        found += [] if all(one.rope for one in attention) else ["attention.rope is false"]
        found += self._attention(cfg, attention)
        mlp = distinct(cfg, "mlp")
        found += [f"mlp.activation is {one.activation}, it has swiglu" for one in mlp if one.activation != "swiglu"]
        return found + differing("attention", attention, except_for=self._may_differ()) + differing("mlp", mlp)

    def _order(self, cfg: ModelConfig) -> list[str]:
        kinds = [cfg.branches[name].kind for name in cfg.order()]
        others = sorted(set(kinds) - {"attention", "mlp"})
        if others:
            return [f"no {kind}" for kind in others]
        repeated = kinds == ["attention", "mlp"] * (len(kinds) // 2)
        return [] if repeated else ["the order is not (attention mlp) repeated"]

    def _may_differ(self) -> tuple[str, ...]:
        return ()

    def _attention(self, cfg: ModelConfig, attention: list[AttentionConfig]) -> list[str]:
        found = [f"attention.window is {one.window}, it has none" for one in attention if one.window is not None]
        found += ["attention.qk_norm is true"] if any(one.qk_norm for one in attention) else []
        uneven = [one.num_heads for one in attention if cfg.d_model % one.num_heads]
        return found + [f"num_heads {heads} does not divide d_model {cfg.d_model}" for heads in uneven]

    def rules(self, cfg: ModelConfig) -> list[Rule]:
        found = list(OUTSIDE) if cfg.tie_embeddings else [*OUTSIDE, HEAD]
        for index, _ in enumerate(cfg.order()):
            table = self.mlp if index % 2 else self.attention
            found += [rule.at(f"blocks.{index}.", f"model.layers.{index // 2}.") for rule in table]
        return found

    def config(self, cfg: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
        attention: AttentionConfig = distinct(cfg, "attention")[0]
        mlp: MLPConfig = distinct(cfg, "mlp")[0]
        return {
            **usual(cfg, vocab_size, seq_len),
            "intermediate_size": mlp.d_ff,
            "num_hidden_layers": len(cfg.order()) // 2,
            "num_attention_heads": attention.num_heads,
            "num_key_value_heads": attention.kv_heads,
            "head_dim": attention.width(cfg.d_model),
            **rotary(attention),
        } | self._own(cfg)

    def _own(self, cfg: ModelConfig) -> dict[str, Any]:
        """Keys that not every class of the family has."""
        return {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
