"""SIGKILL at any moment costs no correctness: the resumed run is the uninterrupted one, bit for bit."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from lmtrain.errors import EXIT_DONE
from tests.distributed.kill_worker import POINTS, RANK_0_POINTS, Kill
from tests.small_run import (
    SAVE_EVERY,
    STEPS,
    Forked,
    Torchrun,
    assert_clean,
    assert_no_processes,
    checkpoint,
    exits,
    rows,
    saved,
    trajectory,
    words,
)

MESHES = {"sp": ("mesh.sp=2",), "dp_shard": ("mesh.dp_shard=2",)}
CALLS = 25_000
"""``anywhere`` is drawn from as many Python calls: a step makes 5,000, a save 20,000 in its own thread."""


@pytest.fixture(scope="module")
def straight(small_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By mesh, the folder of a run that nothing interrupted; read only."""
    folders = {}
    for mesh, overrides in MESHES.items():
        folder = tmp_path_factory.mktemp(mesh)
        ranks = Forked(2, words(small_recipe, folder / "run", *overrides), folder)
        assert ranks.wait() == [EXIT_DONE] * 2, ranks.output()
        folders[mesh] = folder / "run"
    return folders


def draw(seed: int, count: int) -> list[Kill]:
    """Kills of random ranks at random points, the earliest first: each finds the run where it can still happen."""
    random_ = random.Random(seed)
    kills = []
    for step in sorted(random_.randint(1, STEPS - SAVE_EVERY) for _ in range(count)):
        point = random_.choice(POINTS)
        rank = 0 if point in RANK_0_POINTS else random_.randrange(2)
        kills.append(Kill(point, rank, step, random_.randrange(1, CALLS + 1)))
    return kills


def run_through(kills: list[Kill], recipe: Path, run_dir: Path, *overrides: str) -> None:
    """Start the run once for every kill, resuming where the one before left it, and then let it finish."""
    argv = words(recipe, run_dir, *overrides, "resume=auto")
    for number, kill in enumerate(kills):
        print(f"kill {number}: {kill}")
        ranks = Forked(2, argv, run_dir.parent, kill)
        codes = ranks.wait()
        assert codes[kill.rank] == -signal.SIGKILL, f"{kill}: {codes}\n{ranks.output()}"
        # the other rank noticed, and ended by itself
        assert codes[1 - kill.rank] > 0, f"{kill}: {codes}\n{ranks.output()}"
        assert_no_processes(run_dir)
    ranks = Forked(2, argv, run_dir.parent)
    assert ranks.wait() == [EXIT_DONE] * 2, ranks.output()
    assert_clean(run_dir)
    assert exits(run_dir)[-1]["code"] == EXIT_DONE and saved(run_dir) == [12, 16]
    assert {row["attempt"] for row in rows(run_dir)} <= set(range(1, len(kills) + 2))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("mesh", "kills"),
    [
        ("sp", [Kill("backward", 1, 2), Kill("staging", 1, 4), Kill("before_rename", 0, 4), Kill("writing", 1, 8)]),
        ("sp", [Kill("after_rename", 0, 4), Kill("reading", 1, 6), Kill("before_update", 0, 10)]),
        ("dp_shard", [Kill("after_update", 0, 3), Kill("writing", 0, 8), Kill("anywhere", 1, 10, 3000)]),
    ],
    ids=["sp, before a checkpoint is there", "sp, after", "dp_shard"],
)
def test_killed_at_a_named_point(
    mesh: str, kills: list[Kill], small_recipe: Path, straight: dict[str, Path], tmp_path: Path
) -> None:
    run_through(kills, small_recipe, tmp_path / "run", *MESHES[mesh])
    assert trajectory(tmp_path / "run") == trajectory(straight[mesh])


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5])
def test_killed_at_random(seed: int, small_recipe: Path, straight: dict[str, Path], tmp_path: Path) -> None:
    mesh = "dp_shard" if seed % 3 == 0 else "sp"
    run_through(draw(seed, 4), small_recipe, tmp_path / "run", *MESHES[mesh])
    assert trajectory(tmp_path / "run") == trajectory(straight[mesh])


@pytest.mark.distributed
@pytest.mark.slow
def test_every_point_can_be_reached(small_recipe: Path, straight: dict[str, Path], tmp_path: Path) -> None:
    kills = [Kill(point, 0, 5, 100) for point in POINTS]
    run_through(kills, small_recipe, tmp_path / "run", *MESHES["sp"])
    assert trajectory(tmp_path / "run") == trajectory(straight["sp"])


@pytest.mark.distributed
def test_a_killed_rank_under_torchrun(small_recipe: Path, straight: dict[str, Path], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    argv = words(small_recipe, run_dir, *MESHES["sp"], "workers=1")
    agent = Torchrun(2, argv, tmp_path, kill=Kill("before_update", 1, 7))
    assert agent.wait() > 0 and "SIGKILL" in agent.output(), agent.output()
    assert_no_processes(run_dir)
    ranks = Forked(2, argv, tmp_path)
    assert ranks.wait() == [EXIT_DONE] * 2, ranks.output()
    assert_clean(run_dir)
    assert trajectory(run_dir) == trajectory(straight["sp"])


@pytest.mark.distributed
def test_a_killed_loader_process_ends_the_run_resumable(
    small_recipe: Path, straight: dict[str, Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    argv = words(small_recipe, run_dir, *MESHES["sp"], "workers=1")
    ranks = Forked(2, argv, tmp_path, Kill("loader", 1, 7))
    assert all(code > 0 for code in ranks.wait()), ranks.output()
    assert "DataLoader worker" in ranks.output()
    assert exits(run_dir)[-1]["code"] > 0 and checkpoint(run_dir, SAVE_EVERY).exists()
    ranks = Forked(2, argv, tmp_path)
    assert ranks.wait() == [EXIT_DONE] * 2, ranks.output()
    assert trajectory(run_dir) == trajectory(straight["sp"])
