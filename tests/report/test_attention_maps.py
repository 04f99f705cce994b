"""The pictures are the mixers' own matrices: times the values they give the op's output, and never cross a border."""

from __future__ import annotations

import pytest
import torch

from lmtrain.model.config import ModelConfig
from lmtrain.model.ffn.mlp import MLPConfig
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.mixers.attention_settings import AttentionConfig
from lmtrain.model.mixers.mamba2 import Mamba2Config
from lmtrain.report.attention_maps import BranchMap, branch_maps, chosen

LENGTHS = (13, 8, 16)
ATTENTION, MAMBA, WINDOW = 2, (0, 3), 4


@pytest.fixture(scope="module", params=[torch.float32, torch.float64])
def maps(request: pytest.FixtureRequest) -> dict[int, BranchMap]:
    branches = {
        "ssm": Mamba2Config(d_state=8, head_dim=16, num_groups=2, chunk=8),
        "mlp": MLPConfig(d_ff=64),
        "attn": AttentionConfig(num_heads=4, num_kv_heads=2),
        "local": AttentionConfig(num_heads=2, window=5, rope=False),
    }
    cfg = ModelConfig(d_model=32, branches=branches, pattern="ssm mlp attn ssm local", init_std=0.5)
    model = LanguageModel(cfg, 64)
    model.initialise(seed=1)
    model.to(request.param)
    tokens = torch.randint(64, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    return branch_maps(model, tokens, _ids())


def _ids() -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))


def _allowed() -> torch.Tensor:
    ids = _ids()
    return (ids[:, None] == ids[None, :]) & torch.ones(len(ids), len(ids)).tril().bool()


def test_every_mixer_has_its_map(maps: dict[int, BranchMap]) -> None:
    assert {place: (found.op, len(found.matrix)) for place, found in maps.items()} == {
        0: ("ssd", 4),
        2: ("attention", 4),
        3: ("ssd", 4),
        4: ("attention", 2),
    }


@pytest.mark.parametrize("place", [0, 2, 3, 4])
def test_matrix_times_values_is_the_output(maps: dict[int, BranchMap], place: int) -> None:
    found = maps[place]
    exact = found.values.dtype == torch.float64
    assert found.outputs.abs().max() > 1e-3
    torch.testing.assert_close(
        found.matrix @ found.values, found.outputs, atol=1e-12 if exact else 1e-5, rtol=1e-12 if exact else 1e-5
    )


@pytest.mark.parametrize("place", MAMBA)
def test_step_sizes_belong_to_the_values(maps: dict[int, BranchMap], place: int) -> None:
    found = maps[place]
    assert found.step_sizes is not None and (found.step_sizes > 0).all()
    unscaled = found.values / found.step_sizes[..., None]
    torch.testing.assert_close(found.weights @ unscaled, found.outputs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("place", [0, 2, 3, 4])
def test_nothing_crosses_a_border_or_looks_ahead(maps: dict[int, BranchMap], place: int) -> None:
    found, allowed = maps[place], _allowed()
    assert (found.weights[:, ~allowed] == 0).all()
    assert (found.weights[:, torch.eye(len(allowed)).bool()] != 0).all()


@pytest.mark.parametrize("place", [ATTENTION, WINDOW])
def test_softmax_weights_sum_to_one(maps: dict[int, BranchMap], place: int) -> None:
    weights = maps[place].weights
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones_like(weights[..., 0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(maps[place].shares, weights, atol=1e-5, rtol=0)


def test_the_window_is_seen(maps: dict[int, BranchMap]) -> None:
    beyond = torch.ones(sum(LENGTHS), sum(LENGTHS)).tril(-5).bool()
    assert (maps[WINDOW].weights[:, beyond] == 0).all()
    assert (maps[ATTENTION].weights[:, beyond & _allowed()] > 0).any()


def test_shares_sum_to_one(maps: dict[int, BranchMap]) -> None:
    for found in maps.values():
        torch.testing.assert_close(found.shares.sum(dim=-1), torch.ones_like(found.shares[..., 0]))


def test_one_branch_of_each_op_is_shown(maps: dict[int, BranchMap]) -> None:
    assert [found.place for found in chosen(maps)] == [3, 4]
