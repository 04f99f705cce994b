"""The mixture changes while a run trains, and is killed: what was read is what the log says, at any world size."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path

import pytest

from lmtrain.data.ingest.ingest import PrepareConfig, prepare
from lmtrain.data.ingest.reading import SourceOptions
from lmtrain.data.order.schedule import ScheduleLog
from lmtrain.errors import EXIT_DONE
from lmtrain.pretrain import schedule_command
from tests.distributed.kill_worker import Kill
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
    """recipes/live-mix.yaml: a request of a person, events of ADO and a new source arrive, and it is killed twice."""
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

    ranks = Forked(2, argv, tmp_path, Kill("before_update", 1, 23))
    assert ranks.wait()[1] == -signal.SIGKILL, ranks.output()
    ranks = Forked(2, argv, tmp_path)
    assert ranks.wait() == [EXIT_DONE] * 2, ranks.output()
    assert_clean(run)

    log = ScheduleLog.read(run / "schedule.jsonl")
    assert [event.origin for event in log.events[:3]] == ["recipe", "user", "user"]
    policy = [event for event in log.events if event.origin == "policy"]
    assert policy and len({event.step for event in policy}) == len(policy), log.events
    read = rows(run)
    assert [row["step"] for row in read] == list(range(1, STEPS + 1))
    assert read[-1]["source_tokens.news"] > 0 and any("source_loss.news" in row for row in read)
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
