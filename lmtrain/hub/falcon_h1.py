"""FalconH1: Mamba-2 and attention side by side, then SwiGLU, in every layer.

Facts of transformers 5.23: the gated norm is there if ``mamba_rms_norm``, and ours if not ``mamba_norm_before_gate``;
its multipliers around branches, of the embedding and of the logits are ours, those inside branches (keys, the five
parts of the Mamba-2 projection, the gate of the MLP) stay 1. Heads share d_model among them.
"""

from __future__ import annotations

from typing import Any, ClassVar

from lmtrain.hub.layers import moved, multipliers, own_head_dim, unless
from lmtrain.hub.llama import ATTENTION, HEAD, MLP
from lmtrain.hub.mamba2 import MIXER, UNLIMITED, mixer_reasons
from lmtrain.hub.settings import differing, distinct, usual
from lmtrain.hub.table import KNOWN, HubClass, Rule, same
from lmtrain.model.config import ModelConfig
from lmtrain.model.ffn.mlp import MLPConfig
from lmtrain.model.mixers.attention_settings import AttentionConfig
from lmtrain.model.mixers.mamba2 import Mamba2Config

KINDS = ("attention", "mamba2", "mlp")
OUTSIDE = [same("embed.weight", "model.embed_tokens.weight"), same("final_norm.weight", "model.final_layernorm.weight")]
NORM = same("norm.weight", "input_layernorm.weight")
FEED_FORWARD = [same("norm.weight", "pre_ff_layernorm.weight")]
FEED_FORWARD += moved(MLP[1:], ("", ""), ("mlp.", "feed_forward."))
MIXERS = {"mamba2": (MIXER[1:], ("mixer.", "mamba.")), "attention": (ATTENTION[1:], ("", ""))}
"""By kind, its table without the norm, which is one for both, and the prefix to change on disk."""


class FalconH1(HubClass):
    """See the module."""

    name = "FalconH1"
    model_type = "falcon_h1"
    side_by_side = True
    knows: ClassVar[dict[str, str]] = {"model": f"{KNOWN['model']} embedding_scale logit_scale multipliers"}

    def reasons(self, cfg: ModelConfig) -> list[str]:
        attention, mlp = distinct(cfg, "attention"), distinct(cfg, "mlp")
        found = self._order(cfg)
        found += unless("attention", attention, window=None, qk_norm=False, rope=True) + own_head_dim(cfg)
        found += unless("mlp", mlp, activation="swiglu")
        for kind in KINDS:
            around = multipliers(cfg, kind)
            found += unless(f"multipliers of {kind}", around, skip=1.0, **({"input": 1.0} if kind == "mlp" else {}))
            found += [f"multipliers of {kind} differ between layers"] * (len(around) > 1)
        return found + differing("attention", attention) + differing("mlp", mlp) + mixer_reasons(cfg)

    def _order(self, cfg: ModelConfig) -> list[str]:
        kinds = [sorted(cfg.branches[name].kind for name in names) for names in cfg.blocks()]
        others = sorted({kind for block in kinds for kind in block} - set(KINDS))
        if others:
            return [f"no {kind}" for kind in others]
        layered = kinds == [["attention", "mamba2"], ["mlp"]] * (len(kinds) // 2)
        return [] if layered else ["the order is not (mamba2 + attention mlp) repeated"]

    def rules(self, cfg: ModelConfig) -> list[Rule]:
        found = list(OUTSIDE) if cfg.tie_embeddings else [*OUTSIDE, HEAD]
        for index, names in enumerate(cfg.blocks()):
            table = FEED_FORWARD if index % 2 else self._mixers(cfg, names)
            found += [rule.at(f"blocks.{index}.", f"model.layers.{index // 2}.") for rule in table]
        return found

    def _mixers(self, cfg: ModelConfig, names: tuple[str, ...]) -> list[Rule]:
        found = [NORM]
        for place, name in enumerate(names):
            rules, prefix = MIXERS[cfg.branches[name].kind]
            found += moved(rules, ("branch.", f"branch.branches.{place}."), prefix)
        return found

    def config(self, cfg: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
        attention: AttentionConfig = distinct(cfg, "attention")[0]
        mixer: Mamba2Config = distinct(cfg, "mamba2")[0]
        mlp: MLPConfig = distinct(cfg, "mlp")[0]
        around = {kind: multipliers(cfg, kind)[0] for kind in KINDS}
        inner, heads, _ = mixer.sizes(cfg.d_model)
        return {
            **usual(cfg, vocab_size, seq_len),
            "intermediate_size": mlp.d_ff,
            "num_hidden_layers": len(cfg.blocks()) // 2,
            "num_attention_heads": attention.num_heads,
            "num_key_value_heads": attention.kv_heads,
            "rope_parameters": {"rope_type": "default", "rope_theta": attention.rope_theta},
            "rope_theta": attention.rope_theta,  # where transformers 4 and llama.cpp look
            "attention_bias": False,
            "mlp_bias": False,
            "projectors_bias": False,
            "mamba_d_ssm": inner,
            "mamba_n_heads": heads,
            "mamba_d_head": mixer.head_dim,
            "mamba_n_groups": mixer.num_groups,
            "mamba_d_state": mixer.d_state,
            "mamba_d_conv": mixer.conv_width,
            "mamba_expand": mixer.expand,
            "mamba_chunk_size": mixer.chunk,
            "mamba_conv_bias": True,
            "mamba_proj_bias": False,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": False,
            "time_step_limit": [0.0, UNLIMITED],
            "embedding_multiplier": cfg.embedding_scale,
            "lm_head_multiplier": cfg.logit_scale,
            "attention_in_multiplier": around["attention"].input,
            "attention_out_multiplier": around["attention"].output,
            "ssm_in_multiplier": around["mamba2"].input,
            "ssm_out_multiplier": around["mamba2"].output,
            "mlp_multipliers": [1.0, around["mlp"].output],
            "key_multiplier": 1.0,
            "ssm_multipliers": [1.0] * 5,
        }
