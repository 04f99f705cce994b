"""Mamba: Mamba mixers alone. Its table serves FalconMamba too.

Packing in transformers 5.23: ``in_proj`` rows x, z; ``x_proj`` rows dt, B, C. Fact: with a cache, a second chunk of
more than one token starts from an empty state, without a warning; token by token and ``generate`` are right.
"""

from __future__ import annotations

from typing import Any, ClassVar

from lmtrain.hub.mamba2 import HEAD, OUTSIDE
from lmtrain.hub.settings import differing, distinct
from lmtrain.hub.table import CONCAT, CONCAT_CONV, HubClass, Rule, same
from lmtrain.model.config import ModelConfig
from lmtrain.model.mixers.mamba import MambaConfig

MIXER = [
    same("norm.weight", "norm.weight"),
    Rule(("branch.x.weight", "branch.z.weight"), ("mixer.in_proj.weight",), CONCAT),
    Rule(("branch.conv.weight",), ("mixer.conv1d.weight",), CONCAT_CONV),
    same("branch.conv.bias", "mixer.conv1d.bias"),
    Rule(tuple(f"branch.{name}.weight" for name in ("dt_in", "B", "C")), ("mixer.x_proj.weight",), CONCAT),
    same("branch.dt_out.weight", "mixer.dt_proj.weight"),
    Rule(("branch.decay.dt_bias",), ("mixer.dt_proj.bias",), keep_fp32=True),
    Rule(("branch.decay.A_log",), ("mixer.A_log",), keep_fp32=True),
    Rule(("branch.skip.D",), ("mixer.D",), keep_fp32=True),
    same("branch.o.weight", "mixer.out_proj.weight"),
]


class Mamba(HubClass):
    """See the module."""

    name = "Mamba"
    model_type = "mamba"
    limits = (
        "with a cache, a second call of more than one token forgets those before it, without a warning (chunked "
        "prefill, a cached prompt, assisted decoding); token by token and `generate` are right."
    )
    knows: ClassVar[dict[str, str]] = {"mamba": "kind d_state expand dt_rank conv_width mimetic_length"}

    def reasons(self, cfg: ModelConfig) -> list[str]:
        others = sorted({cfg.branches[name].kind for name in cfg.order()} - {"mamba"})
        # mimetic_length is about initial values alone
        return [f"no {kind}" for kind in others] + differing("mamba", distinct(cfg, "mamba"), ("mimetic_length",))

    def rules(self, cfg: ModelConfig) -> list[Rule]:
        found = list(OUTSIDE) if cfg.tie_embeddings else [*OUTSIDE, HEAD]
        for index, _ in enumerate(cfg.order()):
            found += [rule.at(f"blocks.{index}.", f"backbone.layers.{index}.") for rule in MIXER]
        return found

    def config(self, cfg: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
        mixer: MambaConfig = distinct(cfg, "mamba")[0]
        return {
            "vocab_size": vocab_size,
            "hidden_size": cfg.d_model,
            "num_hidden_layers": len(cfg.order()),
            "state_size": mixer.d_state,
            "expand": mixer.expand,
            "time_step_rank": mixer.rank(cfg.d_model),
            "conv_kernel": mixer.conv_width,
            "hidden_act": "silu",
            "use_bias": False,
            "use_conv_bias": True,
            "layer_norm_epsilon": cfg.norm_eps,
            "time_step_scale": 1.0,
            "time_step_min": 1e-3,
            "time_step_max": 1e-1,
            "time_step_init_scheme": "random",
            "time_step_floor": 1e-4,
            "initializer_range": cfg.init_std,
            "rescale_prenorm_residual": False,
            "residual_in_fp32": False,
            "use_mambapy": False,
            "use_associative_scan": True,
            "tie_word_embeddings": cfg.tie_embeddings,
        }
