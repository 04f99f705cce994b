"""NemotronH: any sequence of Mamba-2, attention without positions, and MLP or mixture of experts with squared ReLU.

Facts: it clamps the step size from below by ``time_step_min`` (ours is unclamped: 1e-30, since 0 breaks its
initialisation), ignores ``tie_word_embeddings``, always has a shared expert, and cannot use its cache without an
attention layer. On disk: ``backbone.`` names, one tensor per expert, legacy block names.
"""

from __future__ import annotations

from typing import Any

from lmtrain.hub.mamba2 import HEAD, MIXER, OUTSIDE, mixer_reasons
from lmtrain.hub.settings import differing, distinct
from lmtrain.hub.table import COPY, EXPERTS, HubClass, Rule, same, zeros
from lmtrain.model.config import ModelConfig
from lmtrain.model.ffn.moe_settings import MoEConfig

BLOCKS = {"mamba2": ("mamba", "M"), "attention": ("attention", "*"), "mlp": ("mlp", "-"), "moe": ("moe", "E")}
"""Our kind to its legacy name and pattern letter, which transformers 4, vLLM and llama.cpp know."""
SMALLEST_STEP = 1e-30

NORM = same("norm.weight", "norm.weight")
ATTENTION = [NORM] + [same(f"branch.{name}.weight", f"mixer.{name}_proj.weight") for name in ("q", "k", "v", "o")]
MLP = [NORM] + [same(f"branch.{name}.weight", f"mixer.{name}_proj.weight") for name in ("up", "down")]
ROUTER = Rule(("branch.router.weight",), ("mixer.gate.weight",), keep_fp32=True)
BIAS = Rule(("branch.router_bias",), ("mixer.gate.e_score_correction_bias",), keep_fp32=True)
SHARED = [same(f"branch.shared.{name}.weight", f"mixer.shared_experts.{name}_proj.weight") for name in ("up", "down")]


def _experts(moe: MoEConfig, name: str) -> Rule:
    disk = tuple(f"mixer.experts.{expert}.{name}_proj.weight" for expert in range(moe.num_experts))
    return Rule((f"branch.experts.{name}",), disk, EXPERTS)


def _moe(moe: MoEConfig, d_model: int) -> list[Rule]:
    # a bias that does not take part in the choice must not do so there
    unused = Rule(BIAS.ours, BIAS.disk, zeros((moe.num_experts,), ours=1), keep_fp32=True)
    bias = BIAS if moe.balance == "bias" else unused
    # it always has a shared expert: one of width 1 that computes zero
    absent = Rule((), tuple(rule.disk[0] for rule in SHARED), zeros((1, d_model), (d_model, 1)))
    shared = SHARED if moe.shared is not None else [absent]
    return [NORM, ROUTER, bias, _experts(moe, "up"), _experts(moe, "down"), *shared]


class NemotronH(HubClass):
    """See the module."""

    name = "NemotronH"
    model_type = "nemotron_h"

    def reasons(self, cfg: ModelConfig) -> list[str]:
        others = sorted({cfg.branches[name].kind for name in cfg.order()} - BLOCKS.keys())
        found = [f"no {kind}" for kind in others]
        for one in distinct(cfg, "attention"):
            found += ["attention.rope is true"] if one.rope else []
            found += ["attention.qk_norm is true"] if one.qk_norm else []
            found += [f"attention.window is {one.window}"] if one.window is not None else []
        for one in distinct(cfg, "mlp"):
            found += [f"mlp.activation is {one.activation}, it has relu2"] if one.activation != "relu2" else []
        for one in distinct(cfg, "moe"):
            found += [f"moe.activation is {one.activation}, it has relu2"] if one.activation != "relu2" else []
            found += [f"moe.router is {one.router}, it has sigmoid"] if one.router != "sigmoid" else []
            found += ["moe.num_experts is 1, it needs 2"] if one.num_experts < 2 else []
        found += differing("attention", distinct(cfg, "attention"), except_for=("rope_theta",))
        found += differing("mlp", distinct(cfg, "mlp"))
        found += differing("moe", distinct(cfg, "moe"), except_for=("balance", "aux_weight", "bias_rate"))
        return list(dict.fromkeys(found)) + mixer_reasons(cfg)

    def cached(self, cfg: ModelConfig) -> bool:
        return bool(distinct(cfg, "attention"))

    def rules(self, cfg: ModelConfig) -> list[Rule]:
        tied = Rule(OUTSIDE[0].ours, OUTSIDE[0].disk + HEAD.disk, COPY)
        found = [tied, *OUTSIDE[1:]] if cfg.tie_embeddings else [*OUTSIDE, HEAD]
        fixed = {"mamba2": MIXER, "attention": ATTENTION, "mlp": MLP}
        for index, name in enumerate(cfg.order()):
            one = cfg.branches[name]
            table = _moe(one, cfg.d_model) if one.kind == "moe" else fixed[one.kind]
            found += [rule.at(f"blocks.{index}.", f"backbone.layers.{index}.") for rule in table]
        return found

    def config(self, cfg: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
        blocks = [BLOCKS[cfg.branches[name].kind] for name in cfg.order()]
        settings: dict[str, Any] = {
            "vocab_size": vocab_size,
            "hidden_size": cfg.d_model,
            "num_hidden_layers": len(blocks),
            "layers_block_type": [name for name, _ in blocks],
            "hybrid_override_pattern": "".join(letter for _, letter in blocks),
            "max_position_embeddings": seq_len,
            "layer_norm_epsilon": cfg.norm_eps,
            "mlp_hidden_act": "relu2",
            "initializer_range": cfg.init_std,
            "tie_word_embeddings": False,
            "use_bias": False,
            "attention_bias": False,
            "mlp_bias": False,
            "mamba_proj_bias": False,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "sliding_window": None,
            "residual_in_fp32": False,
            "rescale_prenorm_residual": False,
            "num_nextn_predict_layers": 0,
        }
        for one in distinct(cfg, "attention")[:1]:
            heads = {"num_attention_heads": one.num_heads, "num_key_value_heads": one.kv_heads}
            settings |= heads | {"head_dim": one.width(cfg.d_model)}
        for one in distinct(cfg, "mlp")[:1]:
            settings["intermediate_size"] = one.d_ff
        for one in distinct(cfg, "mamba2")[:1]:
            settings |= {
                "mamba_num_heads": one.sizes(cfg.d_model)[1],
                "mamba_head_dim": one.head_dim,
                "mamba_hidden_act": "silu",
                "ssm_state_size": one.d_state,
                "n_groups": one.num_groups,
                "expand": one.expand,
                "conv_kernel": one.conv_width,
                "use_conv_bias": True,
                "chunk_size": one.chunk,
                "mamba_ssm_cache_dtype": "float32",
                "time_step_min": SMALLEST_STEP,
                "time_step_max": 1e-1,
                "time_step_floor": 1e-4,
            }
        for one in distinct(cfg, "moe")[:1]:
            # only with experts: num_experts_per_tok alone makes llama.cpp's converter expect them
            settings |= {
                "n_routed_experts": one.num_experts,
                "num_experts_per_tok": one.top_k,
                "moe_intermediate_size": one.d_expert,
                "moe_shared_expert_intermediate_size": one.shared.d_ff if one.shared else 1,
                "n_shared_experts": 1,
                "moe_latent_size": None,
                "n_group": 1,
                "topk_group": 1,
                "norm_topk_prob": one.normalise_weights,
                "routed_scaling_factor": one.scale,
            }
        return settings
