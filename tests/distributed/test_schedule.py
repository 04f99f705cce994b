"""The mixture changes while a run trains, and is killed: what was read is what the log says, at any world size; and
what only one rank can open comes on none."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lmtrain.checkpoint.ranks import Ranks as Together
from lmtrain.data.config import DataConfig, SourceConfig
from lmtrain.data.ingest.ingest import PrepareConfig, prepare
from lmtrain.data.ingest.reading import SourceOptions
from lmtrain.data.loader import Loader
from lmtrain.data.order.schedule import ScheduleLog
from lmtrain.data.policies.config import PolicyConfig
from lmtrain.data.policies.make import make
from lmtrain.data.policies.policy import Run
from lmtrain.engine.protocol import StepInfo
from lmtrain.errors import EXIT_DONE
from lmtrain.pretrain import schedule_command
from lmtrain.train.mixture import Mixture
from tests.distributed.kill_worker import Kill
from tests.distributed.ranks import Ranks
from tests.small_run import ROOT, Forked, assert_clean, column, rows, words

STEPS = 30
SOURCES = ("code", "prose", "manual", "dictionary")
TINY = (
    "model.d_model=32",
    "model.branches.ssm.head_dim=16",
    "model.branches.ssm.d_state=8",
    "model.branches.attn.num_heads=2",
    "model.branches.attn.num_kv_heads=1",
    "model.branches.attn.head_dim=16",
    "model.branches.mlp.d_ff=64",
    "model.pattern=ssm mlp attn mlp",
    "data.seq_len=32",
    "data.policy.every=2",
    "data.policy.start_tokens=0",
    "train.tokens=null",
    f"train.steps={STEPS}",
    "train.batch_tokens=512",
    "train.batch_ramp=[[0,256],[2048,512]]",
    "train.schedule.warmup_tokens=1024",
    "train.schedule.decay_tokens=1024",
    "eval.every=0",
    "eval.max_tokens=256",
    "checkpoint.every=5",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe's four sources and a fifth, ``news``, of one tokenizer; each of words of its own, so losses differ."""
    root = tmp_path_factory.mktemp("live")
    draw = random.Random(0)
    options = {}
    for number, name in enumerate((*SOURCES, "news")):
        known = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 8))) for _ in range(15 * (number + 1))]
        lines = [" ".join(draw.choices(known, k=draw.randint(20, 90))) for _ in range(250)]
        text = "".join(json.dumps({"text": line}) + "\n" for line in lines)
        (root / f"{name}.jsonl").write_text(text, encoding="utf-8")
        options[name] = SourceOptions(str(root / f"{name}.jsonl"))
    prepare(PrepareConfig(out=str(root / "data"), tokenizer="train:300", sources=options, heldout=0.05))
    return root / "data"


@pytest.mark.distributed
def test_live_mix(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """recipes/live-mix.yaml: a request of a person, events of ADO, a new source and a function arrive, and it is killed
    twice; a function that one rank lacks does not."""
    run = tmp_path / "run"
    paths = (f"data.tokenizer={data}/tokenizer.json", *(f"data.sources.{n}.path={data}/{n}" for n in SOURCES))
    argv = words(ROOT / "recipes" / "live-mix.yaml", run, *TINY, *paths, "workers=1", "mesh.dp_shard=2")
    (run / "control").mkdir(parents=True)
    (run / "control" / "mix.yaml").write_text("weights: {code: 0.1}\nat: 3000\nreason: less code\n", encoding="utf-8")

    ranks = Forked(2, argv, tmp_path, Kill("recorded", 0, 8))
    assert ranks.wait()[0] == -signal.SIGKILL, ranks.output()
    assert (run / "control" / "mix.applied-1.yaml").exists()
    assert schedule_command.main(["add", str(run), f"news={data}/news", "share=0.2"], "") == EXIT_DONE
    assert "adds news" in capsys.readouterr().out

    request = run / "control" / "mix.yaml"
    request.write_text("add: {alone: tests.distributed.rank_0_alone:numbers}\nweights: {alone: 0.2}", encoding="utf-8")
    ranks = Forked(2, argv, tmp_path, Kill("before_update", 1, 23))
    assert ranks.wait()[1] == -signal.SIGKILL, ranks.output()
    (refused,) = (run / "control").glob("mix.rejected-*.txt")
    assert "on rank 1: data.sources.alone.synthetic: " in refused.read_text(encoding="utf-8")
    assert "on rank 0" not in refused.read_text(encoding="utf-8")

    recall = "add: {recall: lmtrain.eval.probes.mqar:mqar}\nweights: {recall: 0.3}\nat: 11500\narguments: "
    arguments = "{recall.pairs: 2, recall.length: 16, recall.num_keys: 9, recall.num_values: 9}\n"
    request.write_text(recall + arguments, encoding="utf-8")
    ranks = Forked(2, argv, tmp_path)
    assert ranks.wait() == [EXIT_DONE] * 2, ranks.output()
    assert_clean(run)

    log = ScheduleLog.read(run / "schedule.jsonl")
    assert [event.origin for event in log.events[:3]] == ["recipe", "user", "user"]
    assert [name for event in log.events for name in event.sources] == ["news", "recall"]
    policy = [event for event in log.events if event.origin == "policy"]
    assert policy and len({event.step for event in policy}) == len(policy), log.events
    read = rows(run)
    assert [row["step"] for row in read] == list(range(1, STEPS + 1))
    for name in ("news", "recall"):
        assert read[-1][f"source_tokens.{name}"] > 0 and any(f"source_loss.{name}" in row for row in read)
    assert len({row["attempt"] for row in read}) == 3

    replay = tmp_path / "replay"
    replay.mkdir()
    shutil.copy(run / "schedule.jsonl", replay)
    alone = words(
        ROOT / "recipes" / "live-mix.yaml", replay, *TINY, *paths, "data.policy={kind: static, floor: 0}", "workers=0"
    )
    ranks = Forked(1, alone, tmp_path)
    assert ranks.wait() == [EXIT_DONE], ranks.output()
    assert column(replay, "token_hash") == column(run, "token_hash")
    assert (replay / "schedule.jsonl").read_bytes() == (run / "schedule.jsonl").read_bytes()


@pytest.mark.distributed
def test_a_path_that_one_rank_lacks_comes_on_none(data: Path, tmp_path: Path, ranks: Ranks) -> None:
    """/proc/self/cwd is a folder of its own for every process."""
    for rank in (0, 1):
        (tmp_path / f"rank-{rank}").mkdir()
    shutil.copytree(data / "news", tmp_path / "rank-0" / "news")
    (tmp_path / "mix.yaml").write_text("add: {news: /proc/self/cwd/news}", encoding="utf-8")
    for there in (False, True):
        if there:
            shutil.copytree(data / "news", tmp_path / "rank-1" / "news")
            (tmp_path / "mix.rejected-3.yaml").rename(tmp_path / "mix.yaml")
        (first, events, notes), (second, _, _) = ranks.run(2, ask_for_a_source, str(data), str(tmp_path))
        assert first == second == ["code", "prose", *(["news"] if there else [])]
        assert events == 1 + there and (tmp_path / f"mix.{'applied' if there else 'rejected'}-3.yaml").exists()
        assert there or ("is refused: on rank 1: " in notes[0] and "on rank 0" not in notes[0])


def ask_for_a_source(data: str, folder: str) -> tuple[list[str], int, list[str]]:
    """On each rank: its sources, the events of its log and its notes, once the ranks have decided on ``folder``'s
    request after step 3."""
    rank, before = dist.get_rank(), Path.cwd()
    sources = {name: SourceConfig(f"{data}/{name}") for name in ("code", "prose")}
    cfg = DataConfig(f"{data}/tokenizer.json", 32, sources)
    log = ScheduleLog.fixed({"code": 1, "prose": 1})
    loader = Loader(cfg, seed=0, batch_tokens=64, microbatch=1, dp_rank=rank, dp_size=2, log=ScheduleLog(log.events))
    policy = make(PolicyConfig(), {"code": 1.0, "prose": 1.0}, Run(loader.tokens_available, 4096))
    notes: list[str] = []
    told = log if rank == 0 else None
    mixture = Mixture(loader, Together(None), 16, told, policy, Path(folder), 0, notes.append)
    info = StepInfo(**dict.fromkeys((f.name for f in fields(StepInfo)), None) | {"source_loss": torch.zeros(2, 2)})  # type: ignore[arg-type]
    os.chdir(f"{folder}/rank-{rank}")
    try:
        mixture.observe(3, info)
        mixture.share()
    finally:
        os.chdir(before)
    return loader.source_names, len(log.events), notes
