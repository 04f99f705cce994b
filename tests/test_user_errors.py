"""What a user meets when something is wrong: one sentence, an exit code, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lmtrain.checkpoint.storage import LocalStorage
from lmtrain.config.load import load
from lmtrain.data.ingest.tokenizer_training import train_bpe
from lmtrain.engine.fsdp import FSDPEngine
from lmtrain.errors import EXIT_DATA, EXIT_DONE, EXIT_IO, EXIT_UNHEALTHY, EXIT_USAGE
from lmtrain.model.language_model import LanguageModel
from lmtrain.train.loop import Trainer
from tests.small_run import SAVE_EVERY, STEPS, Outcome, before_step, exits, rows, saved, train, words

PREPARE = r"python launch/prepare\.py out=\S+ tokenizer=\S+ sources\.\w+\.path=YOUR_TEXT"
ROOM = 200 << 10
"""Bytes left on a full disk: for rows of metrics, not for a checkpoint of half a megabyte."""


@dataclass(frozen=True)
class Mistake:
    """Words added to a good command line, and what must come of them. ``damage`` spoils a copy of the data first."""

    name: str
    overrides: str
    code: int
    message: str
    environment: dict[str, str] = field(default_factory=dict)
    damage: Callable[[Path], object] | None = None


def cut_bin(data: Path) -> None:
    os.truncate(data / "prose" / "train.bin", 1000)


def other_tokenizer(data: Path) -> None:
    train_bpe(["some other text altogether"] * 3, 280, data / "tokenizer.json")


WORLD_OF_3 = {"WORLD_SIZE": "3", "RANK": "0"}
MISTAKES = [
    Mistake("unknown key", "train.stepz=3", EXIT_USAGE, r"recipe error: command line: train\.stepz: .*mean steps\?"),
    Mistake("unknown section", "trian.lr=3", EXIT_USAGE, r"command line: trian\.lr: unknown key; did you mean train\?"),
    Mistake("wrong type", "train.steps=50k", EXIT_USAGE, r'train\.steps: expected int .*"50k" \(write 50000\)'),
    Mistake("no recipe of that name", "recipe=dem", EXIT_USAGE, r"no recipe is named dem in \S+; did you mean demo\?"),
    Mistake("no such recipe file", "recipe=no/such.yaml", EXIT_USAGE, r"recipe error: no/such\.yaml: no such file"),
    Mistake("no cluster of that name", "cluster=laptp", EXIT_USAGE, r"no cluster is named laptp .*mean laptop\?"),
    Mistake("no dashes", "--train.lr=3", EXIT_USAGE, r"expected key=value \(write train\.lr=3\)"),
    # how long
    Mistake("steps and tokens", "train.tokens=4096", EXIT_USAGE, r"steps and tokens are both set; keep one"),
    Mistake("neither", "train.steps=null", EXIT_USAGE, r"train: how long\? give one of steps .* and tokens"),
    Mistake("warm-up too long", "train.schedule.warmup_tokens=9999", EXIT_USAGE, r"warmup_tokens: .* 4,096 tokens"),
    Mistake("more than there is", "train.steps=99999", EXIT_USAGE, r"data\.sources\.\w+: the run needs .* epochs"),
    # what divides what
    Mistake("head_dim", "model.branches.ssm.head_dim=24", EXIT_USAGE, r"ssm: head_dim 24 does not divide .*64"),
    Mistake("heads", "model.branches.attn.num_heads=3", EXIT_USAGE, r"num_kv_heads 2 does not divide num_heads 3"),
    Mistake(
        "batch of rows", "train.batch_tokens=100", EXIT_USAGE, r"batch_tokens: 100 .*data\.seq_len 64.*nearest: 128"
    ),
    Mistake(
        "microbatch", "microbatch=3", EXIT_USAGE, r"microbatch: 3 rows do not divide the 4 rows .*possible: 1, 2, 4"
    ),
    Mistake(
        "length over sp",
        "mesh.sp=3",
        EXIT_USAGE,
        r"mesh\.sp=3: 3 ranks cannot cut data\.seq_len 64 .*mesh\.sp=2",
        WORLD_OF_3,
    ),
    Mistake(
        "a kind that cannot be cut",
        "model.branches.rnn.kind=lstm model.pattern=[ssm,rnn] mesh.sp=2",
        EXIT_USAGE,
        r"mesh\.sp=2: model\.branches\.rnn \(lstm\) .* whole rows; use mesh\.sp=1 mesh\.dp_shard=2",
        {"WORLD_SIZE": "2"},
    ),
    Mistake(
        "batch over ranks", "", EXIT_USAGE, r"batch_tokens: 256 do not divide over 3 data-parallel ranks", WORLD_OF_3
    ),
    Mistake(
        "too few processes", "mesh.sp=2 mesh.dp_shard=1", EXIT_USAGE, r"multiply to 2 .*torchrun --nproc-per-node 2"
    ),
    Mistake("too many", "mesh.dp_shard=2", EXIT_USAGE, r"mesh: the axes multiply to 2 .* but 3 processes", WORLD_OF_3),
    Mistake("sp in the world", "mesh.sp=2", EXIT_USAGE, r"sp 2 = 2 does not divide the world size 3", WORLD_OF_3),
    Mistake("not built yet", "mesh.tp=2 mesh.dp_shard=1", EXIT_USAGE, r"mesh\.tp=2: tensor.*", {"WORLD_SIZE": "2"}),
    Mistake("vocabulary", "model.vocab_size=100", EXIT_USAGE, r"model\.vocab_size: 100 is less than .* 300 tokens"),
    # the machine
    Mistake("kernels unknown", "kernels=cqu", EXIT_USAGE, r"kernels=cqu: no such backend; did you mean cpu\?"),
    Mistake("kernels missing", "kernels=causal_conv1d", EXIT_USAGE, r"backend causal_conv1d was asked for, but .*"),
    Mistake(
        "no GPU", "device=cuda", EXIT_USAGE, rf"device=cuda: torch {re.escape(torch.__version__)} sees no GPU; .*cpu"
    ),
    # data
    Mistake(
        "data missing",
        "data.sources.prose.path=no/such",
        EXIT_DATA,
        r"sources\.prose\.path: \S+ is missing.*" + PREPARE,
    ),
    Mistake("tokenizer missing", "data.tokenizer=no.json", EXIT_DATA, r"no\.json: no such tokenizer; .*" + PREPARE),
    Mistake(
        "both missing",
        "data.tokenizer=no.json data.sources.lists.path=nowhere",
        EXIT_DATA,
        r"no\.json: .*; .*sources\.lists",
    ),
    Mistake(
        "data cut short", "", EXIT_DATA, r"train\.bin: expected [\d,]+ bytes .* 1,000; restore the file", damage=cut_bin
    ),
    Mistake("another tokenizer", "", EXIT_DATA, r"was made with tokenizer .*" + PREPARE, damage=other_tokenizer),
    # where a run begins
    Mistake("two beginnings", "init_from=a branch_from=b", EXIT_USAGE, r"init_from and branch_from: give one"),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_mistakes_are_told_in_one_line_before_any_work(
    mistake: Mistake, small_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in mistake.environment.items():
        monkeypatch.setenv(name, value)
    recipe = spoilt_copy(small_recipe, tmp_path, mistake.damage) if mistake.damage else small_recipe
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: pytest.fail("work began"))
    run_dir = tmp_path / "run"
    outcome = train(words(recipe, run_dir, *mistake.overrides.split()))
    assert (outcome.code, outcome.out) == (mistake.code, ""), outcome.err
    assert_one_line(outcome, mistake.message)
    assert not run_dir.exists()


def spoilt_copy(recipe: Path, folder: Path, damage: Callable[[Path], object]) -> Path:
    """A copy of ``recipe`` that reads a damaged copy of its data."""
    copy = folder / "copy.yaml"
    copy.write_text(recipe.read_text(encoding="utf-8").replace(str(recipe.parent), str(folder)), encoding="utf-8")
    shutil.copytree(recipe.parent / "data", folder / "data")
    damage(folder / "data")
    return copy


def assert_one_line(outcome: Outcome, message: str) -> None:
    (line,) = outcome.err.splitlines()
    assert re.search(rf"^lmtrain: .*{message}", line), line


# --------------------------------------------------------------------------------------------------------- the disk


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system of its own; skips where that is not permitted."""
    mounted: list[Path] = []

    def make(options: str) -> Path:
        place = tmp_path / f"mount-{len(mounted)}"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield make
    for place in mounted:
        subprocess.run(["umount", place], check=True)


def fill(disk: Path) -> None:
    """Leave ``ROOM`` bytes on ``disk``."""
    status = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(status.f_bavail * status.f_frsize - ROOM))


def empty(disk: Path) -> None:
    (disk / "filler").unlink()


def test_a_disk_too_small_for_one_checkpoint_is_refused_at_the_start(
    small_recipe: Path, mount: Callable[[str], Path]
) -> None:
    run_dir = mount("size=512k") / "run"
    outcome = train(words(small_recipe, run_dir))
    assert outcome.code == EXIT_IO and "step" not in outcome.out
    assert_one_line(outcome, rf"no space for a checkpoint in {run_dir}: need [\d,]+ bytes .*, free [\d,]+")
    assert exits(run_dir)[-1]["code"] == EXIT_IO


def test_a_full_disk_in_the_middle_is_told_and_training_goes_on(
    small_recipe: Path, mount: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = mount("size=8m")
    before_step(monkeypatch, {3: lambda _: fill(disk), SAVE_EVERY + 1: join_then(lambda: empty(disk))})
    outcome = train(words(small_recipe, disk / "run"))
    assert outcome.code == EXIT_DONE, outcome.err
    assert "WARNING: no checkpoint of step 4: no space" in outcome.out and "training goes on" in outcome.out
    assert len(rows(disk / "run")) == STEPS and saved(disk / "run") == [12, 16]


def join_then(action: Callable[[], object]) -> Callable[[Trainer], None]:
    """``action`` after the save under way has ended."""

    def act(trainer: Trainer) -> None:
        trainer.checkpointer._join()
        action()

    return act


def test_a_disk_that_fills_up_while_a_checkpoint_is_written(
    small_recipe: Path, mount: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = mount("size=8m")
    monkeypatch.setattr(LocalStorage, "free", lambda self, path: 1 << 40)  # there was room when it was asked
    before_step(monkeypatch, {4: lambda _: fill(disk), 5: join_then(lambda: empty(disk))})
    outcome = train(words(small_recipe, disk / "run", "checkpoint.asynchronous=false"))
    assert outcome.code == EXIT_DONE, outcome.err
    assert "WARNING: no checkpoint of step 4: checkpoint: No space left on device" in outcome.out
    assert saved(disk / "run") == [12, 16] and not list((disk / "run" / "checkpoints").glob(".tmp*"))


def test_three_checkpoints_in_a_row_without_space_end_the_run(
    small_recipe: Path, mount: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = mount("size=8m")
    before_step(monkeypatch, {3: lambda _: fill(disk)})
    outcome = train(words(small_recipe, disk / "run"))
    assert outcome.code == EXIT_IO and "3 saves in a row failed; the last: no space" in outcome.err
    verdict = exits(disk / "run")[-1]
    assert verdict["code"] == EXIT_IO and "no space" in verdict["reason"] and 12 <= verdict["step"] < STEPS


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_run_without_its_last_checkpoint_is_not_done(
    small_recipe: Path, mount: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, asynchronous: str
) -> None:
    disk = mount("size=8m")
    before_step(monkeypatch, {STEPS: join_then(lambda: fill(disk))})
    outcome = train(words(small_recipe, disk / "run", f"checkpoint.asynchronous={asynchronous}"))
    assert outcome.code == EXIT_IO and exits(disk / "run")[-1]["code"] == EXIT_IO
    assert "no space for a checkpoint" in outcome.err
    empty(disk)
    monkeypatch.undo()
    again = train(words(small_recipe, disk / "run"))
    assert again.code == EXIT_DONE and saved(disk / "run")[-1] == STEPS


def test_a_folder_that_cannot_be_written(small_recipe: Path, mount: Callable[[str], Path]) -> None:
    disk = mount("size=8m")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    outcome = train(words(small_recipe, disk / "run"))
    assert outcome.code == EXIT_IO
    assert_one_line(outcome, rf"run\.dir {disk}/run: cannot be created: Read-only file system")


def test_a_run_whose_disk_became_read_only(small_recipe: Path, mount: Callable[[str], Path]) -> None:
    disk = mount("size=8m")
    assert train(words(small_recipe, disk / "run")).code == EXIT_DONE
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    outcome = train(words(small_recipe, disk / "run"))
    assert outcome.code == EXIT_IO
    assert_one_line(outcome, rf"{disk}/run/run\.lock cannot be opened by uid \d+: Read-only file system")


# --------------------------------------------------------------------------------------- what never stops training


def test_wandb_that_fails_is_told_and_training_goes_on(
    small_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise ConnectionError("no route to api.wandb.ai")

    broken = types.SimpleNamespace(Settings=lambda **_: None, init=refuse)
    monkeypatch.setitem(sys.modules, "wandb", broken)
    outcome = train(words(small_recipe, tmp_path / "run", "train.wandb.enabled=true"))
    assert outcome.code == EXIT_DONE and len(rows(tmp_path / "run")) == STEPS
    assert "wandb is off for this attempt: ConnectionError: no route to api.wandb.ai" in outcome.out


def test_wandb_offline_keeps_the_run_in_its_folder(
    small_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    outcome = train(words(small_recipe, tmp_path / "run", "train.wandb.enabled=true"))
    assert outcome.code == EXIT_DONE and "wandb is off" not in outcome.out
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


def test_an_unreachable_hub_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "launch/prepare.py", f"out={tmp_path / 'data'}", "tokenizer=train:300"]
    done = subprocess.run(
        [*command, "sources.web.path=nobody/such-dataset"],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == EXIT_DATA
    (line,) = done.stderr.splitlines()
    assert re.match(r"prepare: nobody/such-dataset: neither a local path nor .*; give a local path: sources", line), (
        line
    )


# ------------------------------------------------------------------------------------------------- bad steps


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make a gradient of these optimizer steps (from 1) not a number."""
    now = [0]
    original, backward = Trainer._step, FSDPEngine._backward

    def step(self: Trainer, data: Any, lr: float) -> Any:
        now[0] = data.step + 1
        return original(self, data, lr)

    def backward_poisoned(self: FSDPEngine, *args: Any) -> None:
        backward(self, *args)
        if now[0] in steps:
            next(p.grad for p in self.named.values() if p.grad is not None).mul_(float("nan"))

    monkeypatch.setattr(Trainer, "_step", step)
    monkeypatch.setattr(FSDPEngine, "_backward", backward_poisoned)


def copied_state(trainer: Trainer) -> dict[str, Any]:
    tensors, counters = trainer.engine.state_dict()
    return {name: tensor.full_tensor().clone() for name, tensor in tensors.items()} | dict(counters)  # type: ignore[attr-defined]


def test_a_step_that_is_not_a_number_is_skipped_whole(
    small_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: dict[int, dict[str, Any]] = {}
    poison(monkeypatch, {5})
    before_step(monkeypatch, {n: lambda trainer, n=n: states.update({n: copied_state(trainer)}) for n in (5, 6, 7)})
    outcome = train(words(small_recipe, tmp_path / "run"))
    assert outcome.code == EXIT_DONE, outcome.err
    assert same(states[5], states[6]) and not same(states[6], states[7])
    row = rows(tmp_path / "run")[4]
    assert row["grad_norm"] is None and row["nonfinite"] and row["skipped"] == "gradient norm is nan"
    assert [r["step"] for r in rows(tmp_path / "run") if "skipped" in r] == [5]
    assert "SKIPPED: gradient norm is nan" in outcome.out


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key] for key in a
    )


def test_steps_that_stay_not_a_number_end_the_run_as_unhealthy(
    small_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {5, 6, 7, 9})
    outcome = train(words(small_recipe, tmp_path / "run"))
    assert outcome.code == EXIT_UNHEALTHY
    assert_one_line(outcome, r"steps 5, 6, 7 were skipped \(gradient norm is nan\); last accepted loss: .* at step 4")
    verdict = exits(tmp_path / "run")[-1]
    assert (verdict["code"], verdict["step"]) == (EXIT_UNHEALTHY, 7)


# --------------------------------------------------------------------------------------------------- the dry run


def test_a_dry_run_counts_what_the_built_model_has(small_recipe: Path, tmp_path: Path) -> None:
    argv = words(small_recipe, tmp_path / "run", "dry_run=true", "json=true")
    outcome = train(argv)
    assert outcome.code == EXIT_DONE, outcome.err
    facts = json.loads(outcome.out)
    promised = "num_params num_active_params flops_per_token peak_bytes mesh tokens_per_step steps"
    assert set(promised.split()) <= facts.keys() and facts["missing"] == []
    recipe = load(argv).recipe
    with torch.device("meta"):
        model = LanguageModel(recipe.model, facts["vocab_size"])
    assert facts["num_params"] == facts["num_active_params"] == sum(p.numel() for p in model.parameters())
    assert (facts["steps"], facts["tokens_per_step"]) == (STEPS, recipe.train.batch_tokens)
    assert not (tmp_path / "run").exists() and not dist.is_initialized()
    real = train(words(small_recipe, tmp_path / "run", "train.steps=4", "train.schedule.decay_tokens=0"))
    assert f"{facts['num_params']:,} parameters" in real.out


def test_a_dry_run_needs_no_data_and_says_what_is_missing(small_recipe: Path, tmp_path: Path) -> None:
    argv = words(small_recipe, tmp_path / "run", "dry_run=true", "data.sources.prose.path=no/such")
    outcome = train(argv)
    assert outcome.code == EXIT_DONE and outcome.err == ""
    assert (
        re.search(r"missing +data\.sources\.prose\.path: no/such", outcome.out) and "sources.lists" not in outcome.out
    )
    facts = json.loads(train([*argv, "json=true", "data.tokenizer=no.json"]).out)
    assert len(facts["missing"]) == 2 and facts["num_params"] is None and facts["steps"] == STEPS
    assert not (tmp_path / "run").exists()


CUT = "mesh: {dp_replicate: 2, dp_shard: 2, sp: 2}\n"


def test_a_dry_run_in_one_process_is_for_the_ranks_of_the_mesh(small_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.yaml").write_text(CUT, encoding="utf-8")
    argv = words(small_recipe, tmp_path / "run", f"cluster={tmp_path / 'cut.yaml'}")
    facts = json.loads(train([*argv, "dry_run=true", "json=true"]).out)
    assert facts["mesh"] == {"pp": 1, "dp_replicate": 2, "dp_shard": 2, "sp": 2, "tp": 1, "ep": 1}
    assert_one_line(train(argv), r"multiply to 8 .*, but 1 process runs")
    refused = train([*argv, "dry_run=true", "model.branches.rnn.kind=lstm", "model.pattern=[ssm,rnn]"])
    assert (refused.code, refused.out) == (EXIT_USAGE, "")
    assert_one_line(refused, r"mesh\.sp=2: model\.branches\.rnn \(lstm\) .*; use mesh\.sp=1 mesh\.dp_shard=4")
    assert not (tmp_path / "run").exists()
