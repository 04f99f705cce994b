"""Tiny models of every class, with every parameter moved away from its initial value, and a tokenizer for them."""

from __future__ import annotations

from pathlib import Path

import torch

from lmtrain.data.tokenizer import Tokenizer, train_bpe
from lmtrain.hub.export import perturb
from lmtrain.model.config import ModelConfig
from lmtrain.model.ffn.mlp import MLPConfig
from lmtrain.model.ffn.moe_settings import MoEConfig
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.mixers.attention import AttentionConfig
from lmtrain.model.mixers.mamba2 import Mamba2Config

VOCAB = 384
EXPERTS = {"num_experts": 6, "top_k": 2, "d_expert": 24, "activation": "relu2", "router": "sigmoid"}
BRANCHES = {
    "attn": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16),
    "local": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16, window=20),
    "normed": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=12, qk_norm=True, rope_theta=5e4),
    "normed_local": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=12, qk_norm=True, rope_theta=5e4, window=20),
    "nope": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=24, rope=False),
    "mlp": MLPConfig(d_ff=80),
    "relu2": MLPConfig(d_ff=80, activation="relu2"),
    "ssm": Mamba2Config(d_state=8, head_dim=16, num_groups=2, chunk=16),
    "moe": MoEConfig(**EXPERTS, num_shared=2, d_shared=20, balance="bias", scale=1.5),
    "bare": MoEConfig(**EXPERTS, balance="aux", normalise_weights=False),
}
MODELS = {
    "Llama": ("2 * (attn mlp)", {}),
    "Llama tied": ("2 * (attn mlp)", {"tie_embeddings": True}),
    "Mistral": ("2 * (local mlp)", {}),
    "Qwen3": ("normed mlp normed_local mlp", {"norm_eps": 1e-6}),
    "Mamba2": ("3 * ssm", {}),
    "Mamba2 tied": ("2 * ssm", {"tie_embeddings": True}),
    "NemotronH": ("ssm relu2 nope relu2 ssm", {}),
    "NemotronH tied": ("ssm nope relu2", {"tie_embeddings": True}),
    "NemotronH without attention": ("ssm relu2 ssm", {}),
    "NemotronH moe": ("ssm moe nope moe", {}),
    "NemotronH bare moe": ("ssm bare nope relu2", {"tie_embeddings": True}),
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
    return model


def tokenizer(folder: Path) -> Tokenizer:
    """A byte-level BPE of 300 tokens, trained on a few lines."""
    text = "def f(x):\n\treturn x + 1  # caf\u00e9 \u4e2d\u6587\nfor i in range(12345):\n    print('hello, world', i)\n"
    return train_bpe([text * 5], 300, folder / "tokenizer.json")


def shapes(model: LanguageModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def random_tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
