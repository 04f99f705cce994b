"""Mistral: Llama with one window everywhere (or none), and a head width of its own."""

from __future__ import annotations

from typing import Any

from lmtrain.hub.llama import Llama
from lmtrain.hub.settings import distinct
from lmtrain.model.config import ModelConfig
from lmtrain.model.mixers.attention_settings import AttentionConfig


class Mistral(Llama):
    """Both count the token itself as one of the window's tokens. Names as Llama's."""

    name = "Mistral"
    model_type = "mistral"

    def _attention(self, cfg: ModelConfig, attention: list[AttentionConfig]) -> list[str]:
        return ["attention.qk_norm is true"] if any(one.qk_norm for one in attention) else []

    def _own(self, cfg: ModelConfig) -> dict[str, Any]:
        return {"sliding_window": distinct(cfg, "attention")[0].window}
