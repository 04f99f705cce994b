"""RecurrentGemma: a mixer, recurrent (RG-LRU) or attention within a window, then a GEGLU with biases, in every layer.

Facts of transformers 5.23: norms keep w - 1; the embedding is multiplied by the root of d_model rounded to bfloat16;
logits are always capped; a mixer's output projection always has a bias, zeros where attention has none here;
``intermediate_size`` is twice the hidden width; one number of heads serves attention and the gates of the recurrence,
whose cache has d_model channels. The cache needs an attention layer, and padding on the left is read as tokens:
generate one sequence at a time, or several as long as each other.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from lmtrain.hub.layers import Layered, own_head_dim, unless
from lmtrain.hub.settings import differing, distinct
from lmtrain.hub.table import CONCAT_CONV, KNOWN, LESS_ONE, Rule, Transform, same, zeros
from lmtrain.model.config import ModelConfig
from lmtrain.model.mixers.attention_settings import AttentionConfig
from lmtrain.model.mixers.rg_lru import RGLRUConfig

UNREACHED = 1e6
"""A cap that leaves logits as they are: they change by less than fp32 rounds."""


def norm_scale(ours: str, disk: str) -> Rule:
    """A norm's weight: fp32 on disk, since bfloat16 rounds w - 1 otherwise than w."""
    return Rule((f"{ours}.weight",), (f"{disk}.weight",), LESS_ONE, keep_fp32=True)


def _linear(ours: str, disk: str) -> list[Rule]:
    return [same(f"branch.{ours}.{name}", f"{disk}.{name}") for name in ("weight", "bias")]


def _by_head(heads: int) -> Transform:
    """A bias ``[C]`` to ``[H, C / H]``."""
    return Transform(lambda ours: [ours[0].unflatten(0, (heads, -1))], lambda disk, shapes: [disk[0].flatten()])


TEMPORAL = norm_scale("norm", "temporal_pre_norm")
MLP = [
    norm_scale("norm", "channel_pre_norm"),
    *(rule for name in ("gate", "up", "down") for rule in _linear(name, f"mlp_block.{name}_proj")),
]


class RecurrentGemma(Layered):
    """See the module. Names: what ``RecurrentGemmaForCausalLM.save_pretrained`` of transformers 5.23 writes."""

    name = "RecurrentGemma"
    model_type = "recurrent_gemma"
    limits = "padding on the left is read as tokens; one sequence at a time is right, and so are several of one length."
    knows: ClassVar[dict[str, str]] = {
        "model": KNOWN["model"] + " embedding_scale logit_softcap",
        "attention": KNOWN["attention"] + " rope_fraction bias",
        "mlp": KNOWN["mlp"] + " bias",
        "rg_lru": "kind width num_heads conv_width",
    }
    mixers: ClassVar[tuple[str, ...]] = ("rg_lru", "attention")
    feed_forwards: ClassVar[tuple[str, ...]] = ("mlp",)
    outside: ClassVar[list[Rule]] = [
        same("embed.weight", "model.embed_tokens.weight"),
        norm_scale("final_norm", "model.final_norm"),
    ]

    def reasons(self, cfg: ModelConfig) -> list[str]:
        attention, mlp = distinct(cfg, "attention"), distinct(cfg, "mlp")
        recurrent: list[RGLRUConfig] = distinct(cfg, "rg_lru")
        found = self.order_reasons(cfg) + ([] if recurrent else ["there is no rg_lru"])
        scale = embedding_scale(cfg.d_model)
        if cfg.embedding_scale != scale:
            found.append(f"model.embedding_scale is {cfg.embedding_scale:g}, it has {scale:g}")
        found += unless("attention", attention, rope=True, qk_norm=False) + own_head_dim(cfg)
        found += ["attention.window is null, it has one"] if any(one.window is None for one in attention) else []
        found += unless("mlp", mlp, activation="geglu", bias=True)
        heads = {one.num_heads for one in [*attention, *recurrent]}
        found += [f"num_heads of {', '.join(map(str, sorted(heads)))}, it has one"] if len(heads) > 1 else []
        widths = {one.width for one in recurrent} - {None, cfg.d_model}
        found += [f"rg_lru.width is {width}, its cache has d_model channels" for width in widths]
        found += differing("attention", attention, except_for=("num_heads",)) + differing("mlp", mlp)
        return found + differing("rg_lru", recurrent, except_for=("num_heads", "width"))

    def cached(self, cfg: ModelConfig) -> bool:
        return bool(distinct(cfg, "attention"))

    def block(self, cfg: ModelConfig, settings: Any) -> list[Rule]:
        if settings.kind == "mlp":
            return MLP
        mixer = self._attention(cfg, settings) if settings.kind == "attention" else self._recurrent(settings)
        return [
            TEMPORAL,
            *(Rule(r.ours, tuple(f"temporal_block.{n}" for n in r.disk), r.transform, r.keep_fp32) for r in mixer),
        ]

    def _attention(self, cfg: ModelConfig, settings: AttentionConfig) -> list[Rule]:
        absent = [] if "o" in settings.biased else [Rule((), ("o_proj.bias",), zeros((cfg.d_model,)))]
        found = [same(f"branch.{name}.weight", f"{name}_proj.weight") for name in "qkvo"]
        return found + [same(f"branch.{name}.bias", f"{name}_proj.bias") for name in settings.biased] + absent

    def _recurrent(self, settings: RGLRUConfig) -> list[Rule]:
        by_head = _by_head(settings.num_heads)
        gates = [
            rule
            for name in ("input", "recurrent")
            for rule in (
                same(f"branch.gates.{name}.weight", f"rg_lru.{name}_gate_weight"),
                Rule((f"branch.gates.exact.{name}_bias",), (f"rg_lru.{name}_gate_bias",), by_head, keep_fp32=True),
            )
        ]
        return [
            *_linear("x", "linear_x"),
            *_linear("gate", "linear_y"),
            Rule(("branch.conv.weight",), ("conv_1d.weight",), CONCAT_CONV),
            same("branch.conv.bias", "conv_1d.bias"),
            *gates,
            Rule(("branch.gates.exact.Lambda",), ("rg_lru.recurrent_param",), keep_fp32=True),
            *_linear("o", "linear_out"),
        ]

    def config(self, cfg: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
        recurrent: RGLRUConfig = distinct(cfg, "rg_lru")[0]
        mixers = [mixer.kind for mixer, _ in self.layers(cfg)]
        settings = {
            "vocab_size": vocab_size,
            "hidden_size": cfg.d_model,
            "intermediate_size": 2 * distinct(cfg, "mlp")[0].d_ff,
            "num_hidden_layers": len(mixers),
            "block_types": ["attention" if kind == "attention" else "recurrent" for kind in mixers],
            "num_attention_heads": recurrent.num_heads,
            "lru_width": cfg.d_model,
            "conv1d_width": recurrent.conv_width,
            "hidden_activation": "gelu_pytorch_tanh",
            "logits_soft_cap": cfg.logit_softcap or UNREACHED,
            "rms_norm_eps": cfg.norm_eps,
            "w_init_variance_scale": 0.01,
            "attention_dropout": 0.0,
            "tie_word_embeddings": cfg.tie_embeddings,
        }
        for one in distinct(cfg, "attention")[:1]:
            rope = {"rope_theta": one.rope_theta, "partial_rotary_factor": one.rope_fraction}
            settings |= {
                "num_key_value_heads": one.kv_heads,
                "attention_window_size": one.window,
                "attention_bias": "q" in one.biased,
                "rope_parameters": {"rope_type": "default", **rope},
            }
        return settings


def embedding_scale(d_model: int) -> float:
    """The root of d_model in bfloat16."""
    return float(torch.tensor(d_model**0.5, dtype=torch.bfloat16))
