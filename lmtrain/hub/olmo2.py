"""Olmo2: Llama with its norms behind the branches, and queries and keys normalised over all heads together.

``Olmo2Config`` declares no head width: it is ``d_model / num_heads``.
"""

from __future__ import annotations

from typing import Any, ClassVar

from lmtrain.hub.layers import other_eps, own_head_dim, unless
from lmtrain.hub.llama import ATTENTION, MLP, Llama
from lmtrain.hub.table import KNOWN, Rule, same
from lmtrain.model.config import ModelConfig
from lmtrain.model.mixers.attention_settings import AttentionConfig


class Olmo2(Llama):
    """See the module. Names: what ``Olmo2ForCausalLM.save_pretrained`` of transformers 5.23 writes."""

    name = "Olmo2"
    model_type = "olmo2"
    knows: ClassVar[dict[str, str]] = {
        "model": KNOWN["model"] + " norm_place",
        "attention": KNOWN["attention"] + " qk_norm_over qk_norm_eps rope_scaling",
    }
    attention: ClassVar[list[Rule]] = [
        same("out_norm.weight", "post_attention_layernorm.weight"),
        *ATTENTION[1:],
        same("branch.q_norm.weight", "self_attn.q_norm.weight"),
        same("branch.k_norm.weight", "self_attn.k_norm.weight"),
    ]
    mlp: ClassVar[list[Rule]] = [same("out_norm.weight", "post_feedforward_layernorm.weight"), *MLP[1:]]

    def _attention(self, cfg: ModelConfig, attention: list[AttentionConfig]) -> list[str]:
        place = [] if cfg.norm_place == "post" else [f"model.norm_place is {cfg.norm_place}, it has post"]
        found = unless("attention", attention, window=None, qk_norm=True, qk_norm_over="all")
        return place + found + other_eps(cfg, "attention", attention, "qk_norm_eps") + own_head_dim(cfg)

    def config(self, cfg: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
        return {key: value for key, value in super().config(cfg, vocab_size, seq_len).items() if key != "head_dim"}

    def _own(self, cfg: ModelConfig) -> dict[str, Any]:
        return {"attention_bias": False}
