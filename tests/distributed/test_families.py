"""Every kind of branch trains the same on two ranks as on one, with shards of the parameters or of the rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lmtrain.model.branch import BRANCHES as KINDS
from lmtrain.parallel.config import MeshConfig
from tests.distributed.ranks import Ranks
from tests.distributed.test_equality import Case, train
from tests.model.row_checks import BRANCHES, config, needs_whole_rows

pytestmark = pytest.mark.distributed

STEPS = 5
FIRST = {settings.kind: name for name, settings in reversed(BRANCHES.items())}
"""A variant of every kind."""
MESHES = {"one": MeshConfig(), "dp_shard": MeshConfig(dp_shard=2), "sp": MeshConfig(sp=2)}


def train_each(mesh: str, variants: list[str]) -> list[Tensor]:
    cases = (Case(MESHES[mesh], steps=STEPS, model=config(name)) for name in variants)
    return [train(case) for case in cases]


@pytest.fixture(scope="module")
def told(ranks: Ranks) -> dict[tuple[str, str], Tensor]:
    """Losses and gradient norms of every kind on every mesh, many to a launch."""
    found = {}
    for mesh in MESHES:
        kinds = [kind for kind, name in FIRST.items() if mesh != "sp" or not needs_whole_rows(name)]
        of_rank_0 = ranks.run(1 if mesh == "one" else 2, train_each, mesh, [FIRST[kind] for kind in kinds])[0]
        found |= {(mesh, kind): result for kind, result in zip(kinds, of_rank_0, strict=True)}
    return found


@pytest.mark.parametrize("mesh", ["dp_shard", "sp"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_two_ranks_train_as_one(told: dict[tuple[str, str], Tensor], kind: str, mesh: str) -> None:
    if (mesh, kind) not in told:
        assert needs_whole_rows(FIRST[kind])
        return
    one, two = told["one", kind], told[mesh, kind]
    assert torch.isfinite(one).all() and (one[1:, 0] != one[0, 0]).all(), "it must have learned something"
    torch.testing.assert_close(two, one, rtol=1e-8, atol=0)
