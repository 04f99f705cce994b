"""Tiny models of every class, with every parameter moved away from its initial value, and a tokenizer for them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from lmtrain.data.ingest.tokenizer_training import train_bpe
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.hub.export import perturb
from lmtrain.model.block import Multipliers
from lmtrain.model.config import ModelConfig
from lmtrain.model.ffn.mlp import MLPConfig
from lmtrain.model.ffn.moe_settings import MoEConfig
from lmtrain.model.ffn.rwkv_channel import RWKVChannelConfig
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.mixers.attention_settings import AttentionConfig
from lmtrain.model.mixers.gated_deltanet import GatedDeltaNetConfig
from lmtrain.model.mixers.kda import KDAConfig
from lmtrain.model.mixers.linear_attention import LinearAttentionConfig
from lmtrain.model.mixers.mamba import MambaConfig
from lmtrain.model.mixers.mamba2 import Mamba2Config
from lmtrain.model.mixers.mla import MLAConfig
from lmtrain.model.mixers.rg_lru import RGLRUConfig
from lmtrain.model.mixers.rwkv4 import RWKV4Config
from lmtrain.model.rope import RopeScaling

VOCAB = 384
EXPERTS = {"num_experts": 6, "top_k": 2, "d_expert": 24, "activation": "relu2", "router": "sigmoid"}
BRANCHES: dict[str, Any] = {
    "attn": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16),
    "local": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16, window=20),
    "normed": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=12, qk_norm=True, rope_theta=5e4),
    "normed_local": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=12, qk_norm=True, rope_theta=5e4, window=20),
    "wide_normed": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=24, qk_norm=True, window=40),
    "all_normed": AttentionConfig(num_heads=4, num_kv_heads=2, qk_norm=True, qk_norm_over="all", rope_theta=5e4),
    "nope": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=24, rope=False),
    "mlp": MLPConfig(d_ff=80),
    "relu2": MLPConfig(d_ff=80, activation="relu2"),
    "mamba": MambaConfig(d_state=8, dt_rank=6),
    "normed_mamba": MambaConfig(d_state=8, dt_rank=6, selection_norm=True),
    "time": RWKV4Config(),
    "channel": RWKVChannelConfig(d_ff=80, version="4"),
    "lru": RGLRUConfig(num_heads=4, conv_width=3),
    "half_turned": AttentionConfig(num_heads=4, num_kv_heads=1, rope_fraction=0.5, rope_theta=5e4, window=20),
    "biased_out": AttentionConfig(4, num_kv_heads=1, rope_fraction=0.5, window=24, bias="out"),
    "quarter_turned": AttentionConfig(4, num_kv_heads=2, rope_fraction=0.25, window=40, bias="all"),
    "geglu": MLPConfig(d_ff=80, activation="geglu", bias=True),
    "ssm": Mamba2Config(d_state=8, head_dim=16, num_groups=2, chunk=16),
    "moe": MoEConfig(**EXPERTS, num_shared=2, d_shared=20, balance="bias", scale=1.5),
    "soft": MoEConfig(num_experts=6, top_k=2, d_expert=24, balance="none"),
    "soft_bare": MoEConfig(num_experts=6, top_k=2, d_expert=24, normalise_weights=False, balance="none"),
    "bare": MoEConfig(**EXPERTS, balance="aux", normalise_weights=False),
    "delta": GatedDeltaNetConfig(num_heads=2, num_value_heads=4, head_dim=8, value_dim=12, norm_eps=1e-6),
    "gated": AttentionConfig(
        num_heads=4, num_kv_heads=2, head_dim=16, qk_norm=True, output_gate=True, rope_fraction=0.25, rope_theta=5e4
    ),
    "latent": MLAConfig(4, kv_rank=24, q_rank=20, nope_dim=12, rope_dim=8, value_dim=10, rope_theta=5e4),
    "plain_latent": MLAConfig(4, kv_rank=24, nope_dim=12, rope_dim=8, value_dim=10),
    "nope_latent": MLAConfig(4, kv_rank=24, nope_dim=12, rope_dim=8, value_dim=10, rope=False),
    "grouped": MoEConfig(
        8, 3, 24, num_shared=2, router="sigmoid", balance="bias", scale=2.5, num_groups=4, top_groups=2
    ),
    "sigmoid_moe": MoEConfig(6, 2, 24, num_shared=1, router="sigmoid", balance="aux", normalise_weights=False),
    "kda": KDAConfig(num_heads=3, head_dim=12),
    "sinks": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16, sinks=True, bias="all", rope_theta=5e4),
    "sinks_local": AttentionConfig(
        num_heads=4, num_kv_heads=2, head_dim=16, sinks=True, bias="all", rope_theta=5e4, window=20
    ),
    "oss_moe": MoEConfig(6, 2, 24, bias=True, activation="swiglu_clamped", balance="none"),
    "lightning": LinearAttentionConfig(num_heads=4, head_dim=16, decay="lightning", norm_eps=1e-6),
    "even_nope": AttentionConfig(num_heads=4, num_kv_heads=2, rope=False),
    "shared_moe": MoEConfig(6, 2, 24, num_shared=2, d_shared=20, balance="none"),
    "gated_moe": MoEConfig(6, 2, 24, num_shared=2, d_shared=20, shared_gate=True, balance="aux"),
}
LLAMA3 = RopeScaling("llama3", factor=4.0, original_length=48, fast=3.0)
YARN = RopeScaling("yarn", factor=4.0, original_length=48, slow=0.5, fast=6.0)
BRANCHES |= {
    "attn_llama3": dataclasses.replace(BRANCHES["attn"], rope_scaling=LLAMA3),
    "local_yarn": dataclasses.replace(BRANCHES["local"], rope_scaling=YARN),
    "normed_yarn": dataclasses.replace(BRANCHES["normed"], rope_scaling=YARN),
    "normed_local_yarn": dataclasses.replace(BRANCHES["normed_local"], rope_scaling=YARN),
    "all_normed_yarn": dataclasses.replace(BRANCHES["all_normed"], rope_scaling=YARN),
    "wide_normed_llama3": dataclasses.replace(BRANCHES["wide_normed"], rope_scaling=LLAMA3),
}
SCALES = {"embedding_scale": 3.0, "logit_scale": 0.7}
AROUND = {
    "ssm": Multipliers(input=1.3, output=0.6),
    "attn": Multipliers(input=0.7, output=1.4),
    "mlp": Multipliers(output=0.8),
}
RESIDUAL = {name: Multipliers(output=0.6) for name in ("ssm", "even_nope", "shared_moe")}
THROUGH = {
    "lightning": Multipliers(skip=1.3, output=0.7),
    "attn": Multipliers(skip=0.8, output=1.2),
    "soft": Multipliers(skip=0.9, output=1.1),
}
MODELS = {
    "Llama": ("2 * (attn mlp)", {}),
    "Llama tied": ("2 * (attn mlp)", {"tie_embeddings": True}),
    "Llama llama3": ("2 * (attn_llama3 mlp)", {}),
    "Mistral yarn": ("2 * (local_yarn mlp)", {}),
    "Qwen3 yarn": ("normed_yarn mlp normed_local_yarn mlp", {"norm_eps": 1e-6}),
    "Olmo2 yarn": ("all_normed_yarn mlp", {"norm_eps": 1e-6, "norm_place": "post"}),
    "Mixtral llama3": ("attn_llama3 soft", {}),
    "Qwen3Moe llama3": ("wide_normed_llama3 soft", {"norm_eps": 1e-6}),
    "Mistral": ("2 * (local mlp)", {}),
    "Qwen3": ("normed mlp normed_local mlp", {"norm_eps": 1e-6}),
    "Olmo2": ("2 * (all_normed mlp)", {"norm_eps": 1e-6, "norm_place": "post"}),
    "Mixtral": ("2 * (attn soft)", {}),
    "Qwen3Moe": ("wide_normed mlp 2 * (wide_normed soft_bare)", {"norm_eps": 1e-6}),
    "Qwen3Moe tied": ("2 * (wide_normed soft)", {"norm_eps": 1e-6, "tie_embeddings": True}),
    "Mamba": ("2 * mamba", {}),
    "Mamba tied": ("2 * mamba", {"tie_embeddings": True}),
    "FalconMamba": ("2 * normed_mamba", {}),
    "FalconMamba tied": ("2 * normed_mamba", {"tie_embeddings": True}),
    "Mamba2": ("3 * ssm", {}),
    "Mamba2 tied": ("2 * ssm", {"tie_embeddings": True}),
    "RecurrentGemma": ("2 * (lru geglu) half_turned geglu lru geglu", {"embedding_scale": 8.0, "logit_softcap": 2.0}),
    "RecurrentGemma tied": (
        "lru geglu quarter_turned geglu",
        {"embedding_scale": 8.0, "tie_embeddings": True},
    ),
    "RecurrentGemma as published": (
        "2 * (lru geglu) biased_out geglu",
        {"embedding_scale": 8.0, "logit_softcap": 2.0, "tie_embeddings": True},
    ),
    "RecurrentGemma without attention": ("2 * (lru geglu)", {"embedding_scale": 8.0}),
    "Rwkv": ("2 * (time channel)", {"norm": "layer", "embedding_norm": True}),
    "Rwkv tied": ("3 * (time channel)", {"norm": "layer", "embedding_norm": True, "tie_embeddings": True}),
    "NemotronH": ("ssm relu2 nope relu2 ssm", {}),
    "NemotronH tied": ("ssm nope relu2", {"tie_embeddings": True}),
    "NemotronH without attention": ("ssm relu2 ssm", {}),
    "NemotronH moe": ("ssm moe nope moe", {}),
    "NemotronH bare moe": ("ssm bare nope relu2", {"tie_embeddings": True}),
    "Qwen3Next": ("delta gated_moe gated gated_moe delta mlp", {"norm_eps": 1e-6}),
    "Qwen3Next tied without attention": ("2 * (delta mlp)", {"norm_eps": 1e-6, "tie_embeddings": True}),
    "DeepseekV3": ("latent mlp 2 * (latent grouped)", {}),
    "DeepseekV3 tied": ("2 * (plain_latent sigmoid_moe)", {"tie_embeddings": True}),
    "GptOss": ("sinks_local oss_moe sinks oss_moe", {}),
    "GptOss tied": ("2 * (sinks oss_moe)", {"tie_embeddings": True}),
    "KimiLinear": ("kda mlp kda grouped nope_latent grouped", {}),
    "KimiLinear tied without attention": ("2 * (kda sigmoid_moe)", {"tie_embeddings": True}),
    "MiniMax": ("lightning soft attn soft lightning soft", {"norm_place": "through", "multipliers": THROUGH}),
    "MiniMax tied": ("local soft 2 * (lightning soft)", {"norm_place": "through", "tie_embeddings": True}),
    "MiniMax lightning alone": ("2 * (lightning soft)", {"norm_place": "through"}),
    "FalconH1": ("ssm + attn mlp attn + ssm mlp", {**SCALES, "multipliers": AROUND}),
    "FalconH1 tied": ("2 * (ssm + attn mlp)", {"tie_embeddings": True}),
    "GraniteMoeHybrid": ("ssm shared_moe even_nope shared_moe ssm shared_moe", {**SCALES, "multipliers": RESIDUAL}),
    "GraniteMoeHybrid tied": ("attn mlp ssm mlp", {"tie_embeddings": True}),
    "GraniteMoeHybrid alone": ("2 * (even_nope mlp)", {}),
    "GraniteMoeHybrid without attention": ("2 * (ssm mlp)", {}),
}
"""Pattern and settings of the model; the first word is the class it must go to."""


def config(name: str, d_model: int = 64) -> ModelConfig:
    pattern, settings = MODELS[name]
    used = {
        branch: BRANCHES[branch] for branch in BRANCHES if branch in pattern.replace("(", " ").replace(")", " ").split()
    }
    return ModelConfig(d_model=d_model, branches=used, pattern=pattern, vocab_size=VOCAB, init_std=0.1, **settings)


def build(cfg: ModelConfig) -> LanguageModel:
    """The model, its parameters and buffers perturbed by more than an export would."""
    model = LanguageModel(cfg, VOCAB).requires_grad_(False).eval()
    model.initialise(seed=0)
    for seed in range(1, 9):
        perturb(model, seed)
    for name, parameter in model.named_parameters():
        if name.endswith("router.weight"):
            parameter.mul_(10)  # else the bias alone chooses, and some experts are never used
        if name.endswith(("experts.up_bias", "experts.gate_bias")):
            parameter.add_(torch.linspace(-9, 9, parameter.shape[1]))  # beyond what gpt-oss clamps
        if name.endswith("norm.weight"):
            parameter.clamp_(min=0.5)  # w - 1 is on disk: exact both ways from there on
        if name.endswith("mix.weight"):
            parameter.mul_(2**22).round_().div_(2**22)  # 1 - share is on disk: exact both ways for these
    return model


def tokenizer(folder: Path) -> Tokenizer:
    """A byte-level BPE of 300 tokens, trained on a few lines."""
    text = "def f(x):\n\treturn x + 1  # caf\u00e9 \u4e2d\u6587\nfor i in range(12345):\n    print('hello, world', i)\n"
    return train_bpe([text * 5], 300, folder / "tokenizer.json")


def shapes(model: LanguageModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def random_tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
