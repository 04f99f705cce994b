"""Qwen3: Llama with normalised query and key heads, and a window in the layers that ``layer_types`` names."""

from __future__ import annotations

from typing import Any, ClassVar

from lmtrain.hub.llama import ATTENTION, Llama
from lmtrain.hub.table import Rule, same
from lmtrain.model.config import ModelConfig
from lmtrain.model.mixers.attention_settings import AttentionConfig

QK_NORM_EPS = 1e-6
"""Of lmtrain's query and key norms; Qwen3 has one epsilon for all its norms."""


class Qwen3(Llama):
    """See the module."""

    name = "Qwen3"
    model_type = "qwen3"
    attention: ClassVar[list[Rule]] = [
        *ATTENTION,
        same("branch.q_norm.weight", "self_attn.q_norm.weight"),
        same("branch.k_norm.weight", "self_attn.k_norm.weight"),
    ]

    def _may_differ(self) -> tuple[str, ...]:
        return ("window",)

    def _attention(self, cfg: ModelConfig, attention: list[AttentionConfig]) -> list[str]:
        found = [] if all(one.qk_norm for one in attention) else ["attention.qk_norm is false"]
        if cfg.norm_eps != QK_NORM_EPS:
            found.append(f"model.norm_eps is {cfg.norm_eps:g}, its query and key norms share {QK_NORM_EPS:g}")
        windows = sorted({one.window for one in attention if one.window is not None})
        return found + ([f"windows of {', '.join(map(str, windows))}, it has one"] if len(windows) > 1 else [])

    def _own(self, cfg: ModelConfig) -> dict[str, Any]:
        windows = [cfg.branches[name].window for name in cfg.order()[::2]]
        window = next((one for one in windows if one is not None), None)
        return {
            "attention_bias": False,
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "max_window_layers": 0,
            "layer_types": ["full_attention" if one is None else "sliding_attention" for one in windows],
        }
