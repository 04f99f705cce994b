"""A policy in a run: when it is asked, what holds in its mixtures, and what comes of its mistakes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lmtrain.config.load import load
from lmtrain.data.loader import Loader
from lmtrain.data.order.schedule import Event, ScheduleLog
from lmtrain.data.policies.config import PolicyConfig, StageConfig
from lmtrain.data.policies.epochs import check_epochs
from lmtrain.data.policies.make import make
from lmtrain.data.policies.odm import Odm
from lmtrain.data.policies.policy import Run
from lmtrain.errors import EXIT_DONE, UsageError
from lmtrain.train.mixture import admit_to_end
from tests.small_run import STEPS, before_step, checkpoint, copy_until, rows, train, trajectory, words
from tests.train.test_mixture import KEEP, ODM, drop, events


def test_a_policy_is_not_asked_again_for_what_was_recorded(small_recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(words(small_recipe, run, ODM, KEEP)).code == EXIT_DONE
    made = events(run)
    assert [event.step for event in made] == [0, *range(2, STEPS, 2)], made
    assert {event.origin for event in made[1:]} == {"policy"} and len({str(event.weights) for event in made}) > 4
    for step in (4, 8):
        again = copy_until(run, tmp_path / f"from-{step}", step)
        assert train(words(small_recipe, again, ODM, KEEP)).code == EXIT_DONE
        assert events(again) == made and trajectory(again) == trajectory(run)
    state = [json.loads((checkpoint(folder, 16) / "schedule.json").read_text()) for folder in (run, again)]
    assert state[0] == state[1] and state[0]["policy"]["kind"] == "odm_exp3"


def test_a_policy_keeps_to_the_mixture_in_force(
    small_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    before_step(monkeypatch, {3: drop(run, "mix.yaml", "weights: {lists: 0}\nat: 2560")})
    assert train(words(small_recipe, run, ODM, KEEP)).code == EXIT_DONE
    made = [event for event in events(run) if event.origin == "policy"]
    assert {set(event.weights) == {"prose"} for event in made if event.first_block > 40} == {True}
    assert {set(event.weights) == {"prose", "lists"} for event in made if event.first_block < 40} == {True}
    # in a replay, a policy's events of later would undo what a person asks now
    monkeypatch.undo()
    again = copy_until(run, tmp_path / "again", 4)
    before_step(monkeypatch, {5: drop(again, "mix.yaml", "weights: {lists: 0.2}")})
    outcome = train(words(small_recipe, again, ODM, KEEP))
    assert outcome.code == EXIT_DONE and trajectory(again) == trajectory(run)
    assert "later mixtures of the policy" in outcome.out and (again / "control" / "mix.rejected-5.yaml").exists()


def test_a_policy_that_fails_does_not_end_a_run(
    small_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, observe = tmp_path / "run", Odm.observe

    def broken(self: Odm, step: int, *seen: Any) -> None:
        observe(self, step, *seen)
        if step == 6:
            raise KeyError("lists")

    monkeypatch.setattr(Odm, "observe", broken)
    outcome = train(words(small_recipe, run, ODM, KEEP))
    assert outcome.code == EXIT_DONE, outcome.err
    told = "WARNING: policy odm_exp3 failed after step 6: KeyError: 'lists' (test_policy_run.py, "
    assert outcome.out.count(told) == 1
    assert [event.step for event in events(run)] == [0, 2, 4]
    errors = {row["step"]: row["policy_error"] for row in rows(run) if "policy_error" in row}
    assert list(errors) == [6] and "proposes nothing more until the run is resumed" in errors[6]
    then, last = (json.loads((checkpoint(run, at) / "schedule.json").read_text())["policy"] for at in (4, 16))
    assert last == then, "what it knew at the checkpoint before"
    monkeypatch.undo()
    again = copy_until(run, tmp_path / "again", 8)
    assert train(words(small_recipe, again, ODM, KEEP, "schedule.fork=true")).code == EXIT_DONE
    assert [event.step for event in events(again)] == [0, 2, 4, 10, 12, 14], "resumed, it is asked again"


@pytest.mark.parametrize(
    ("first", "step", "weights", "epochs"),
    [
        # 64 blocks, the stage from block 48 on: prose alone from block 10 on is read 38 times more, lists alone 16
        (10, 4, {"prose": 1}, (5 + 38, 5 + 16)),
        (10, 4, {"lists": 1}, (5, 5 + 38 + 16)),
        (50, 4, {"prose": 1}, (24 + 14, 24 + 2)),
        (60, 14, {"prose": 1}, (24 + 4, 24 + 12)),
    ],
)
def test_epochs_count_with_the_stages_to_come(
    small_recipe: Path, first: int, step: int, weights: dict[str, int], epochs: tuple[int, int]
) -> None:
    cfg = replace(load([f"recipe={small_recipe}"]).recipe.data, max_epochs=1e9)
    log = ScheduleLog.fixed({"prose": 1, "lists": 1})
    if step > 12:  # the stage was proposed and is in the log
        log.append(Event(48, "policy", "staged", {"lists": 1}, step=11))
    loader = Loader(cfg, seed=0, batch_tokens=256, microbatch=1, dp_rank=0, dp_size=1, log=log)
    loader.sampler.windows = dict.fromkeys(loader.sampler.windows, 1)  # sources of one block: epochs are blocks
    stage = StageConfig(at=48 * 64, weights={"lists": 1.0})
    run = Run(loader.tokens_available, 4096, max_epochs=1e9)
    policy = make(PolicyConfig("staged", stages={"late": stage}), {"prose": 1.0, "lists": 1.0}, run)
    event = Event(first, "user", "", weights, step=step)
    without = (24, 24 + 16)
    grown = {name: n for name, n, was in zip(("prose", "lists"), epochs, without, strict=True) if n > was}
    assert admit_to_end(loader, event, policy, step, 16) == [
        warning for name, n in grown.items() for warning in check_epochs({name: n * 64}, {name: 64}, 1e9)
    ]
    for name, n in grown.items():
        loader.cfg = replace(cfg, max_epochs=n - 0.5)
        with pytest.raises(UsageError, match=rf"data.sources.{name}: .* \({n}.0 epochs"):
            admit_to_end(loader, event, policy, step, 16)
