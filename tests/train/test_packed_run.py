"""A run that reads packed blocks goes on with the plan it began with, or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lmtrain.data.blocks.pack_plan import write_plan
from lmtrain.data.store.store import Store
from lmtrain.errors import EXIT_DATA, EXIT_DONE, EXIT_STOPPED
from tests.small_run import before_step, column, train, words
from tests.train.test_mixture import drop


def test_another_pack_plan_than_the_checkpoints_is_refused(
    small_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(small_recipe.parent / "data", data)
    for name in ("prose", "lists"):
        write_plan(Store(data / name / "train"), 64)
    packed = [f"data.sources.{name}.path={data / name}" for name in ("prose", "lists")]
    packed += ["data.packing=best_fit", f"data.tokenizer={data}/tokenizer.json"]
    before_step(monkeypatch, {6: drop(run, "stop")})
    assert train(words(small_recipe, run, *packed)).code == EXIT_STOPPED

    def swap() -> None:
        for old, new in (("prose", "kept"), ("lists", "prose"), ("kept", "lists")):
            (data / old).rename(data / new)

    swap()
    outcome = train(words(small_recipe, run, *packed))
    assert outcome.code == EXIT_DATA and outcome.err.count(
        "data.sources.prose: its pack plan for blocks of 64 tokens is not"
    )
    assert len(column(run, "step")) == 6
    branch = words(small_recipe, tmp_path / "branch", *packed, f"branch_from={run}")
    assert train(branch).code == EXIT_DONE, "a branch may have other data"
    swap()
    assert train(words(small_recipe, run, *packed)).code == EXIT_DONE
