"""Questions about a model's settings that every matcher asks, and the answers that most classes write."""

from __future__ import annotations

import dataclasses
from typing import Any

from lmtrain.model.config import ModelConfig


def distinct(cfg: ModelConfig, kind: str) -> list[Any]:
    """The different settings of branches of ``kind`` in the order they first stand."""
    return list(dict.fromkeys(s for name in cfg.order() if (s := cfg.branches[name]).kind == kind))


def differing(kind: str, settings: list[Any], except_for: tuple[str, ...] = ()) -> list[str]:
    """A reason per field in which the settings differ: a class has one value for all layers."""
    if not settings:
        return []
    return [
        f"{kind}.{field.name} differs between layers ({', '.join(str(value) for value in values)})"
        for field in dataclasses.fields(settings[0])
        if field.name not in except_for
        and len(values := dict.fromkeys(getattr(one, field.name) for one in settings)) > 1
    ]


def usual(cfg: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
    """Keys of a config.json that most classes have, under these names."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": cfg.d_model,
        "hidden_act": "silu",
        "max_position_embeddings": seq_len,
        "initializer_range": cfg.init_std,
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tie_embeddings,
        "attention_dropout": 0.0,
    }
