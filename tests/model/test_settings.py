"""What settings refuse that would go wrong later, whatever the kind."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from lmtrain.errors import UsageError
from lmtrain.model.attention_parts import HeadEmbedding
from lmtrain.model.block import Multipliers
from lmtrain.model.branch import BRANCHES as KINDS
from lmtrain.model.config import ModelConfig
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.mixers.linear_attention import FEATURES
from tests.model.row_checks import BRANCHES, D_MODEL

CONVOLVING = [kind for kind, cls in KINDS.items() if "conv_width" in cls.Config.__dataclass_fields__]


@pytest.mark.parametrize("kind", CONVOLVING)
@pytest.mark.parametrize("width", [1, 17])
def test_a_convolution_has_2_to_16_taps(kind: str, width: int) -> None:
    with pytest.raises(UsageError, match=rf"^{kind}: conv_width: expected 2 to 16, got {width}$"):
        KINDS[kind].Config(conv_width=width)


@pytest.mark.parametrize(
    ("kind", "settings", "says"),
    [
        ("attention", {"num_heads": 2, "rope_theta": 0.0}, "attention: rope_theta: expected more than 0, got 0"),
        ("attention", {"num_heads": 2, "qk_norm_eps": -1.0}, "attention: qk_norm_eps: expected more than 0, got -1"),
        ("mla", {"num_heads": 2, "rope_theta": -1.0}, "mla: rope_theta: expected more than 0, got -1"),
        ("gla", {"gate_normalizer": 0.0}, "gla: gate_normalizer: expected more than 0, got 0"),
        ("mamba2", {"norm_eps": 0.0}, "mamba2: norm_eps: expected more than 0, got 0"),
        (
            "moe",
            {"num_experts": 4, "top_k": 2, "d_expert": 8, "d_shared": 8},
            "moe: d_shared 8: it needs at least 1, and num_shared of at least 1",
        ),
        (
            "moe",
            {"num_experts": 4, "top_k": 2, "d_expert": 8, "aux_weight": -0.1},
            "moe: aux_weight: expected at least 0, got -0.1",
        ),
        (
            "moe",
            {"num_experts": 4, "top_k": 1, "d_expert": 8},
            "moe: top_k 1 with normalise_weights: the weight is always 1, so that the router learns nothing of what it "
            "chooses; set normalise_weights false, or top_k 2",
        ),
    ],
)
def test_values_that_would_compute_nonsense(kind: str, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        KINDS[kind].Config(**settings)
    assert str(caught.value) == says


NUMBERS = [
    (settings, field.name)
    for settings in {settings.kind: settings for settings in BRANCHES.values()}.values()
    for field in fields(settings)
    if isinstance(getattr(settings, field.name), float) or field.name in ("softcap", "scale")
]


@pytest.mark.parametrize(("settings", "name"), NUMBERS, ids=lambda value: getattr(value, "kind", value))
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_no_kind_takes_a_number_that_makes_nonsense(settings: Any, name: str, value: float) -> None:
    with pytest.raises(UsageError, match=rf"^{settings.kind}: {name}: expected .*, got {value:g}"):
        replace(settings, **{name: value})


def test_branches_side_by_side_cannot_hand_each_other_a_stream() -> None:
    cfg = ModelConfig(D_MODEL, BRANCHES, "rwkv7 + rwkv7")
    with pytest.raises(
        UsageError, match=r"^model\.pattern: branches side by side cannot hand each other the stream v_"
    ):
        LanguageModel(cfg, 16)
    LanguageModel(ModelConfig(D_MODEL, BRANCHES, "rwkv7 + mamba2 rwkv7 + mamba2"), 16)


def test_branches_side_by_side_share_one_residual() -> None:
    scales = {"mamba2": Multipliers(skip=0.5)}
    with pytest.raises(ValueError, match=r"^multipliers\.mamba2\.skip: branches side by side share one residual"):
        ModelConfig(D_MODEL, BRANCHES, "mamba2 + attention", multipliers=scales)
    ModelConfig(D_MODEL, BRANCHES, "mamba2 attention", multipliers=scales)


def test_bf16_does_not_round_away_what_tells_heads_apart() -> None:
    """Every product is rounded, but by another amount: on average the factor is 1 + e, not its bf16 neighbour."""
    heads = HeadEmbedding(3, 8, "mul").to(torch.bfloat16)
    with torch.no_grad():
        heads.weight.copy_(torch.tensor([0.02, 0.013, -0.01])[:, None].expand(3, 8))
    x = torch.randn(1, 8192, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    seen, wide = heads(x).double(), x.double()[:, :, None]
    found = (seen * wide).sum(dim=(0, 1, 3)) / wide.square().sum() - 1
    torch.testing.assert_close(found, heads.weight[:, 0].double(), rtol=0.1, atol=0)


def test_bf16_does_not_round_small_features_to_zero() -> None:
    x = torch.tensor([-7.5, -6.0], dtype=torch.bfloat16)
    torch.testing.assert_close(FEATURES["elu"](x), x.float().exp(), rtol=1e-3, atol=0)
