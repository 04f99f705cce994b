"""Initial values: the constants of the papers, and the same whatever else stands in the model."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lmtrain.model.branch import ParamInfo
from lmtrain.model.config import ModelConfig
from lmtrain.model.ffn.mlp import MLPConfig
from lmtrain.model.ffn.moe_settings import MoEConfig
from lmtrain.model.init import draw, normal
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.mixers.attention_settings import AttentionConfig
from lmtrain.model.mixers.mamba import MambaConfig
from lmtrain.model.mixers.mamba2 import Mamba2Config

D_MODEL, VOCAB = 64, 512
CFG = ModelConfig(
    D_MODEL,
    {
        "ssm": Mamba2Config(d_state=32, head_dim=2, num_groups=2),
        "attn": AttentionConfig(num_heads=8, num_kv_heads=4, qk_norm=True),
        "mlp": MLPConfig(d_ff=256),
        "moe": MoEConfig(num_experts=16, top_k=2, d_expert=32, num_shared=1),
    },
    "ssm attn mlp moe",
)
DEPTH = 1 / math.sqrt(4)  # outputs shrink with the number of branches
INNER = 2 * D_MODEL

# Mamba-2: reference/mixers.md 1.3; attention and feed-forward: 4.1
NORMAL = {
    "embed.weight": 0.02,
    "head.weight": 0.02,
    **{f"blocks.1.branch.{name}.weight": 0.02 for name in "qkv"},
    "blocks.1.branch.o.weight": 0.02 * DEPTH,
    "blocks.2.branch.up.weight": 0.02,
    "blocks.2.branch.gate.weight": 0.02,
    "blocks.2.branch.down.weight": 0.02 * DEPTH,
    "blocks.3.branch.router.weight": 0.02,
    "blocks.3.branch.experts.up": 0.02,
    "blocks.3.branch.experts.gate": 0.02,
    "blocks.3.branch.experts.down": 0.02 * DEPTH,
    "blocks.3.branch.shared.up.weight": 0.02,
    "blocks.3.branch.shared.gate.weight": 0.02,
    "blocks.3.branch.shared.down.weight": 0.02 * DEPTH,
}
UNIFORM = {
    **{f"blocks.0.branch.{name}.weight": 1 / math.sqrt(D_MODEL) for name in ("z", "x", "B", "C", "dt")},
    "blocks.0.branch.o.weight": DEPTH / math.sqrt(INNER),
    **{f"blocks.0.branch.{name}": 0.5 for name in ("conv_x", "conv_x_bias", "conv_bc", "conv_bc_bias")},
}
ONES = {
    "final_norm.weight",
    "blocks.0.branch.skip.D",
    "blocks.0.branch.norm",
    "blocks.1.branch.q_norm.weight",
    "blocks.1.branch.k_norm.weight",
    *(f"blocks.{index}.norm.weight" for index in range(4)),
}
DECAY = {"blocks.0.branch.decay.A_log", "blocks.0.branch.decay.dt_bias"}


def initial(cfg: ModelConfig = CFG, seed: int = 0) -> dict[str, Tensor]:
    model = LanguageModel(cfg, VOCAB)
    model.initialise(seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_every_parameter_is_checked() -> None:
    assert NORMAL.keys() | UNIFORM.keys() | ONES | DECAY == initial().keys()


@pytest.mark.parametrize("name", NORMAL)
def test_normal(name: str) -> None:
    values, std = initial()[name].double().flatten(), NORMAL[name]
    error = 5 / math.sqrt(len(values))  # five standard errors
    assert abs(values.mean()) < std * error and abs(values.std() / std - 1) < error
    assert values.abs().max() > 2.5 * std  # not uniform


@pytest.mark.parametrize("name", UNIFORM)
def test_uniform(name: str) -> None:
    values, bound = initial()[name].double().flatten(), UNIFORM[name]
    error = 5 / math.sqrt(len(values))
    assert 0.9 * bound < values.abs().max() <= bound
    assert abs(values.mean()) < bound * error and abs(values.std() * math.sqrt(3) / bound - 1) < error


@pytest.mark.parametrize("name", sorted(ONES))
def test_ones(name: str) -> None:
    assert (initial()[name] == 1).all()


def test_decays() -> None:
    """A ~ U(1, 16); the step softplus(dt_bias) is log-uniform in [1e-3, 1e-1]."""
    values = initial()
    rate = values["blocks.0.branch.decay.A_log"].double().exp()
    log_step = F.softplus(values["blocks.0.branch.decay.dt_bias"].double()).log10()
    for uniform, low, high in ((rate, 1, 16), (log_step, -3, -1)):
        width, error = high - low, 5 / math.sqrt(len(uniform))
        assert uniform.min() >= low - 1e-4 and uniform.max() <= high + 1e-4
        assert abs(uniform.mean() - (low + high) / 2) < width * error / math.sqrt(12)
        assert abs(uniform.std() * math.sqrt(12) / width - 1) < error


def test_values_depend_on_name_and_seed_alone() -> None:
    """Not on the order of drawing, nor on what else is in the model; outputs only through the number of branches."""
    longer = ModelConfig(D_MODEL, {"more": MLPConfig(d_ff=8), **CFG.branches}, f"{CFG.pattern} more")
    one, other = initial(), initial(longer)
    outputs = {name for name in one if name.endswith(("o.weight", "down.weight", "down"))}
    for name, values in one.items():
        expected = values * math.sqrt(4 / 5) if name in outputs else values
        torch.testing.assert_close(other[name], expected, rtol=0, atol=1e-7 if name in outputs else 0)
    again = initial(seed=1)
    assert all(torch.equal(again[name], one[name]) == (name in ONES) for name in one)


@pytest.mark.parametrize("settings", [Mamba2Config(head_dim=16, mimetic_length=9), MambaConfig(mimetic_length=9)])
@pytest.mark.parametrize("pattern", ["2 * ssm", "ssm + ssm"])
def test_what_shares_a_value_shares_it_in_one_branch_of_one_seed(settings: Any, pattern: str) -> None:
    """B and C of a mixer that starts as linear attention; another layer and another seed have others."""
    cfg = ModelConfig(D_MODEL, {"ssm": settings}, pattern)
    drawn = [initial(cfg, seed) for seed in (0, 1, 0)]
    first, other, again = ({name: one[name] for name in one if name.endswith(".B.weight")} for one in drawn)
    assert len(first) == 2
    assert all(torch.equal(one[name], one[name.replace(".B.", ".C.")]) for one in drawn for name in first)
    assert all(torch.equal(first[name], again[name]) for name in first)
    values = [*first.values(), *other.values()]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(values, 2))


def test_a_drawn_value_is_fp32_and_of_its_name() -> None:
    info = ParamInfo("matrix", normal(1.0))
    one = draw("a", info, (3, 2), seed=0)
    assert one.dtype == torch.float32 and torch.equal(one, draw("a", info, (3, 2), seed=0))
    assert not torch.equal(one, draw("b", info, (3, 2), seed=0))
