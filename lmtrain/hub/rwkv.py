"""Rwkv: RWKV-4, (time mixing, channel mixing) repeated, with LayerNorm and a normalised embedding.

Facts of transformers 5.23: the last norm's epsilon is 1e-5 whatever the config says; ``rescale_every`` above 0 divides
weights in place at the first forward in eval mode, and a model saved after that is wrong when loaded (so 0 is written);
with the cache, a batch of more than one sequence generates wrong tokens, and padding on the left is not masked: one
sequence at a time is right, and so is any batch with ``use_cache=False`` and no padding. A single layer cannot be
initialised.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from lmtrain.hub.settings import differing, distinct
from lmtrain.hub.table import KNOWN, HubClass, Rule, Transform, same
from lmtrain.model.config import ModelConfig

EPS = 1e-5
"""Of the last norm, always."""
OWN_SHARE = Transform(
    lambda ours: [(1 - mix)[None, None] for mix in ours[0]],
    lambda disk, shapes: [torch.stack([1 - share.flatten().float() for share in disk])],
)
"""Shares of the token before, ``[count, D]``, to ``count`` shares of the token itself, ``[1, 1, D]``, in fp32. Exact
both ways for multiples of 2^-22 in [-1, 1]; another share comes back within 2^-24."""


def _layer_norm(ours: str, disk: str) -> list[Rule]:
    return [same(f"{ours}.{name}", f"{disk}.{name}") for name in ("weight", "bias")]


def _mixes(disk: str, *names: str) -> Rule:
    return Rule(("branch.mix.weight",), tuple(f"{disk}.time_mix_{name}" for name in names), OWN_SHARE, keep_fp32=True)


TIME = [
    *_layer_norm("norm", "ln1"),
    _mixes("attention", "key", "value", "receptance"),
    Rule(("branch.decay.time_decay",), ("attention.time_decay",), keep_fp32=True),
    Rule(("branch.decay.time_first",), ("attention.time_first",), keep_fp32=True),
    same("branch.k.weight", "attention.key.weight"),
    same("branch.v.weight", "attention.value.weight"),
    same("branch.r.weight", "attention.receptance.weight"),
    same("branch.o.weight", "attention.output.weight"),
]
CHANNEL = [
    *_layer_norm("norm", "ln2"),
    _mixes("feed_forward", "key", "receptance"),
    same("branch.k.weight", "feed_forward.key.weight"),
    same("branch.v.weight", "feed_forward.value.weight"),
    same("branch.r.weight", "feed_forward.receptance.weight"),
]
OUTSIDE = [
    same("embed.weight", "rwkv.embeddings.weight"),
    *_layer_norm("embed_norm", "rwkv.blocks.0.pre_ln"),
    *_layer_norm("final_norm", "rwkv.ln_out"),
]
HEAD = same("head.weight", "head.weight")


class Rwkv(HubClass):
    """See the module."""

    name = "Rwkv"
    model_type = "rwkv"
    limits = (
        "with the cache, several sequences at once generate wrong tokens, and padding on the left is read as tokens; "
        "one sequence at a time is right, and so are several of one length with `use_cache=False`."
    )
    knows: ClassVar[dict[str, str]] = {
        "model": KNOWN["model"] + " norm embedding_norm",
        "rwkv4": "kind",
        "rwkv_channel": "kind d_ff version",
    }

    def reasons(self, cfg: ModelConfig) -> list[str]:
        kinds = [cfg.branches[name].kind for name in cfg.order()]
        channels = distinct(cfg, "rwkv_channel")
        found = [f"no {kind}" for kind in sorted(set(kinds) - {"rwkv4", "rwkv_channel"})]
        if not found and kinds != ["rwkv4", "rwkv_channel"] * (len(kinds) // 2):
            found = ["the order is not (rwkv4 rwkv_channel) repeated"]
        found += ["it needs two layers"] if len(kinds) == 2 else []
        found += [] if cfg.norm == "layer" else [f"model.norm is {cfg.norm}, it has layer"]
        found += [] if cfg.norm_eps == EPS else [f"model.norm_eps is {cfg.norm_eps:g}, its last norm has {EPS:g}"]
        found += [] if cfg.embedding_norm else ["model.embedding_norm is false"]
        found += [f"rwkv_channel.version is {one.version}, it has 4" for one in channels if one.version != "4"]
        return found + differing("rwkv_channel", channels)

    def rules(self, cfg: ModelConfig) -> list[Rule]:
        found = list(OUTSIDE) if cfg.tie_embeddings else [*OUTSIDE, HEAD]
        for index, _ in enumerate(cfg.order()):
            table = CHANNEL if index % 2 else TIME
            found += [rule.at(f"blocks.{index}.", f"rwkv.blocks.{index // 2}.") for rule in table]
        return found

    def config(self, cfg: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
        return {
            "vocab_size": vocab_size,
            "hidden_size": cfg.d_model,
            "attention_hidden_size": cfg.d_model,
            "intermediate_size": distinct(cfg, "rwkv_channel")[0].d_ff,
            "num_hidden_layers": len(cfg.order()) // 2,
            "context_length": seq_len,
            "layer_norm_epsilon": cfg.norm_eps,
            "rescale_every": 0,
            "tie_word_embeddings": cfg.tie_embeddings,
        }
