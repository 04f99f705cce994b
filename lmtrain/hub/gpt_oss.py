"""GptOss: attention with sinks, everywhere or within a window, and a mixture of experts in every layer.

Facts of transformers 5.23: every projection has a bias; experts are two tensors ``[E, in, out]``, in the first of which
gate (even) and up (odd columns) take turns; the softmax is over the chosen experts alone, which is ours over all,
normalised; without ``rope_parameters`` it would use YaRN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmtrain.hub.experts import BALANCING, WITHOUT_BIAS, biased
from lmtrain.hub.layers import Layered, unless
from lmtrain.hub.settings import differing, distinct, usual
from lmtrain.hub.table import KNOWN, Rule, Shape, Transform, same
from lmtrain.model.config import ModelConfig
from lmtrain.model.ffn.mlp import CLAMP, SHARPNESS
from lmtrain.model.ffn.moe_settings import MoEConfig
from lmtrain.model.mixers.attention_settings import AttentionConfig


def _interleaved(ours: Sequence[Tensor]) -> list[Tensor]:
    return [torch.stack(list(ours), dim=-1).flatten(-2)]


def _parted(disk: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
    return list(disk[0].unflatten(-1, (-1, len(shapes))).unbind(-1))


IN_TURNS = Transform(_interleaved, _parted)
"""Tensors of one shape, whose columns take turns."""
ATTENTION = [
    same("norm.weight", "input_layernorm.weight"),
    *(
        same(f"branch.{name}.{what}", f"self_attn.{name}_proj.{what}")
        for name in ("q", "k", "v", "o")
        for what in ("weight", "bias")
    ),
    Rule(("branch.sinks.logit",), ("self_attn.sinks",), keep_fp32=True),
]
MOE = [
    same("norm.weight", "post_attention_layernorm.weight"),
    Rule(("branch.router.weight", "branch.router_bias"), ("mlp.router.weight",), WITHOUT_BIAS, keep_fp32=True),
    Rule(("branch.router.bias",), ("mlp.router.bias",), keep_fp32=True),
    *(
        Rule(
            (f"branch.experts.gate{what}", f"branch.experts.up{what}"),
            (f"mlp.experts.gate_up_proj{what}",),
            IN_TURNS,
        )
        for what in ("", "_bias")
    ),
    same("branch.experts.down", "mlp.experts.down_proj"),
    same("branch.experts.down_bias", "mlp.experts.down_proj_bias"),
]


class GptOss(Layered):
    """See the module."""

    name = "GptOss"
    model_type = "gpt_oss"
    mixers = ("attention",)
    feed_forwards = ("moe",)
    knows: ClassVar[dict[str, str]] = {
        "attention": f"{KNOWN['attention']} bias sinks",
        "moe": f"{KNOWN['moe']} bias",
    }

    def reasons(self, cfg: ModelConfig) -> list[str]:
        attention, moe = distinct(cfg, "attention"), distinct(cfg, "moe")
        found = self.order_reasons(cfg)
        found += unless("attention", attention, sinks=True, bias="all", qk_norm=False, rope=True)
        windows = sorted({one.window for one in attention if one.window is not None})
        found += [f"windows of {', '.join(map(str, windows))}, it has one"] * (len(windows) > 1)
        has = {"activation": "swiglu_clamped", "router": "softmax", "bias": True, "num_shared": 0, "scale": 1.0}
        found += unless("moe", moe, **has, normalise_weights=True)
        found += biased(moe)
        found += differing("attention", attention, except_for=("window",))
        return found + differing("moe", moe, except_for=(*BALANCING, "d_shared"))

    def block(self, cfg: ModelConfig, settings: Any) -> list[Rule]:
        return ATTENTION if settings.kind == "attention" else MOE

    def config(self, cfg: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
        attention: AttentionConfig = distinct(cfg, "attention")[0]
        moe: MoEConfig = distinct(cfg, "moe")[0]
        windows = [mixer.window for mixer, _ in self.layers(cfg)]
        return {
            **usual(cfg, vocab_size, seq_len),
            "num_hidden_layers": len(windows),
            "layer_types": ["full_attention" if one is None else "sliding_attention" for one in windows],
            # it makes a mask of the window even where no layer has one
            "sliding_window": next((one for one in windows if one is not None), seq_len),
            "num_attention_heads": attention.num_heads,
            "num_key_value_heads": attention.kv_heads,
            "head_dim": attention.width(cfg.d_model),
            "attention_bias": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": attention.rope_theta},
            "rope_theta": attention.rope_theta,  # where transformers 4 and llama.cpp look
            "num_local_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "intermediate_size": moe.d_expert,
            "swiglu_alpha": SHARPNESS,
            "swiglu_limit": CLAMP,
            "output_router_logits": False,
        }
