"""Stopping, resuming, branching and refusing, by the real loop: what a run folder holds afterwards."""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lmtrain.checkpoint.lock import holder
from lmtrain.checkpoint.retention import pinned_by
from lmtrain.checkpoint.storage import LocalFile
from lmtrain.errors import EXIT_DATA, EXIT_DONE, EXIT_IO, EXIT_STOPPED, EXIT_USAGE
from lmtrain.train.loop import Trainer
from tests.distributed.kill_worker import Kill
from tests.small_run import (
    DEADLINE,
    SAVE_EVERY,
    STEPS,
    Forked,
    Outcome,
    Torchrun,
    assert_clean,
    assert_no_processes,
    before_step,
    checkpoint,
    column,
    contents,
    copy_until,
    damage,
    exits,
    rows,
    saved,
    train,
    trajectory,
    until,
    words,
)

KEEP_ALL = "checkpoint.keep_last=99"
SP = ("mesh.sp=2", KEEP_ALL)


@pytest.fixture(scope="module")
def straight(small_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted, in one process; read only."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    assert train(words(small_recipe, run_dir, KEEP_ALL)).code == EXIT_DONE
    return run_dir


@pytest.fixture(scope="module")
def straight_sp(small_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on two ranks that share every row."""
    folder = tmp_path_factory.mktemp("straight-sp")
    ranks = Forked(2, words(small_recipe, folder / "run", *SP), folder)
    assert ranks.wait() == [EXIT_DONE, EXIT_DONE], ranks.output()
    return folder / "run"


def stopped(recipe: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch, step: int, *overrides: str) -> None:
    """Make a run that was stopped by a person after ``step`` optimizer steps."""
    with monkeypatch.context() as patch:
        before_step(patch, {step: request("stop")})
        assert train(words(recipe, run_dir, *overrides)).code == EXIT_STOPPED


def request(name: str) -> Callable[[Trainer], None]:
    """What a person does: drop a file into control/."""

    def act(trainer: Trainer) -> None:
        assert trainer.recorder is not None
        (trainer.recorder.folder.control / name).touch()

    return act


def plain(text: str) -> str:
    """A boxed banner as one line."""
    return " ".join(re.sub(r"[|+]|-{3,}", " ", text).split())


def told(outcome: Outcome, message: str) -> bool:
    """Whether the one line of error, the last of all, says so."""
    lines = [line for line in outcome.err.splitlines() if line.startswith("lmtrain: ")]
    return len(lines) == 1 and "Traceback" not in outcome.err and re.search(message, lines[0]) is not None


# ------------------------------------------------------------------------------------------------- stop and save


@pytest.mark.parametrize("how", ["control/stop", "SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_stop_saves_and_ends_with_75_and_the_rest_is_the_same_run(
    small_recipe: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    run_dir = tmp_path / "run"

    def stop(trainer: Trainer) -> None:
        if how == "control/stop":
            request("stop")(trainer)
        else:
            os.kill(os.getpid(), getattr(signal, how))

    with monkeypatch.context() as patch:
        before_step(patch, {6: stop})
        outcome = train(words(small_recipe, run_dir))
    assert outcome.code == EXIT_STOPPED
    assert [(row["code"], row["step"], row["reason"]) for row in exits(run_dir)] == [(EXIT_STOPPED, 6, how)]
    assert saved(run_dir) == [4, 6] and not (run_dir / "control" / "stop").exists()
    outcome = train(words(small_recipe, run_dir, "resume=true"))
    assert outcome.code == EXIT_DONE and "step-00000006 (step 6)" in plain(outcome.out)
    assert trajectory(run_dir) == trajectory(straight)
    assert [row["attempt"] for row in rows(run_dir)] == [1] * 6 + [2] * 10
    assert [row["code"] for row in exits(run_dir)] == [EXIT_STOPPED, EXIT_DONE]
    assert_clean(run_dir)


def test_a_run_is_stopped_and_resumed_several_times(
    small_recipe: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 7, 15):
        stopped(small_recipe, tmp_path / "run", monkeypatch, step)
    assert train(words(small_recipe, tmp_path / "run")).code == EXIT_DONE
    assert trajectory(tmp_path / "run") == trajectory(straight)


def test_control_save_makes_a_checkpoint_and_goes_on(
    small_recipe: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    before_step(monkeypatch, {6: request("save")})
    assert train(words(small_recipe, run_dir, KEEP_ALL)).code == EXIT_DONE
    assert saved(run_dir) == [4, 6, 8, 12, 16] and not (run_dir / "control" / "save").exists()
    assert trajectory(run_dir) == trajectory(straight)


def test_a_finished_run_started_again_changes_nothing(small_recipe: Path, straight: Path) -> None:
    before = contents(straight, leave_out=["run.lock"])
    outcome = train(words(small_recipe, straight, KEEP_ALL))
    assert outcome.code == EXIT_DONE and outcome.out == ""
    assert re.search(r"run is finished: 16 steps; its last checkpoint is \S+step-00000016", outcome.err)
    assert contents(straight, leave_out=["run.lock"]) == before


def test_a_finished_run_whose_last_checkpoint_is_damaged_is_made_whole(
    small_recipe: Path, straight: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    damage(checkpoint(run_dir, 16))
    outcome = train(words(small_recipe, run_dir, KEEP_ALL))
    assert outcome.code == EXIT_DONE and "checkpoint step 16 does not verify" in outcome.err
    assert "step-00000012 (step 12)" in plain(outcome.out)
    assert trajectory(run_dir) == trajectory(straight)
    assert [path.name for path in (run_dir / "checkpoints" / "quarantine").iterdir()] == ["step-00000016-0"]
    assert train(words(small_recipe, run_dir, KEEP_ALL)).out == ""


def test_training_goes_on_while_a_checkpoint_is_written(
    small_recipe: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    disk = threading.Event()
    writes: list[str] = []
    seen: list[tuple[bool, int, list[int]]] = []
    original = LocalFile.write

    def write(self: LocalFile, data: Any) -> None:
        if threading.current_thread().name == f"save-{SAVE_EVERY}":
            writes.append("began")
            if not disk.wait(DEADLINE):
                raise TimeoutError("training did not go on")
        original(self, data)

    def look(_: Trainer) -> None:
        until(lambda: bool(writes), "the save begins to write")
        seen.append((disk.is_set(), len(rows(run_dir)), saved(run_dir)))
        disk.set()

    monkeypatch.setattr(LocalFile, "write", write)
    before_step(monkeypatch, {SAVE_EVERY + 3: look})
    assert train(words(small_recipe, run_dir, KEEP_ALL)).code == EXIT_DONE
    assert seen == [(False, SAVE_EVERY + 2, [])]
    assert saved(run_dir) == [4, 8, 12, 16] and trajectory(run_dir) == trajectory(straight)


# ----------------------------------------------------------------------------------------------- where a run begins


def test_resume_true_needs_a_checkpoint(small_recipe: Path, tmp_path: Path) -> None:
    outcome = train(words(small_recipe, tmp_path / "run", "resume=true"))
    assert outcome.code == EXIT_DATA and told(outcome, r"resume=true: there is no checkpoint in \S+/run/checkpoints")
    assert exits(tmp_path / "run")[-1]["code"] == EXIT_DATA


def test_resume_of_a_path_that_does_not_verify(small_recipe: Path, straight: Path, tmp_path: Path) -> None:
    other = copy_until(straight, tmp_path / "other", 8)
    damage(checkpoint(other, 8))
    path = checkpoint(other, 8)
    outcome = train(words(small_recipe, tmp_path / "run", f"resume={path}"))
    assert outcome.code == EXIT_DATA and told(outcome, rf"resume={path}: none of the 1 checkpoints .* verifies")
    assert "checkpoint step 8 does not verify: " in outcome.err and "xxh3_128" in outcome.err


def test_resume_of_a_path_goes_on_from_there(small_recipe: Path, straight: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    outcome = train(words(small_recipe, run_dir, KEEP_ALL, f"resume={checkpoint(straight, 8)}"))
    assert outcome.code == EXIT_DONE and "(step 8)" in plain(outcome.out)
    assert trajectory(run_dir) == trajectory(straight)[8:] and saved(run_dir) == [12, 16]


@pytest.mark.parametrize("resume", ["false", "PATH"])
def test_a_start_before_checkpoints_of_its_own_folder_is_refused(
    small_recipe: Path, straight: Path, tmp_path: Path, resume: str
) -> None:
    run_dir = copy_until(straight, tmp_path / "run", 12)
    word = "false" if resume == "false" else str(checkpoint(run_dir, 8))
    outcome = train(words(small_recipe, run_dir, KEEP_ALL, f"resume={word}"))
    assert outcome.code == EXIT_USAGE and saved(run_dir) == [4, 8, 12]
    assert told(outcome, rf"resume={word}: {run_dir} holds checkpoints up to step 12, this start would begin at [08];")


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    small_recipe: Path, straight: Path, tmp_path: Path
) -> None:
    run_dir = copy_until(straight, tmp_path / "run", 12)
    damage(checkpoint(run_dir, 12))
    outcome = train(words(small_recipe, run_dir, KEEP_ALL))
    assert outcome.code == EXIT_DONE
    assert "checkpoint step 12 does not verify" in outcome.err and "step-00000008 (step 8)" in plain(outcome.out)
    assert trajectory(run_dir) == trajectory(straight)


@pytest.mark.parametrize("resume", ["auto", "true"])
def test_only_damaged_checkpoints_are_not_stepped_over(
    small_recipe: Path, straight: Path, tmp_path: Path, resume: str
) -> None:
    run_dir = copy_until(straight, tmp_path / "run", 8)
    for step in (4, 8):
        damage(checkpoint(run_dir, step))
    outcome = train(words(small_recipe, run_dir, f"resume={resume}"))
    assert outcome.code == EXIT_DATA
    assert told(outcome, rf"resume={resume}: none of the 2 checkpoints in \S+ verifies .*not starting at step 0")
    assert outcome.err.count("does not verify") == 2 and saved(run_dir) == [4, 8]


def test_another_recipe_in_the_folder_is_refused(small_recipe: Path, straight: Path) -> None:
    before = contents(straight, leave_out=["run.lock"])
    outcome = train(words(small_recipe, straight, "train.lr=1e-3", "model.branches.mlp.d_ff=96"))
    assert outcome.code == EXIT_USAGE
    assert told(
        outcome, r"recipe\.yaml: .*model\.branches\.mlp\.d_ff: 64 -> 96; train\.lr: 0\.005 -> 0\.001 .*run\.dir"
    )
    assert contents(straight, leave_out=["run.lock"]) == before


def test_what_does_not_change_the_training_may_change(small_recipe: Path, straight: Path, tmp_path: Path) -> None:
    run_dir = copy_until(straight, tmp_path / "run", 8)
    outcome = train(words(small_recipe, run_dir, "checkpoint.every=5", "eval.every=8", "train.log_every=4"))
    assert outcome.code == EXIT_DONE, outcome.err
    assert trajectory(run_dir) == trajectory(straight)


def test_other_kernels_at_a_resume_are_said(
    small_recipe: Path, straight: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    run_dir = copy_until(straight, tmp_path / "run", 8)
    monkeypatch.setattr("lmtrain.pretrain.command.chosen", lambda *_: {"causal_conv1d": "faster"})
    outcome = train(words(small_recipe, run_dir))
    said = r"kernels were {.*'causal_conv1d': 'reference'.*}, now {'causal_conv1d': 'faster'}: bits may differ"
    assert outcome.code == EXIT_DONE and re.search(said, plain(outcome.out)), outcome.out


def captured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, dict[str, torch.Tensor], dict[str, int]]]:
    """Where the next run stands when its training begins: step, a copy of its tensors, its counters."""
    begun: list[tuple[int, dict[str, torch.Tensor], dict[str, int]]] = []
    original = Trainer.train

    def look(self: Trainer) -> int:
        tensors, counters = self.engine.state_dict()
        whole = {name: tensor.full_tensor().clone() for name, tensor in tensors.items()}  # type: ignore[attr-defined]
        begun.append((self.progress.step, whole, counters))
        return original(self)

    monkeypatch.setattr(Trainer, "train", look)
    return begun


def test_init_from_takes_weights_only(
    small_recipe: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = captured(monkeypatch)
    source = copy_until(straight, tmp_path / "source", 8)
    assert train(words(small_recipe, source, KEEP_ALL)).code == EXIT_DONE
    overrides = (f"init_from={checkpoint(source, 8)}", "train.lr=1e-3")
    assert train(words(small_recipe, tmp_path / "run", *overrides)).code == EXIT_DONE
    (step, there, counters), (fresh_step, here, fresh_counters) = begun
    assert (step, counters["optimizer_steps"]) == (8, 8)
    assert (fresh_step, fresh_counters["optimizer_steps"]) == (0, 0)
    for name, tensor in here.items():
        assert torch.equal(tensor, there[name] if name.startswith("model.") else torch.zeros_like(tensor)), name
    assert column(tmp_path / "run", "step") == list(range(1, STEPS + 1))
    assert column(tmp_path / "run", "token_hash") == column(straight, "token_hash")
    assert column(tmp_path / "run", "loss")[0] < column(straight, "loss")[0] - 0.5
    assert not pinned_by(checkpoint(source, 8))
    # started again, the run goes on from its own checkpoints
    assert train(words(small_recipe, tmp_path / "run", *overrides)).out == ""


def test_branch_from_continues_everything_and_keeps_its_origin(
    small_recipe: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    stopped(small_recipe, source, monkeypatch, 6)
    outcome = train(words(small_recipe, tmp_path / "run", f"branch_from={source}"))
    assert outcome.code == EXIT_DONE and "step-00000006, with all its state (step 6)" in plain(outcome.out)
    assert trajectory(tmp_path / "run") == trajectory(straight)[6:]
    assert pinned_by(checkpoint(source, 6)) == [str(tmp_path / "run")]
    assert train(words(small_recipe, source, "checkpoint.keep_last=1")).code == EXIT_DONE
    assert saved(source) == [6, 16] and trajectory(source) == trajectory(straight)


def test_a_branch_may_have_another_schedule(small_recipe: Path, straight: Path, tmp_path: Path) -> None:
    overrides = (f"branch_from={checkpoint(straight, 8)}", "train.steps=10", "train.schedule.decay_tokens=512")
    outcome = train(words(small_recipe, tmp_path / "run", *overrides))
    assert outcome.code == EXIT_DONE, outcome.err
    assert column(tmp_path / "run", "step") == [9, 10]
    assert column(tmp_path / "run", "loss")[0] == column(straight, "loss")[8]
    assert column(tmp_path / "run", "lr") != column(straight, "lr")[8:10]


def test_a_branch_that_would_train_nothing_is_refused(small_recipe: Path, straight: Path, tmp_path: Path) -> None:
    overrides = (f"branch_from={checkpoint(straight, 8)}", "train.steps=8", "train.schedule.decay_tokens=512")
    outcome = train(words(small_recipe, tmp_path / "run", *overrides))
    assert outcome.code == EXIT_USAGE and told(outcome, r"step-00000008 has taken 8 steps, and this run ends after 8:")


# ------------------------------------------------------------------------------------------------------- two starts


@pytest.mark.distributed
def test_a_second_run_in_the_folder_is_refused_while_one_is_alive(
    small_recipe: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    second: list[tuple[list[int], str]] = []

    def start_another(_: Trainer) -> None:
        ranks = Forked(1, words(small_recipe, run_dir), tmp_path)
        second.append((ranks.wait(), ranks.output()))

    before_step(monkeypatch, {6: start_another})
    assert train(words(small_recipe, run_dir)).code == EXIT_DONE
    ((codes, output),) = second
    held = holder(run_dir)
    assert held is not None and held["pid"] == os.getpid()
    assert codes == [EXIT_IO], output
    (line,) = output.splitlines()
    assert line.startswith(
        f"lmtrain: {run_dir} is in use by another run: host {held['host']}, pid {held['pid']}, since"
    )
    assert trajectory(run_dir) == trajectory(straight) and [row["code"] for row in exits(run_dir)] == [EXIT_DONE]


# ---------------------------------------------------------------------------------------------------- several ranks


def drift(run: Path, reference: Path) -> float:
    """Largest relative difference of two runs' losses, step by step."""
    pairs = zip(column(run, "loss"), column(reference, "loss"), strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)


@pytest.mark.distributed
@pytest.mark.parametrize("then", [1, 2])
def test_a_run_goes_on_at_another_world_size(
    small_recipe: Path, straight: Path, straight_sp: Path, tmp_path: Path, then: int
) -> None:
    before, same_mesh_later = (straight_sp, straight) if then == 1 else (straight, straight_sp)
    run_dir = copy_until(before, tmp_path / "run", 8)
    if then == 1:
        assert train(words(small_recipe, run_dir)).code == EXIT_DONE
    else:
        ranks = Forked(2, words(small_recipe, run_dir, *SP), tmp_path)
        assert ranks.wait() == [EXIT_DONE] * 2, ranks.output()
    control = drift(same_mesh_later, before)
    assert drift(run_dir, before) <= max(4 * control, 1e-6)
    assert column(run_dir, "token_hash") == column(before, "token_hash") == column(same_mesh_later, "token_hash")
    assert column(run_dir, "loss")[:8] == column(before, "loss")[:8]


@pytest.mark.distributed
def test_the_order_of_data_does_not_depend_on_ranks_or_workers(
    small_recipe: Path, straight: Path, straight_sp: Path, tmp_path: Path
) -> None:
    assert train(words(small_recipe, tmp_path / "one", "workers=1")).code == EXIT_DONE
    assert trajectory(tmp_path / "one") == trajectory(straight)
    ranks = Forked(2, words(small_recipe, tmp_path / "two", "mesh.dp_shard=2", "workers=1"), tmp_path)
    assert ranks.wait() == [EXIT_DONE] * 2, ranks.output()
    for run_dir in (straight_sp, tmp_path / "two"):
        assert column(run_dir, "token_hash") == column(straight, "token_hash")
        assert column(run_dir, "tokens") == column(straight, "tokens")


# ------------------------------------------------------------------------------------------------- the real torchrun


@pytest.mark.distributed
def test_sigterm_to_torchrun_stops_with_a_checkpoint(small_recipe: Path, straight_sp: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    agent = Torchrun(2, words(small_recipe, run_dir, *SP), tmp_path, kill=Kill("agent_term", 0, 6))
    assert agent.wait() != EXIT_DONE  # torchrun's own code says nothing
    assert_no_processes(run_dir)
    (verdict,) = exits(run_dir)
    assert verdict["code"] == EXIT_STOPPED and verdict["reason"] == "SIGTERM", agent.output()
    assert saved(run_dir)[-1] == verdict["step"] >= 6
    ranks = Forked(2, words(small_recipe, run_dir, *SP, "resume=true"), tmp_path)
    assert ranks.wait() == [EXIT_DONE] * 2, ranks.output()
    assert trajectory(run_dir) == trajectory(straight_sp)


@pytest.mark.distributed
def test_workers_do_not_outlive_a_killed_torchrun(small_recipe: Path, straight_sp: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    agent = Torchrun(2, words(small_recipe, run_dir, *SP, "workers=1"), tmp_path, kill=Kill("agent", 1, 6))
    assert agent.wait() == -signal.SIGKILL, agent.output()
    assert_no_processes(run_dir)
    ranks = Forked(2, words(small_recipe, run_dir, *SP), tmp_path)
    assert ranks.wait() == [EXIT_DONE] * 2, ranks.output()
    assert_clean(run_dir)
    assert trajectory(run_dir) == trajectory(straight_sp)


@pytest.mark.distributed
def test_torchrun_tells_an_error_once(small_recipe: Path, straight: Path, tmp_path: Path) -> None:
    agent = Torchrun(2, words(small_recipe, straight, "mesh.sp=2", "train.lr=1e-3"), tmp_path)
    assert agent.wait() != EXIT_DONE
    output = agent.output()
    assert output.count("this folder holds a run of another recipe") == output.count("lmtrain: ") == 1, output
    assert re.search(r"exitcode +: 64", output), output


@pytest.mark.distributed
def test_ranks_tell_an_error_before_any_work_once(small_recipe: Path, tmp_path: Path) -> None:
    ranks = Forked(2, words(small_recipe, tmp_path / "run", "train.stepz=3"), tmp_path)
    assert ranks.wait() == [EXIT_USAGE] * 2
    assert ranks.output().count("lmtrain: ") == len(ranks.output().splitlines()) == 1
