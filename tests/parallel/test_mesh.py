"""Meshes: what resolves, and the sentence for what does not."""

from __future__ import annotations

from typing import Any

import pytest

from lmtrain.errors import UsageError
from lmtrain.parallel.config import MeshConfig
from lmtrain.parallel.mesh import fewest, resolve


@pytest.mark.parametrize(
    ("axes", "world", "expected"),
    [
        ({}, 1, {"dp_shard": 1}),
        ({}, 8, {"dp_shard": 8}),
        ({"sp": 2}, 8, {"dp_shard": 4, "sp": 2}),
        ({"sp": -1, "dp_shard": 2}, 8, {"dp_shard": 2, "sp": 4}),
        ({"dp_replicate": -1, "dp_shard": 4}, 8, {"dp_replicate": 2, "dp_shard": 4}),
        ({"dp_replicate": 2, "dp_shard": 2, "sp": 2}, 8, {"dp_replicate": 2, "dp_shard": 2, "sp": 2}),
        ({"sp": 2, "ep": 4}, 8, {"dp_shard": 4, "sp": 2, "ep": 4}),
        ({"pp": 2, "tp": 2}, 8, {"pp": 2, "dp_shard": 2, "tp": 2}),
    ],
)
def test_resolves(axes: dict[str, int], world: int, expected: dict[str, int]) -> None:
    assert resolve(MeshConfig(**axes), world) == MeshConfig(**expected)


@pytest.mark.parametrize(("axes", "least"), [({}, 1), ({"sp": 2, "ep": 2}, 2), ({"dp_replicate": 2, "dp_shard": 4}, 8)])
def test_the_fewest_processes_of_a_mesh(axes: dict[str, int], least: int) -> None:
    assert fewest(MeshConfig(**axes)) == least
    assert resolve(MeshConfig(**axes), least)


@pytest.mark.parametrize(
    ("axes", "world", "says"),
    [
        ({"sp": 0}, 2, "mesh.sp: expected a positive size or -1 (fill), got 0"),
        ({"tp": -2}, 2, "mesh.tp: expected a positive size or -1 (fill), got -2"),
        ({"ep": -1}, 2, "mesh.ep: -1 (fill) is for the axes of the world; ep re-cuts dp_shard x sp, give its size"),
        ({"sp": -1}, 2, "mesh: only one axis can be -1 (fill), got dp_shard and sp"),
        ({"sp": 4}, 6, "mesh: sp 4 = 4 does not divide the world size 6; start 8 processes"),
        ({"sp": 4}, 1, "mesh: sp 4 = 4 does not divide the world size 1; start 4 processes"),
        (
            {"dp_shard": 2, "sp": 2},
            1,
            "mesh: the axes multiply to 4 (dp_shard 2 x sp 2), but 1 process runs; start 4 "
            "(torchrun --nproc-per-node 4), or set mesh.dp_shard=-1 (fill)",
        ),
        (
            {"dp_shard": 1},
            2,
            "mesh: the axes multiply to 1 (1), but 2 processes run; start 1 "
            "(torchrun --nproc-per-node 1), or set mesh.dp_shard=-1 (fill)",
        ),
        ({"sp": 2, "ep": 3}, 4, "mesh.ep: 3 does not divide dp_shard x sp = 4; nearest: 2"),
        ({"dp_replicate": 2, "ep": 4}, 4, "mesh.ep: 4 does not divide dp_shard x sp = 2; nearest: 2"),
    ],
)
def test_refuses(axes: dict[str, Any], world: int, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(MeshConfig(**axes), world)
    assert str(caught.value) == says
