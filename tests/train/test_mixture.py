"""A run whose mixture changes while it trains: by a person, by a policy; stopped, resumed, forked, branched."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lmtrain.checkpoint.ranks import Ranks
from lmtrain.config.load import load
from lmtrain.data.loader import Loader
from lmtrain.data.order.mix_request import MixRequest
from lmtrain.data.order.schedule import Event, ScheduleLog, event_row
from lmtrain.data.policies.config import PolicyConfig
from lmtrain.data.policies.epochs import effective_tokens
from lmtrain.data.policies.make import make
from lmtrain.data.policies.policy import Run
from lmtrain.data.sources import open_source
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.engine.protocol import StepInfo
from lmtrain.errors import EXIT_DATA, EXIT_DONE, EXIT_INTERNAL, EXIT_STOPPED, EXIT_USAGE, DataError
from lmtrain.pretrain import schedule_command
from lmtrain.pretrain.log import settle_log
from lmtrain.train.loop import Trainer
from lmtrain.train.metrics import read_metrics
from lmtrain.train.mixture import Mixture
from lmtrain.train.request_file import RequestFile
from tests.small_run import STEPS, before_step, checkpoint, column, copy_until, rows, train, trajectory, words

KEEP = "checkpoint.keep_last=99"
ODM = "data.policy={kind: odm_exp3, every: 2, min_change: 0}"


def drop(run: Path, name: str, text: str = "") -> Callable[[Trainer], object]:
    return lambda trainer: (run / "control" / name).write_text(text, encoding="utf-8")


def events(run: Path) -> tuple[Event, ...]:
    return ScheduleLog.read(run / "schedule.jsonl").events


def schedule(*argv: object) -> int:
    return schedule_command.main([str(word) for word in argv], "the help")


@pytest.fixture(scope="module")
def asked(small_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with four requests: one refused, then weights, a skip, and a new source. Read only."""
    run = tmp_path_factory.mktemp("asked") / "run"
    actions = {
        2: drop(run, "mix.yaml", "weights: {prosa: 0.5}"),
        4: drop(run, "mix.yaml", "weights: {prose: 0.25}\nreason: fewer\n"),
        5: drop(run, "mix.yaml", "skip: 1000\nat: 2500"),
        8: drop(run, "mix.yaml", f"add: {{more: {small_recipe.parent}/data/lists}}\nweights: {{more: 0.5}}"),
    }
    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, actions)
        outcome = train(words(small_recipe, run, KEEP))
    assert outcome.code == EXIT_DONE, outcome.err
    assert "mix.yaml is refused: weights.prosa: no source of this run; did you mean prose?" in outcome.out
    told = [line.split(": ") for line in outcome.out.splitlines() if line.startswith("sources after step ")]
    steps = [int(where.split()[-1]) for where, _ in told]
    assert steps == sorted(set(steps)) and steps[-1] == STEPS, "with the evaluation there, and some checkpoints before"
    assert [part.split()[0] for part in told[-1][1].split("; ")] == ["prose", "lists", "more"]
    return run


def test_requests_are_answered_and_training_goes_on(asked: Path) -> None:
    control = {path.name: path.read_text(encoding="utf-8") for path in (asked / "control").iterdir()}
    assert set(control) == {
        "mix.rejected-2.yaml", "mix.rejected-2.txt", "mix.applied-4.yaml", "mix.applied-5.yaml", "mix.applied-8.yaml",
    }  # fmt: skip
    assert "did you mean prose?" in control["mix.rejected-2.txt"] and "prosa" in control["mix.rejected-2.yaml"]
    recipe, fewer, skip, more = events(asked)
    # 4 blocks a step; told in the step after, in force in the one after that
    assert [(event.first_block, event.step) for event in (recipe, fewer, skip, more)] == [
        (0, 0),
        (20, 4),
        (40, 5),
        (36, 8),
    ]
    assert fewer.reason.startswith("fewer [control/mix.yaml ") and (skip.skip, skip.weights) == (16, {})
    assert fewer.weights == {"prose": 16384, "lists": 49152}
    assert more.weights == {"prose": 8192, "lists": 24576, "more": 32768} and set(more.sources) == {"more"}
    last = rows(asked)[-1]
    assert sum(last[f"source_tokens.{name}"] for name in ("prose", "lists", "more")) == STEPS * 256 + 16 * 64
    assert last["source_tokens.more"] / 64 == (64 - 36 + 16) / 2
    assert last["source_epochs.more"] == pytest.approx(
        last["source_epochs.lists"] * 44 / (last["source_tokens.lists"] / 32)
    )
    assert last["source_effective_tokens.lists"] == effective_tokens(
        last["source_tokens.lists"] / last["source_epochs.lists"], last["source_tokens.lists"]
    )
    assert any(row.get("source_loss.more", 0) > 0 for row in rows(asked))


def test_a_new_source_is_scored_like_the_others(asked: Path) -> None:
    last = [row for row in read_metrics(asked / "metrics.jsonl") if row["kind"] == "eval"][-1]
    assert last["step"] == STEPS and last["heldout_bpb.more"] == last["heldout_bpb.lists"] != last["heldout_bpb.prose"]
    assert min(last["heldout_bpb.prose"], last["heldout_bpb.lists"]) < last["heldout_bpb"]


def test_a_replay_of_the_log_reads_the_same(asked: Path, small_recipe: Path, tmp_path: Path) -> None:
    shutil.copytree(
        asked, tmp_path / "run", ignore=lambda *_: ["checkpoints", "metrics.jsonl", "exits.jsonl", "control"]
    )
    assert train(words(small_recipe, tmp_path / "run", "workers=1")).code == EXIT_DONE
    assert trajectory(tmp_path / "run") == trajectory(asked)


def test_a_resumed_run_keeps_events_and_a_forked_one_forgets_them(
    asked: Path, small_recipe: Path, tmp_path: Path
) -> None:
    kept, forked = (copy_until(asked, tmp_path / name, 4) for name in ("kept", "forked"))
    assert train(words(small_recipe, kept, KEEP)).code == EXIT_DONE
    assert events(kept) == events(asked) and trajectory(kept) == trajectory(asked)
    before = (forked / "schedule.jsonl").read_bytes()
    assert train(words(small_recipe, forked, KEEP, "schedule.fork=true")).code == EXIT_DONE
    assert (forked / "schedule-forked-1.jsonl").read_bytes() == before
    assert events(forked) == events(asked)[:2]  # made before the checkpoint of step 4 was written
    assert column(forked, "token_hash")[:9] == column(asked, "token_hash")[:9]
    assert column(forked, "token_hash")[9:] != column(asked, "token_hash")[9:]


def test_a_run_of_before_a_key_was_there_goes_on(asked: Path, small_recipe: Path, tmp_path: Path) -> None:
    run = copy_until(asked, tmp_path / "run", 12)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    for key in ("packing", "policy", "seq_lens"):
        del recipe["data"][key]
    del recipe["train"]["batch_ramp"]
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    outcome = train(words(small_recipe, run, "data.seq_len=32"))
    assert outcome.code == EXIT_USAGE and "another recipe: data.seq_len: 64 -> 32 (old -> new)" in outcome.err
    assert train(words(small_recipe, run)).code == EXIT_DONE
    assert trajectory(run) == trajectory(asked)


def test_another_log_than_the_checkpoints_is_refused(asked: Path, small_recipe: Path, tmp_path: Path) -> None:
    run = copy_until(asked, tmp_path / "run", 12)
    lines = (run / "schedule.jsonl").read_bytes().splitlines(keepends=True)
    for damage, place in [
        (lines[:2] + lines[3:], "schedule.jsonl:3: not the log of the checkpoint of step 12, "),
        (lines[:3], "schedule.jsonl:4: "),
        ([lines[0], lines[1].replace(b"49152", b"49153"), *lines[2:]], "schedule.jsonl:2: "),
    ]:
        (run / "schedule.jsonl").write_bytes(b"".join(damage))
        outcome = train(words(small_recipe, run))
        assert outcome.code == EXIT_DATA and place in outcome.err and "put the run's own file back" in outcome.err
        assert len(column(run, "step")) == STEPS  # nothing was trained


def test_a_checkpoint_of_before_events_had_all_fields(tmp_path: Path) -> None:
    weights = {"prose": 0.7, "lists": 0.3}
    (first,) = ScheduleLog.fixed(weights).events
    old = {"first_block": 0, "weights": first.weights, "origin": first.origin, "reason": first.reason}
    where: dict[str, Any] = {"first_block": 40, "step": 10, "fork": False}
    assert settle_log(tmp_path, weights, {"events": [old]}, **where).events == (first,)
    with pytest.raises(DataError, match=r"schedule.jsonl:1: not the log of the checkpoint of step 10"):
        settle_log(tmp_path, weights, {"events": [old | {"reason": "another"}]}, **where)


def test_a_crash_after_the_line_and_before_the_new_name_asks_once(
    small_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, settle = tmp_path / "run", Mixture._settle
    before_step(monkeypatch, {6: drop(run, "mix.yaml", "skip: 640")})
    monkeypatch.setattr(Mixture, "_settle", lambda *_: 1 / 0)
    assert train(words(small_recipe, run)).code == EXIT_INTERNAL
    assert (run / "control" / "mix.yaml").exists() and len(events(run)) == 2
    monkeypatch.undo()
    assert Mixture._settle is settle
    assert train(words(small_recipe, run)).code == EXIT_DONE
    assert len(events(run)) == 2
    (answer,) = (run / "control").iterdir()  # of the step after the newest checkpoint that the crash let be written
    assert answer.name.startswith("mix.applied-")


def crashed_after(source: Path, target: Path, saved: int, recorded: int) -> Path:
    """A copy of a run folder as if it crashed with ``recorded`` steps on record and a checkpoint of ``saved``."""
    copy_until(source, target, saved)
    for name in ("metrics.jsonl", "schedule.jsonl"):
        lines = (target / name).read_text(encoding="utf-8").splitlines(keepends=True)
        kept = "".join(line for line in lines if json.loads(line)["step"] <= recorded)
        (target / name).write_text(kept, encoding="utf-8")
    return target


def test_a_request_that_waits_changes_no_recorded_step(
    asked: Path, small_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = crashed_after(asked, tmp_path / "run", 4, 12)
    before_step(monkeypatch, {6: drop(run, "stop"), 7: drop(run, "mix.yaml", "weights: {prose: 1, lists: 0, more: 0}")})
    assert train(words(small_recipe, run, KEEP)).code == EXIT_STOPPED  # amid what was recorded
    assert train(words(small_recipe, run, KEEP)).code == EXIT_DONE
    *before, event = events(run)
    assert tuple(before) == events(asked) and (event.step, event.first_block) == (7, 48)
    assert trajectory(run)[:12] == trajectory(asked)[:12]
    assert column(run, "token_hash")[12:] != column(asked, "token_hash")[12:]


def test_no_request_ends_a_run(small_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    control = run / "control"

    def broken(*_: object, **__: object) -> None:
        raise RecursionError("too deep")

    def again(trainer: Trainer) -> None:
        (control / "mix.applied-8.yaml").rename(control / "mix.yaml")

    def stuck(trainer: Trainer) -> None:
        drop(run, "mix.yaml", "skip: 192")(trainer)
        monkeypatch.setattr(RequestFile, "settle", denied)

    def denied(*_: object) -> None:
        raise PermissionError("no")

    actions: dict[int, Callable[[Trainer], object]] = {
        2: lambda _: os.mkfifo(control / "mix.yaml"),
        3: lambda trainer: (
            drop(run, "mix.yaml", "skip: 1")(trainer),
            monkeypatch.setattr(MixRequest, "event", broken),
        ),
        4: lambda trainer: monkeypatch.setattr(MixRequest, "event", event),
        8: drop(run, "mix.yaml", "skip: 64"),
        10: again,
        12: stuck,
    }
    event = MixRequest.event
    before_step(monkeypatch, actions)
    outcome = train(words(small_recipe, run))
    assert outcome.code == EXIT_DONE, outcome.err
    assert "not a plain file" in outcome.out and "RecursionError: too deep" in outcome.out
    assert [made.skip for made in events(run)] == [0, 1, 1, 3], (
        "the same file may ask again, and one that stays may not"
    )
    assert outcome.out.count("cannot be renamed") == 1
    assert {path.name for path in control.iterdir()} == {
        "mix.rejected-2.yaml", "mix.rejected-2.txt", "mix.rejected-3.yaml", "mix.rejected-3.txt",
        "mix.applied-10.yaml", "mix.yaml",
    }  # fmt: skip


@pytest.mark.parametrize("there", [True, False])
def test_a_source_comes_on_all_ranks_or_on_none(small_recipe: Path, tmp_path: Path, there: bool) -> None:
    data = small_recipe.parent / "data"
    cfg = load([f"recipe={small_recipe}"]).recipe.data
    log = ScheduleLog.fixed({"prose": 0.7, "lists": 0.3})
    sizes: dict[str, Any] = {"seed": 0, "batch_tokens": 256, "microbatch": 1, "dp_size": 2}
    loaders = [Loader(cfg, log=ScheduleLog(log.events), dp_rank=rank, **sizes) for rank in (0, 1)]
    if not there:
        loaders[1].admit = lambda *_: open_source("more", tmp_path / "gone", Tokenizer.load(cfg.tokenizer))  # type: ignore
    notes: list[str] = []
    barrier, results = threading.Barrier(2, timeout=60), [None, None]
    policy = make(PolicyConfig(), {"prose": 1.0, "lists": 1.0}, Run(loaders[0].tokens_available, 4096))
    ranks = [InThreads(rank, barrier, results) for rank in (0, 1)]
    (tmp_path / "mix.yaml").write_text(f"add: {{more: {data}/lists}}", encoding="utf-8")
    mixtures = [
        Mixture(loaders[rank], ranks[rank], 16, log if rank == 0 else None, policy, tmp_path, 0, notes.append)
        for rank in (0, 1)
    ]
    info = StepInfo(**dict.fromkeys((f.name for f in fields(StepInfo)), None) | {"source_loss": torch.zeros(2, 2)})
    for mixture in mixtures:
        mixture.observe(3, info)
    assert mixtures[0].grew and len(log.events) == 1, "in the log when all have it"
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(Mixture.share, mixtures))
    assert not mixtures[0].grew and [("more" in loader.source_names) for loader in loaders] == [there] * 2
    assert len(log.events) == 1 + there
    assert (tmp_path / ("mix.applied-3.yaml" if there else "mix.rejected-3.yaml")).exists()
    assert there or "is refused: on rank 1: " in notes[0]


class InThreads(Ranks):
    """Two ranks that are threads of this process."""

    def __init__(self, rank: int, barrier: threading.Barrier, results: list[Any]) -> None:
        self.rank, self.size, self.group = rank, 2, None
        self._barrier, self._results = barrier, results

    def together(self, local: Callable[[], Any]) -> list[Any]:
        self._results[self.rank] = local()
        self._barrier.wait()
        everyone = list(self._results)
        self._barrier.wait()
        return everyone


def test_a_fork_keeps_what_the_run_began_with(tmp_path: Path) -> None:
    weights, other = {"prose": 0.7, "lists": 0.3}, {"prose": 0.9, "lists": 0.1}
    where: dict[str, Any] = {"first_block": 40, "step": 10, "fork": True}
    (tmp_path / "branch").mkdir()
    log = settle_log(tmp_path, weights, {}, **where)
    log.append(Event(8, "policy", "x", {"prose": 1}, step=2))
    assert settle_log(tmp_path, weights, {}, **where).events == log.events[:1], "no checkpoint: back to the recipe's"
    assert (tmp_path / "schedule-forked-1.jsonl").exists()
    saved = {"events": [event_row(event) for event in log.events]}
    taken = settle_log(tmp_path / "branch", other, saved, **where)
    assert [event.origin for event in taken.events] == ["recipe", "policy", "recipe"]
    assert settle_log(tmp_path / "branch", other, saved, **where).events == taken.events
    assert {path.name for path in (tmp_path / "branch").iterdir()} == {"schedule.jsonl"}


def test_a_branch_takes_the_events_over(asked: Path, small_recipe: Path, tmp_path: Path) -> None:
    branch = f"branch_from={checkpoint(asked, 12)}"
    assert train(words(small_recipe, tmp_path / "same", branch)).code == EXIT_DONE
    assert trajectory(tmp_path / "same") == trajectory(asked)[12:] and events(tmp_path / "same") == events(asked)
    other = words(small_recipe, tmp_path / "other", branch, "data.sources.prose.weight=0.9")
    assert train(other).code == EXIT_DONE
    *taken, own = events(tmp_path / "other")
    assert tuple(taken) == events(asked) and (own.first_block, own.origin, own.step) == (48, "recipe", 12)
    assert set(own.weights) == {"prose", "lists"} and train(other).code == EXIT_DONE  # finished: nothing happens


def test_the_command_changes_a_run_that_stands(
    small_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    before_step(monkeypatch, {6: drop(run, "stop")})
    assert train(words(small_recipe, run)).code == EXIT_STOPPED
    log = (run / "schedule.jsonl").read_bytes()
    for argv, message in [
        (("sett", run), "sett: unknown verb; did you mean set?"),
        (("set", tmp_path / "rum", "prose=1"), "rum: no run here; did you mean run?"),
        (("set", run), "set: expected SOURCE=SHARE"),
        (("set", run, "prosa=0.5"), "weights.prosa: no source of this run; did you mean prose?"),
        (
            ("set", run, "prose=0.5", "at=100"),
            "at: 100 tokens is too early; the first that can still change are at 1,536",
        ),
        (("skip", run, "token=5"), "token: unknown key; did you mean tokens?"),
        (("skip", run), "skip: how much?"),
        (("skip", run, "tokens=1", "at=+1e9"), "the run ends at 4,096"),
        (("add", run, "new=gone"), "gone.idx: No such file"),
        (("show",), "expected one run folder, got 0"),
    ]:
        assert schedule(*argv) != EXIT_DONE
        assert message in capsys.readouterr().err, argv
    assert (run / "schedule.jsonl").read_bytes() == log
    assert schedule("set", run, "prose=0.25", "reason=because") == EXIT_DONE
    assert schedule("skip", run, "tokens=1k", "at=+512") == EXIT_DONE
    assert schedule("show", run) == schedule("plot", run) == EXIT_DONE
    shown = capsys.readouterr().out
    assert "user    from token 1,536 on: lists 0.75, prose 0.25 (made after step 6): because" in shown
    assert "from token 2,048 on: skips 1,024 tokens" in shown
    bars = [f"{0:16,}  {'a' * 42 + 'b' * 18}", f"{1536:16,}  {'a' * 15 + 'b' * 45}"]
    assert (
        f"{bars[0]}\n{'':16}  the same up to 1,365\n{bars[1]}\n{'':16}  the same up to 3,925\n" in shown
        and "a: prose  b: lists" in shown
    )
    assert train(words(small_recipe, run)).code == EXIT_DONE
    assert [event.first_block for event in events(run)] == [0, 24, 32]
    assert schedule("skip", run, "tokens=1") != EXIT_DONE
    assert "the run is finished, 16 of 16 steps" in capsys.readouterr().err


def test_the_command_speaks_last(small_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the policy proposed for blocks ahead of the stop does not undo it."""
    run = tmp_path / "run"
    before_step(monkeypatch, {6: drop(run, "stop")})
    assert train(words(small_recipe, run, ODM)).code == EXIT_STOPPED
    proposed = events(run)[-1]
    assert (proposed.origin, proposed.step) == ("policy", 6)
    assert schedule("set", run, "lists=0") == EXIT_DONE
    assert train(words(small_recipe, run, ODM)).code == EXIT_DONE
    asked = events(run).index(next(event for event in events(run) if event.origin == "user"))
    assert events(run)[asked].first_block == proposed.first_block
    assert len(events(run)) > asked + 1 and all(set(event.weights) == {"prose"} for event in events(run)[asked:])


def test_the_command_asks_a_run_that_trains(
    small_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    codes: list[int] = []

    def ask(trainer: Trainer) -> Any:
        codes.append(schedule("set", run, "prose=0.25"))
        codes.append(schedule("set", run, "prose=0.5"))

    before_step(monkeypatch, {5: ask})
    assert train(words(small_recipe, run)).code == EXIT_DONE
    assert codes == [EXIT_DONE, 64] and [event.step for event in events(run)] == [0, 5]
    assert (run / "control" / "mix.applied-5.yaml").exists()


def test_a_ramp_and_shorter_rows_train_alike(small_recipe: Path, tmp_path: Path) -> None:
    ramp = ("train.batch_ramp=[[0,128],[1024,256]]", "data.seq_lens=[[0,16],[768,64]]", "train.tokens=2048")
    argv = (*ramp, "train.steps=null", "train.schedule={kind: cosine, warmup_tokens: 512, decay_tokens: null}")
    assert train(words(small_recipe, tmp_path / "run", *argv, "microbatch=1")).code == EXIT_DONE
    read = rows(tmp_path / "run")
    assert len(read) == 8 + 4
    assert [round(row["lr"] / 5e-3, 3) for row in read[:4]] == [0.25, 0.5, 0.75, 1.0] and read[-1]["lr"] == 5e-4
    assert read[-1]["source_tokens.prose"] + read[-1]["source_tokens.lists"] == 2048
