"""MiniMax: lightning attention and softmax attention in any order, each followed by a mixture of experts.

Facts of transformers 5.23: a branch is added to its normalised input, each with a factor, one pair of factors for
either kind of attention and one for the experts; both kinds have the same heads; the decays depend on the layer and are
buffers on disk, as tables over the tokens of a block; the norm of lightning attention has an epsilon of its own. The
cache counts the tokens of the first layer: with lightning attention there, ``generate`` is right, and any other call
with a cache takes its tokens for the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lmtrain.hub.experts import NUMBERED
from lmtrain.hub.layers import Layered, multipliers, unless
from lmtrain.hub.llama import ATTENTION
from lmtrain.hub.mixtral import mixture_reasons, mixture_rules
from lmtrain.hub.settings import differing, distinct, usual
from lmtrain.hub.table import KNOWN, Rule, Transform, by_head, same
from lmtrain.model.branch import Place
from lmtrain.model.config import ModelConfig
from lmtrain.model.mixers.linear_attention import LinearAttentionConfig, slopes

NORM_EPS = 1e-6
"""Of the norm of lightning attention, always."""
BLOCK = 64
"""Tokens of a block. It does not change the function; the tables on disk are its square."""
FACTORS = {"attention": "full_attn", "linear_attention": "linear_attn", "moe": "mlp"}
"""Names of the factors of each kind."""
TABLES = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")


class MiniMax(Layered):
    """See the module."""

    name = "MiniMax"
    model_type = "minimax"
    limits = (
        "with a cache, a second call of more than one token fails or is wrong where lightning attention stands first; "
        "`generate` is right."
    )
    mixers = ("linear_attention", "attention")
    feed_forwards = ("moe",)
    knows: ClassVar[dict[str, str]] = {
        "model": f"{KNOWN['model']} norm_place multipliers",
        "linear_attention": "kind num_heads head_dim decay norm_eps",
    }

    def reasons(self, cfg: ModelConfig) -> list[str]:
        attention, lightning, moe = (distinct(cfg, kind) for kind in FACTORS)
        found = self.order_reasons(cfg)
        found += [] if cfg.norm_place == "through" else [f"model.norm_place is {cfg.norm_place}, it has through"]
        found += unless("attention", attention, rope=True, qk_norm=False)
        found += unless("linear_attention", lightning, decay="lightning", norm_eps=NORM_EPS)
        heads = sorted({(one.num_heads, one.width(cfg.d_model)) for one in [*attention, *lightning]})
        found += [f"heads of {' and '.join(f'{n} x {width}' for n, width in heads)}, it has one"] * (len(heads) > 1)
        found += differing("attention", attention) + differing("linear_attention", lightning)
        found += mixture_reasons(moe) + unless("moe", moe, normalise_weights=True)
        for kind in FACTORS:
            around = multipliers(cfg, kind)
            found += unless("multipliers", around, input=1.0)
            found += [f"multipliers differ between branches of kind {kind}, it has one pair"] * (len(around) > 1)
        return found

    def block(self, cfg: ModelConfig, settings: Any) -> list[Rule]:
        if settings.kind == "moe":
            return mixture_rules(settings, "block_sparse_moe", NUMBERED)
        return ATTENTION if settings.kind == "attention" else _lightning(settings)

    def rules(self, cfg: ModelConfig) -> list[Rule]:
        return super().rules(cfg) + [
            _decays(cfg.branches[name], Place(index, len(cfg.order()))).at("", f"model.layers.{index // 2}.self_attn.")
            for index, name in enumerate(cfg.order())
            if cfg.branches[name].kind == "linear_attention"
        ]

    def config(self, cfg: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
        layers = self.layers(cfg)
        mixer, moe = layers[0][0], distinct(cfg, "moe")[0]
        settings: dict[str, Any] = {
            **usual(cfg, vocab_size, seq_len),
            "num_hidden_layers": len(layers),
            "layer_types": ["full_attention" if one.kind == "attention" else one.kind for one, _ in layers],
            "num_attention_heads": mixer.num_heads,
            "num_key_value_heads": mixer.num_heads,
            "head_dim": mixer.width(cfg.d_model),
            "block_size": BLOCK,
            "sliding_window": None,
            "intermediate_size": moe.d_expert,
            "num_local_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "router_aux_loss_coef": moe.aux_weight,
            "router_jitter_noise": 0.0,
            "output_router_logits": False,
        }
        for kind, name in FACTORS.items():
            for around in multipliers(cfg, kind):
                settings |= {f"{name}_alpha_factor": around.skip, f"{name}_beta_factor": around.output}
        for attention in distinct(cfg, "attention")[:1]:
            settings |= {
                "num_key_value_heads": attention.kv_heads,
                "sliding_window": attention.window,
                "rope_parameters": {"rope_type": "default", "rope_theta": attention.rope_theta},
                "rope_theta": attention.rope_theta,  # where transformers 4 and llama.cpp look
            }
        return settings


def _lightning(settings: LinearAttentionConfig) -> list[Rule]:
    packed = tuple(f"branch.{name}.weight" for name in "qkv")
    return [
        ATTENTION[0],
        Rule(packed, ("self_attn.qkv_proj.weight",), by_head(settings.num_heads)),
        same("branch.out.norm.weight", "self_attn.norm.weight"),
        same("branch.out.gate.0.weight", "self_attn.output_gate.weight"),
        same("branch.out.o.weight", "self_attn.out_proj.weight"),
    ]


def _decays(settings: LinearAttentionConfig, place: Place) -> Rule:
    """``TABLES``: the slopes ``[H, 1, 1]``, decay from before a block to each of its tokens and from each to its end
    ``[H, block, 1]``, and between its tokens ``[1, H, block, block]``."""

    def to_disk(_: Sequence[Tensor]) -> list[Tensor]:
        slope = slopes(torch.arange(settings.num_heads, dtype=torch.float32), place)[:, None, None]
        token = torch.arange(1.0, BLOCK + 1)[:, None]
        between = torch.where(token >= token.T, slope * (token.T - token), float("-inf"))[None]
        return [slope, *(exponent.exp() for exponent in (-slope * token, slope * (token - BLOCK), between))]

    return Rule((), TABLES, Transform(to_disk, lambda disk, shapes: []), keep_fp32=True)
