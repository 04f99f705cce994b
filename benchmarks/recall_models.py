"""The small models of the recall benchmark: two layers of a mixer, each with RWKV's channel mixing behind it."""

from __future__ import annotations

from typing import Any

import torch

import lmtrain.model.mixers
from lmtrain.model.branch import branch_class
from lmtrain.model.config import ModelConfig
from lmtrain.model.ffn.rwkv_channel import RWKVChannelConfig
from lmtrain.model.language_model import LanguageModel

D_MODEL, LAYERS, D_FF = 32, 2, 64
EMBEDDING_STD = 0.5
KINDS: tuple[str, ...] = tuple(lmtrain.model.mixers.__all__)
SETTINGS: dict[str, dict[str, Any]] = {
    "attention": {"num_heads": 1},
    "mla": {"num_heads": 1, "kv_rank": 16, "nope_dim": 16, "rope_dim": 16, "value_dim": 32},
    "mamba2": {"d_state": 16, "head_dim": 32},
    "s4d": {"d_state": 32},
    "linear_attention": {"num_heads": 1},
    "retnet": {"num_heads": 1, "expand_v": 1.0},
    "gla": {"num_heads": 1, "expand_k": 1.0},
    "lightnet": {"head_dim": 32, "gate_rank": 16},
    "hgrn2": {"head_dim": 32},
    "deltanet": {"num_heads": 1, "head_dim": 32},
    "gated_deltanet": {"num_heads": 1, "head_dim": 32, "value_dim": 32},
    "kda": {"num_heads": 1, "head_dim": 32},
    "rwkv6": {"head_dim": 32, "mix_rank": 8, "decay_rank": 8},
    "rwkv7": {"head_dim": 32, "decay_rank": 8, "rate_rank": 8, "value_rank": 8, "gate_rank": 16},
    "mom": {"num_memories": 3, "num_heads": 1, "head_dim": 16, "value_dim": 16},
}
"""Wherever a mixer's state can have any size it holds 1024 numbers per layer, 32 x 32 or as near as heads allow."""
SIGNED = {f"{kind}_signed": kind for kind in ("deltanet", "gated_deltanet", "kda")}
"""With ``negative_eigenvalues``: transitions from -1 to 1 instead of 0 to 1."""


def config(name: str) -> ModelConfig:
    """Of a kind or a name in ``SIGNED``. The token shift of the channel mixing gives every mixer the short convolution
    that recall needs (arXiv 2312.04927)."""
    kind = SIGNED.get(name, name)
    settings = SETTINGS.get(kind, {}) | ({"negative_eigenvalues": True} if name in SIGNED else {})
    branches = {"mixer": branch_class(kind).Config(**settings), "ffn": RWKVChannelConfig(D_FF)}
    return ModelConfig(D_MODEL, branches, f"{LAYERS} * (mixer ffn)", init_std=EMBEDDING_STD)


@torch.no_grad()
def build(name: str, vocab_size: int, seed: int, sharp: bool) -> LanguageModel:
    """sharp: the mixers' matrices have variance 1 / fan_in instead of the library's initial values, whose usual 0.02
    is that of a model 2500 wide: here softmax would start flat, while a delta rule likes it."""
    model = LanguageModel(config(name), vocab_size)
    model.initialise(seed)
    if sharp:
        for branch in model.branches[::2]:
            info = branch.param_info()
            for key, parameter in branch.named_parameters():
                fan_in = info[key].fan_in
                if info[key].role == "matrix" and fan_in is not None and (std := float(parameter.std())) > 0:
                    parameter.mul_(fan_in**-0.5 / std)
    return model


def state_floats(name: str) -> int:
    """Numbers that a layer's mixer carries on after 64 tokens, the tails of its convolutions included."""
    return int(config(name).branches["mixer"].state_bytes(D_MODEL, 1, 64)) // 4
