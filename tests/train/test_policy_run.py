"""A policy in a run: when it is asked, what holds in its mixtures, and what comes of its mistakes."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lmtrain.checkpoint.ranks import Ranks
from lmtrain.config.load import load
from lmtrain.data.loader import Loader
from lmtrain.data.order.schedule import Event, ScheduleLog
from lmtrain.data.policies.config import PolicyConfig, StageConfig
from lmtrain.data.policies.epochs import check_epochs
from lmtrain.data.policies.make import make
from lmtrain.data.policies.odm import Odm
from lmtrain.data.policies.policy import Run
from lmtrain.engine.protocol import StepInfo
from lmtrain.errors import EXIT_DATA, EXIT_DONE, EXIT_USAGE, UsageError
from lmtrain.train.mixture import Mixture, admit_to_end
from tests.small_run import STEPS, before_step, checkpoint, copy_until, rows, train, trajectory, words
from tests.train.test_mixture import KEEP, ODM, crashed_after, drop, events

LONG = ("train.steps=null", "train.tokens=2e9")
TWO_LONG = (
    r"data\.sources: the run needs 2,000,000,000 tokens, prose, lists have [\d,]+ together \([\d.]+ epochs, .* 16\)"
)
STAGES = "data.policy={kind: staged, stages: {late: {at: %s, weights: {prose: 1}}}}"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((*LONG, "data.policy.kind=odm_exp3"), TWO_LONG),
        ((*LONG, "data.policy.kind=ado", "data.policy.first=proportional"), TWO_LONG),
        ((*LONG, "data.policy.kind=ado", "data.sources.prose.weight=0"), r"2,000,000,000 tokens, lists have "),
        (LONG, r"data\.sources\.prose: the run needs 1,400,000,000 tokens"),
        ((STAGES % "decai",), r"stages\.late\.at: no phase of the learning rate is named decai; did you mean decay\?"),
        ((STAGES % "decai", "data.tokenizer=no/such.json"), r"is named decai; did you mean decay\?"),
    ],
)
def test_what_cannot_run_is_refused_by_the_dry_run_too(
    small_recipe: Path, tmp_path: Path, given: tuple[str, ...], message: str
) -> None:
    run = tmp_path / "run"
    told = [train(words(small_recipe, run, *given, *dry)) for dry in (("dry_run=true",), ())]
    missing = any("tokenizer" in word for word in given)
    assert [outcome.code for outcome in told] == [EXIT_USAGE, EXIT_DATA if missing else EXIT_USAGE]
    assert all(re.search(message, outcome.err) for outcome in told[: 1 if missing else 2]), told
    assert not run.exists()


def test_the_dry_run_warns_of_what_is_read_often(small_recipe: Path, tmp_path: Path) -> None:
    def warned(*given: str) -> list[str]:
        outcome = train(words(small_recipe, tmp_path / "run", *given, "dry_run=true", "json=true"))
        assert outcome.code == EXIT_DONE, outcome.err
        facts = json.loads(outcome.out)
        assert facts["missing"] == []
        return facts["warnings"]

    adaptive = warned("data.policy.kind=odm_exp3", "train.steps=2000")
    assert len(adaptive) == 1 and re.fullmatch(r"all sources are read 1?\d\.\d times: 512,000 tokens .*", adaptive[0])
    assert [warning.split()[0] for warning in warned("train.steps=1500")] == ["prose"]
    assert warned("data.policy.kind=odm_exp3") == []
    outcome = train(words(small_recipe, tmp_path / "run", "train.steps=1500", "dry_run=true"))
    assert "WARNING      prose is read " in outcome.out


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
    # in a replay, a policy's events of later would undo what a person asks in front of them
    monkeypatch.undo()
    again = crashed_after(run, tmp_path / "again", 4, 10)
    before_step(
        monkeypatch,
        {
            5: drop(again, "mix.yaml", "weights: {lists: 0.2}\nat: 2600"),
            6: drop(again, "mix.yaml", "weights: {lists: 0.2}"),
        },
    )
    outcome = train(words(small_recipe, again, ODM, KEEP))
    assert outcome.code == EXIT_DONE and trajectory(again)[:11] == trajectory(run)[:11]
    assert "at: 2,600 tokens is too early; the first that can still change are at 2,816" in outcome.out
    (asked,) = (event for event in events(again) if event.step == 6 and event.origin == "user")
    assert asked.first_block == 44 == max(event.first_block for event in made if event.step <= 10)


def test_a_mixture_made_later_holds_when_the_lead_is_shorter_than_before(small_recipe: Path, tmp_path: Path) -> None:
    """With two workers the policy proposed after step 6 for what begins with step 12; resumed, there are none."""
    log = ScheduleLog.fixed({"prose": 1, "lists": 1})
    log.append(Event(44, "policy", "odm_exp3", {"prose": 1, "lists": 3}, step=6))
    cfg = load([f"recipe={small_recipe}"]).recipe.data
    cfg = replace(cfg, policy=PolicyConfig("odm_exp3", every=1, min_change=0))
    loader = Loader(cfg, seed=0, batch_tokens=256, microbatch=1, dp_rank=0, dp_size=1, log=ScheduleLog(log.events))
    policy = make(cfg.policy, {"prose": 1.0, "lists": 1.0}, Run(loader.tokens_available, 4096))
    mixture = Mixture(loader, Ranks(None), STEPS, log, policy, tmp_path, 6, print)
    info = StepInfo(**dict.fromkeys((f.name for f in fields(StepInfo)), None))  # type: ignore[arg-type]
    for step in range(7, 13):
        mixture.observe(step, replace(info, source_loss=torch.tensor([[200.0 + step, 100.0], [300.0, 100.0]])))
        mixture.share()
    firsts = [event.first_block for event in log.events]
    assert firsts == [0, 44, 44, 44, 44, 44, 48, 52]
    assert loader.sampler.shares(44)["prose"] == pytest.approx(log.events[5].weights["prose"] / 4096)


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
