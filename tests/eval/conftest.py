"""Small models and a small trained run to evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lmtrain.config.load import load
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.model.config import ModelConfig
from lmtrain.model.ffn.mlp import MLPConfig
from lmtrain.model.ffn.moe_settings import MoEConfig
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.mixers.attention_settings import AttentionConfig
from lmtrain.model.mixers.mamba2 import Mamba2Config

LLAMA = ModelConfig(
    d_model=32,
    branches={"attn": AttentionConfig(num_heads=4, num_kv_heads=2), "mlp": MLPConfig(d_ff=64)},
    pattern="2 * (attn mlp)",
)
HYBRID = ModelConfig(
    d_model=32,
    branches={
        "ssm": Mamba2Config(head_dim=16, d_state=8, chunk=16),
        "attn": AttentionConfig(num_heads=2, num_kv_heads=1, window=24),
        "moe": MoEConfig(num_experts=4, top_k=2, d_expert=32),
    },
    pattern="ssm moe attn ssm moe",
)


def build(cfg: ModelConfig, vocab_size: int, sharpness: float = 4.0) -> LanguageModel:
    """Random weights large enough that the model has opinions: near-uniform logits would hide a wrong score."""
    model = LanguageModel(cfg, vocab_size)
    model.initialise(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "conv" not in name:
                parameter.mul_(sharpness)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tokenizer(small_recipe: Path) -> Tokenizer:
    return Tokenizer.load(load([f"recipe={small_recipe}"]).recipe.data.tokenizer)


@pytest.fixture(scope="session")
def run_dir(small_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three real steps with its evaluation row; read only (results go elsewhere)."""
    from tests.small_run import train, words

    folder = tmp_path_factory.mktemp("evaluated") / "run"
    settings = [
        "train.steps=3",
        "train.schedule.warmup_tokens=0",
        "train.schedule.decay_tokens=256",
        "checkpoint.every=2",
    ]
    outcome = train(words(small_recipe, folder, *settings))
    assert outcome.code == 0, outcome.err
    return folder


class Request:
    """All that an adapter reads of lm-eval's Instance."""

    def __init__(self, *args: Any) -> None:
        self.args = args
