"""Runs on sources that are functions: alone, mixed with text, added while they train; resumed exactly."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
import yaml

from lmtrain.data.blocks.function import document_function
from lmtrain.data.blocks.synthetic import NUM_BLOCKS, document_seed
from lmtrain.data.order.sampler import Sampler
from lmtrain.data.order.schedule import ScheduleLog
from lmtrain.data.reader import StepData
from lmtrain.errors import EXIT_DATA, EXIT_DONE, EXIT_STOPPED
from lmtrain.eval.probes.parity import parity
from lmtrain.pretrain import schedule_command
from lmtrain.train.loop import Trainer
from tests.small_run import STEPS, before_step, column, copy_until, rows, train, trajectory, words

KEEP = "checkpoint.keep_last=99"
PARITY = {"synthetic": "lmtrain.eval.probes.parity:parity", "arguments": {"bits": 12}}
MQAR = {
    "synthetic": "lmtrain.eval.probes.mqar:mqar",
    "arguments": {"pairs": 4, "length": 32, "num_keys": 16, "num_values": 16},
}
SHIFT = {"by": 0}
"""Added to what ``shifted`` makes, so that it can become another function."""


@document_function
def shifted(seed: int, index: int, *, length: int) -> list[int]:
    return [(index + n + SHIFT["by"]) % 200 for n in range(length)]


def recipe_of(small_recipe: Path, folder: Path, sources: dict[str, Any]) -> Path:
    """The small recipe with other ``sources``; those that are None stay as they are."""
    recipe = yaml.safe_load(small_recipe.read_text(encoding="utf-8"))
    kept = recipe["data"]["sources"]
    recipe["data"]["sources"] = {name: source or kept[name] for name, source in sources.items()}
    path = folder / "probes.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def test_a_run_on_parity_alone_reads_what_the_probe_gives(
    small_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, read, original = tmp_path / "run", [], Trainer._step

    def step(self: Trainer, data: StepData, lr: float) -> Any:
        read.append(data)
        return original(self, data, lr)

    monkeypatch.setattr(Trainer, "_step", step)
    recipe = recipe_of(small_recipe, tmp_path, {"odd": PARITY})
    outcome = train(words(recipe, run, "seed=3"))
    assert outcome.code == EXIT_DONE, outcome.err
    sampler = Sampler(3, ScheduleLog.read(run / "schedule.jsonl"), {"odd": NUM_BLOCKS})
    for data, token_hash in zip(read, column(run, "token_hash"), strict=True):
        digests = []
        for batch in data.micro_batches:
            window = sampler.get(batch.block.numpy())[1]
            for row, p in enumerate(window.tolist()):
                own = [parity(document_seed("odd", 3), p * 65 + number, bits=12) for number in range(5)]
                tokens, labels = (np.concatenate([getattr(one, part) for one in own]) for part in ("tokens", "labels"))
                assert batch.tokens[row].tolist() == tokens[:64].tolist()
                assert batch.labels[row].tolist() == labels[:64].tolist()
                assert batch.docs.ids[row].tolist() == np.repeat(np.arange(5), 13)[:64].tolist()
                digests.append(xxhash.xxh3_128_digest(tokens.astype("<i4").tobytes() + labels.astype("<i4").tobytes()))
            assert batch.num_targets == 5 * 12 * len(window)
        assert token_hash == xxhash.xxh3_128_hexdigest(b"".join(digests))
    assert [row["tokens"] for row in rows(run)] == [4 * 60 * step for step in range(1, STEPS + 1)]


def test_text_parity_and_recall_resume_exactly(
    small_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(small_recipe, tmp_path, {"prose": None, "odd": PARITY, "recall": MQAR})
    argv = ("data.policy={kind: odm_exp3, every: 2, min_change: 0}", KEEP)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(words(recipe, whole, *argv)).code == EXIT_DONE
    before_step(monkeypatch, {7: lambda _: (parts / "control" / "stop").touch()})
    assert train(words(recipe, parts, *argv)).code == EXIT_STOPPED
    assert train(words(recipe, parts, *argv)).code == EXIT_DONE
    assert trajectory(parts) == trajectory(whole) and len({row["attempt"] for row in rows(parts)}) == 2
    assert ScheduleLog.read(parts / "schedule.jsonl").events == ScheduleLog.read(whole / "schedule.jsonl").events
    for name in ("prose", "odd", "recall"):
        assert any(row.get(f"source_loss.{name}", 0) > 0 for row in rows(parts))


def test_a_function_is_added_to_a_run_by_a_file_and_by_the_command(
    small_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    mqar = "lmtrain.eval.probes.mqar:mqar"

    def ask(text: str) -> Any:
        return lambda _: (run / "control" / "mix.yaml").write_text(text, encoding="utf-8")

    before_step(
        monkeypatch,
        {
            1: ask("add: {recall: lmtrain.eval.probes.mqr:mqar}"),
            2: ask(f"add: {{recall: {mqar}}}\narguments: {{recall.pairs: 1, recall.lenght: 4}}"),
            3: ask(
                f"add: {{recall: {mqar}}}\n"
                "arguments: {recall.pairs: 1, recall.length: 4, recall.num_keys: 1, recall.num_values: 999}"
            ),
            4: ask(f"add: {{made: {__name__}:shifted}}\narguments: {{made.length: 20}}\nweights: {{made: 0.5}}"),
            8: lambda _: (run / "control" / "stop").touch(),
        },
    )
    outcome = train(words(small_recipe, run, KEEP))
    assert outcome.code == EXIT_STOPPED, outcome.err
    told = [(run / "control" / f"mix.rejected-{step}.txt").read_text(encoding="utf-8") for step in (1, 2, 3)]
    assert "data.sources.recall.synthetic: lmtrain.eval.probes.mqr:mqar: No module named" in told[0]
    assert "did you mean mqar?" in told[0] and "unexpected keyword argument 'lenght'" in told[1]
    assert "is outside the vocabulary of 300" in told[2]
    assert f"adds made ({__name__}:shifted(length=20))" in outcome.out

    arguments = [f"arguments.{name}={value}" for name, value in MQAR["arguments"].items()]  # type: ignore[attr-defined]
    for argv, message in [
        (["recall=lmtrain.eval.probes.mqar:mqr", *arguments], "mqar has no function mqr; did you mean mqar?"),
        (["recall=data/recall", *arguments], "arguments.recall: add names no function of that name"),
        (["recall=gone", "share=0.2"], "gone.idx: No such file"),
    ]:
        assert schedule_command.main(["add", str(run), *argv], "") != EXIT_DONE
        assert message in capsys.readouterr().err
    assert schedule_command.main(["add", str(run), f"recall={mqar}", *arguments, "share=0.25"], "") == EXIT_DONE
    assert f"adds recall ({mqar}(pairs=4, length=32, num_keys=16, num_values=16))" in capsys.readouterr().out

    outcome = train(words(small_recipe, run, KEEP))
    assert outcome.code == EXIT_DONE, outcome.err
    for name in ("made", "recall"):
        assert outcome.err.count(f"source {name} has no held-out documents") == 1
        assert rows(run)[-1][f"source_tokens.{name}"] > 0
    _, made, recall = ScheduleLog.read(run / "schedule.jsonl").events
    assert made.sources["made"].arguments == {"length": 20} and made.sources["made"].path is None
    assert recall.sources["recall"].arguments == MQAR["arguments"]

    replay = tmp_path / "replay"
    replay.mkdir()
    shutil.copy(run / "schedule.jsonl", replay)
    assert train(words(small_recipe, replay, "workers=1")).code == EXIT_DONE
    assert trajectory(replay) == trajectory(run)
    again = copy_until(run, tmp_path / "again", 8)
    monkeypatch.setitem(SHIFT, "by", 1)
    outcome = train(words(small_recipe, again, KEEP))
    assert outcome.code == EXIT_DATA and len(column(again, "step")) == STEPS
    assert f"{__name__}:shifted(length=20): makes other documents than those of source made" in outcome.err
