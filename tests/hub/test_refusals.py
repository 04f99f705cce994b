"""What each class cannot express, one setting at a time changed in a model that it can: refused, with the reason."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from lmtrain.hub.match import match
from lmtrain.model.block import Multipliers
from tests.hub.models import config

Change = dict[str, Any]
REFUSED: list[tuple[str, Change, str, Change, str]] = [
    ("Olmo2", {"norm_place": "pre"}, "", {}, "model.norm_place is pre, it has post"),
    ("Olmo2", {}, "all_normed", {"qk_norm_over": "head"}, "attention.qk_norm_over is head, it has all"),
    ("Olmo2", {}, "all_normed", {"qk_norm": False}, "attention.qk_norm is false, it has true"),
    ("Olmo2", {"norm_eps": 1e-5}, "", {}, "attention.qk_norm_eps is 1e-06 and model.norm_eps 1e-05"),
    ("Olmo2", {}, "all_normed", {"head_dim": 12}, "attention.head_dim is 12, it has d_model 64 / num_heads 4"),
    (
        "Olmo2",
        {},
        "all_normed",
        {"rope_fraction": 0.5},
        "attention.rope_fraction is 0.5, which its table does not know",
    ),
    ("Mixtral", {}, "soft", {"normalise_weights": False}, "moe.normalise_weights is false, it has true"),
    ("Mixtral", {}, "soft", {"router": "sigmoid"}, "moe.router is sigmoid, it has softmax"),
    ("Mixtral", {}, "soft", {"activation": "geglu"}, "moe.activation is geglu, it has swiglu"),
    ("Mixtral", {}, "soft", {"balance": "bias"}, "moe.balance is bias, its router has none"),
    ("Mixtral", {}, "soft", {"scale": 2.0}, "moe.scale is 2.0, it has 1.0"),
    ("Qwen3Moe", {}, "soft_bare", {"num_shared": 1}, "moe.num_shared is 1, it has 0"),
    ("Mixtral", {}, "soft", {"num_groups": 2}, "moe.num_groups is 2, which its table does not know"),
    ("Mixtral", {"pattern": "2 * attn soft"}, "", {}, "the order is not (attention moe) repeated"),
    ("Qwen3Moe", {"norm_eps": 1e-5}, "", {}, "model.norm_eps is 1e-05, its query and key norms share 1e-06"),
    ("Qwen3Moe", {}, "wide_normed", {"qk_norm": False}, "attention.qk_norm is false"),
    ("Mamba", {"norm": "layer"}, "", {}, "model.norm is layer, which its table does not know"),
    ("MiniMax", {"norm_place": "pre"}, "", {}, "model.norm_place is pre, it has through"),
    ("MiniMax", {}, "lightning", {"decay": "none"}, "linear_attention.decay is none, it has lightning"),
    ("MiniMax", {}, "lightning", {"norm_eps": 1e-5}, "linear_attention.norm_eps is 1e-05, it has 1e-06"),
    ("MiniMax", {}, "lightning", {"num_heads": 8}, "heads of 4 x 16 and 8 x 16, it has one"),
    ("MiniMax", {}, "attn", {"rope": False}, "attention.rope is false, it has true"),
    ("MiniMax", {}, "soft", {"normalise_weights": False}, "moe.normalise_weights is false, it has true"),
    (
        "MiniMax",
        {"pattern": "2 * (soft lightning) soft attn"},
        "",
        {},
        "the order is not (linear_attention or attention)",
    ),
    ("MiniMax", {"multipliers": {"soft": Multipliers(input=0.5)}}, "", {}, "multipliers.input is 0.5, it has 1.0"),
    ("Rwkv", {"norm": "rms"}, "", {}, "model.norm is rms, it has layer"),
    ("Rwkv", {"norm_eps": 1e-6}, "", {}, "model.norm_eps is 1e-06, its last norm has 1e-05"),
    ("Rwkv", {"embedding_norm": False}, "", {}, "model.embedding_norm is false"),
    ("Rwkv", {}, "channel", {"version": "6"}, "rwkv_channel.version is 6, it has 4"),
    ("Rwkv", {"pattern": "time channel"}, "", {}, "it needs two layers"),
    ("Rwkv", {"pattern": "2 * time channel"}, "", {}, "the order is not (rwkv4 rwkv_channel) repeated"),
    ("RecurrentGemma", {"embedding_scale": 1.0}, "", {}, "model.embedding_scale is 1, it has 8"),
    ("RecurrentGemma", {"pattern": "half_turned geglu"}, "", {}, "there is no rg_lru"),
    ("RecurrentGemma", {"pattern": "lru half_turned geglu"}, "", {}, "then (mlp) in every layer"),
    ("RecurrentGemma", {}, "half_turned", {"window": None}, "attention.window is null, it has one"),
    ("RecurrentGemma", {}, "half_turned", {"num_heads": 8}, "num_heads of 4, 8, it has one"),
    ("RecurrentGemma", {}, "lru", {"width": 96}, "rg_lru.width is 96, its cache has d_model channels"),
    ("RecurrentGemma", {}, "geglu", {"bias": False}, "mlp.bias is false, it has true"),
]


@pytest.mark.parametrize(("name", "model", "branch", "change", "reason"), REFUSED, ids=lambda value: str(value)[:30])
def test_one_setting_refuses(name: str, model: Change, branch: str, change: Change, reason: str) -> None:
    cfg = config(name)
    if branch:
        changed = {branch: dataclasses.replace(cfg.branches[branch], **change)}
        cfg = dataclasses.replace(cfg, branches=cfg.branches | changed)
    found = match(dataclasses.replace(cfg, **model))
    assert isinstance(found, dict)
    assert any(reason in one for one in found[name]), found[name]
