"""Mamba2: Mamba-2 mixers alone. Their table serves NemotronH too.

Packing in transformers 5.23: ``in_proj`` rows z, x, B, C, dt; ``conv1d`` over x, B, C. The gated norm is over groups,
as ours.
"""

from __future__ import annotations

from typing import Any

from lmtrain.hub.settings import differing, distinct
from lmtrain.hub.table import CONCAT, CONCAT_CONV, HubClass, Rule, same
from lmtrain.model.config import ModelConfig
from lmtrain.model.mixers.mamba2 import Mamba2Config

MIXER = [
    same("norm.weight", "norm.weight"),
    Rule(tuple(f"branch.{name}.weight" for name in ("z", "x", "B", "C", "dt")), ("mixer.in_proj.weight",), CONCAT),
    Rule(("branch.conv_x", "branch.conv_bc"), ("mixer.conv1d.weight",), CONCAT_CONV),
    Rule(("branch.conv_x_bias", "branch.conv_bc_bias"), ("mixer.conv1d.bias",), CONCAT),
    Rule(("branch.decay.A_log",), ("mixer.A_log",), keep_fp32=True),
    Rule(("branch.decay.dt_bias",), ("mixer.dt_bias",), keep_fp32=True),
    Rule(("branch.skip.D",), ("mixer.D",), keep_fp32=True),
    same("branch.norm", "mixer.norm.weight"),
    same("branch.o.weight", "mixer.out_proj.weight"),
]
OUTSIDE = [same("embed.weight", "backbone.embeddings.weight"), same("final_norm.weight", "backbone.norm_f.weight")]
HEAD = same("head.weight", "lm_head.weight")
UNLIMITED = 1e30
"""An upper limit of the step size that none reaches; infinity is not JSON."""


def mixer_reasons(cfg: ModelConfig) -> list[str]:
    """Why the mamba2 branches are not those of transformers: one epsilon for all norms, one size for all layers."""
    mixers: list[Mamba2Config] = distinct(cfg, "mamba2")
    eps = [one.norm_eps for one in mixers if one.norm_eps != cfg.norm_eps]
    found = [f"mamba2.norm_eps is {one:g} and model.norm_eps {cfg.norm_eps:g}, it has one" for one in eps]
    # chunk does not change the function, mimetic_length is about initial values alone
    return found + differing("mamba2", mixers, except_for=("norm_eps", "chunk", "mimetic_length"))


class Mamba2(HubClass):
    """See the module."""

    name = "Mamba2"
    model_type = "mamba2"

    def reasons(self, cfg: ModelConfig) -> list[str]:
        others = sorted({cfg.branches[name].kind for name in cfg.order()} - {"mamba2"})
        return [f"no {kind}" for kind in others] + mixer_reasons(cfg)

    def rules(self, cfg: ModelConfig) -> list[Rule]:
        found = list(OUTSIDE) if cfg.tie_embeddings else [*OUTSIDE, HEAD]
        for index, _ in enumerate(cfg.order()):
            found += [rule.at(f"blocks.{index}.", f"backbone.layers.{index}.") for rule in MIXER]
        return found

    def config(self, cfg: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
        mixer: Mamba2Config = distinct(cfg, "mamba2")[0]
        _, heads, _ = mixer.sizes(cfg.d_model)
        return {
            "vocab_size": vocab_size,
            "hidden_size": cfg.d_model,
            "num_hidden_layers": len(cfg.order()),
            "num_heads": heads,
            "head_dim": mixer.head_dim,
            "state_size": mixer.d_state,
            "expand": mixer.expand,
            "n_groups": mixer.num_groups,
            "conv_kernel": mixer.conv_width,
            "chunk_size": mixer.chunk,
            "hidden_act": "silu",
            "use_bias": False,
            "use_conv_bias": True,
            "layer_norm_epsilon": cfg.norm_eps,
            "time_step_limit": [0.0, UNLIMITED],
            "time_step_min": 1e-3,
            "time_step_max": 1e-1,
            "time_step_floor": 1e-4,
            "initializer_range": cfg.init_std,
            "rescale_prenorm_residual": False,  # true divides the loaded out_proj in transformers 5.23
            "residual_in_fp32": False,
            "tie_word_embeddings": cfg.tie_embeddings,
        }
