"""Qwen3Moe: Qwen3 with a mixture of experts in some layers (all, as published) and one window everywhere or none.

Facts: layers without a mixture are named in ``mlp_only_layers``; ``norm_topk_prob`` is false unless written;
``head_dim`` is read though ``Qwen3MoeConfig`` does not declare it, so it is written only where it is not
``d_model / num_heads``.
"""

from __future__ import annotations

from typing import Any, ClassVar

from lmtrain.hub.mixtral import Mixture
from lmtrain.hub.qwen3 import Qwen3
from lmtrain.hub.settings import distinct
from lmtrain.model.config import ModelConfig


class Qwen3Moe(Mixture, Qwen3):
    """See the module."""

    name = "Qwen3Moe"
    model_type = "qwen3_moe"
    ffn: ClassVar[tuple[str, ...]] = ("mlp", "moe")

    def _may_differ(self) -> tuple[str, ...]:
        return ()

    def config(self, cfg: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
        settings = super().config(cfg, vocab_size, seq_len)
        if settings["head_dim"] * settings["num_attention_heads"] == cfg.d_model:
            del settings["head_dim"]
        mixture = distinct(cfg, "moe")[0]
        return settings | {
            "intermediate_size": next((one.d_ff for one in distinct(cfg, "mlp")), mixture.d_expert),
            "mlp_only_layers": [i for i, name in enumerate(cfg.order()[1::2]) if cfg.branches[name].kind == "mlp"],
            "decoder_sparse_step": 1,
            "num_experts": mixture.num_experts,
            "moe_intermediate_size": mixture.d_expert,
            "norm_topk_prob": mixture.normalise_weights,
        }

    def _own(self, cfg: ModelConfig) -> dict[str, Any]:
        window = distinct(cfg, "attention")[0].window
        return {"attention_bias": False, "use_sliding_window": window is not None, "sliding_window": window}
