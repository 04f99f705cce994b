"""Stateful training: c blocks with the state carried are one pass over them, with the gradient of each block alone."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from lmtrain.data.batch import Batch, make_batch
from lmtrain.data.order.schedule import ScheduleLog
from lmtrain.engine.fsdp import FSDPEngine
from lmtrain.engine.optimizer import OptimizerConfig
from lmtrain.errors import EXIT_DONE, EXIT_STOPPED, EXIT_USAGE
from lmtrain.model.branch import State
from lmtrain.model.config import ModelConfig
from lmtrain.model.context import LocalContext
from lmtrain.model.language_model import LanguageModel
from lmtrain.ops.cross_entropy import IGNORE
from lmtrain.parallel.config import ClusterConfig, MeshConfig
from lmtrain.parallel.mesh import build_mesh, resolve
from tests.distributed.kill_worker import Kill
from tests.distributed.ranks import Ranks
from tests.distributed.test_runs import drift, plain, request, told
from tests.model.row_checks import BRANCHES, D_MODEL
from tests.small_run import (
    Forked,
    assert_clean,
    before_step,
    column,
    copy_until,
    exits,
    rows,
    saved,
    train,
    trajectory,
    words,
)

VOCAB, ROWS, LENGTH, SEED = 32, 4, 12, 1
C, GROUPS = 3, 2
OPTIMIZER = OptimizerConfig(clip_norm=None, eps=1e-3)
MODEL = ModelConfig(D_MODEL, BRANCHES, "mamba2 rwkv7 rwkv_channel_7 gated_deltanet attention_window mlp_swiglu rwkv7")
# where documents start in the C blocks of a run: inside and at the edges of blocks, in row 1 nowhere; row 3's first
# block ends with one of a token. A shard of two ranks ends at columns 6, 18 and 30.
STARTS: tuple[tuple[int, ...], ...] = ((5, 17), (), (12, 24, 30), (11, 12, 20))


@cache
def run_of(group: int) -> tuple[Tensor, Tensor]:
    """Tokens and document ids ``[ROWS, C * LENGTH + 1]`` of the runs that a group reads."""
    generator = torch.Generator().manual_seed(group)
    ids = torch.zeros(ROWS, C * LENGTH + 1, dtype=torch.int32)
    for row, starts in enumerate(STARTS):
        ids[row, list(starts)] = 1
    return torch.randint(0, VOCAB, ids.shape, generator=generator), ids.cumsum(1, dtype=torch.int32)


def whole(group: int) -> Batch:
    """A group's runs as one row each, every token a source of its own: so a step tells the loss of each."""
    tokens, ids = run_of(group)
    source = torch.arange(ROWS * C * LENGTH).view(ROWS, -1)
    return make_batch(tokens, ids, source=source, block=torch.arange(ROWS), run=torch.arange(ROWS) + ROWS * group)


def block(step: int, chosen: Sequence[int]) -> Batch:
    """Block ``step % C`` of some of the group's runs."""
    group, first = step // C, step % C * LENGTH
    tokens, ids = run_of(group)
    rows, columns = list(chosen), slice(first, first + LENGTH + 1)
    run = whole(group)
    return make_batch(
        tokens[rows, columns],
        ids[rows, columns] - ids[rows, first : first + 1],
        source=run.source[rows, first : first + LENGTH],
        block=torch.tensor(rows),
        run=run.run[rows],
        before=run.positions[rows, first],
    )


ONE, SP2 = MeshConfig(dp_shard=1), MeshConfig(dp_shard=1, sp=2)
PLAIN, FULL = ClusterConfig(), ClusterConfig(activation_checkpointing=True)


@dataclass(frozen=True)
class Case:
    """One run. broken: the step whose loss is not a number. lr: 0 keeps the weights as they are."""

    mesh: MeshConfig = ONE
    cluster: ClusterConfig = PLAIN
    accumulation: int = 1
    lr: float = 1e-2
    broken: int | None = None
    first: int = 0


def engine_of(case: Case) -> FSDPEngine:
    return FSDPEngine(
        MODEL,
        VOCAB,
        mesh=build_mesh(resolve(case.mesh, dist.get_world_size()), "cpu"),
        cluster=case.cluster,
        optimizer=OPTIMIZER,
        device=torch.device("cpu"),
        dtype=torch.float64,
        seed=SEED,
        num_sources=ROWS * C * LENGTH,
        stateful=True,
    )


def stateful(case: Case) -> tuple[Tensor, Tensor]:
    """Loss and gradient norm ``[steps, 2]``, and the loss of every token ``[groups, ROWS, C * LENGTH]``."""
    engine = engine_of(case)
    mesh, rows = engine.mesh, ROWS // engine.mesh.data_size // case.accumulation
    steps, tokens = [], torch.zeros(GROUPS, ROWS * C * LENGTH, dtype=torch.float64)
    for step in range(case.first, C * GROUPS):
        first = mesh.data_rank * case.accumulation * rows
        parts = [block(step, range(first + i * rows, first + (i + 1) * rows)) for i in range(case.accumulation)]
        if step == case.broken:
            parts = [replace(part, loss_weights=torch.full(part.labels.shape, torch.nan)) for part in parts]
        cut = [part.cut(mesh.sequence_rank, mesh.sp) for part in parts]
        info = engine.train_step(cut, case.lr, torch.zeros(1, dtype=torch.int64))
        assert (info.skipped is None) == (step != case.broken)
        steps.append((info.loss, info.grad_norm))
        tokens[step // C] += info.source_loss[:, 0]
        engine.losses(cut[0])  # an evaluation in between changes nothing
    return torch.tensor(steps, dtype=torch.float64), tokens.view(GROUPS, ROWS, -1)


def stateful_all(cases: list[Case]) -> list[tuple[Tensor, Tensor]]:
    return [stateful(case) for case in cases]


def by_hand(broken: int | None = None, *, drop: bool = False) -> Tensor:
    """What ``stateful`` must tell of its steps, without engine, mesh or FSDP. drop: carry nothing."""
    model = LanguageModel(MODEL, VOCAB).double()
    model.initialise(SEED)
    info, named = model.param_info(), dict(model.named_parameters())
    groups = [
        {"params": [p], "weight_decay": OPTIMIZER.weight_decay * info[name].decay, "lr": 1e-2 * info[name].lr_scale}
        for name, p in named.items()
    ]
    optimizer = torch.optim.AdamW(groups, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps)
    steps, state = [], State()
    for step in range(C * GROUPS):
        batch = block(step, range(ROWS))
        state = {} if drop or step % C == 0 else tree_map(lambda leaf: leaf.detach(), state)
        logits, state = model(batch.tokens, LocalContext(batch.docs, carries=True), state)
        nll = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten().long(), ignore_index=IGNORE, reduction="sum")
        loss = nll / batch.num_targets
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([parameter.grad.square().sum() for parameter in named.values()]).sum().sqrt()
        if step == broken:
            steps.append((float(loss.detach()), torch.nan))
            state = {}
            continue
        optimizer.step()
        steps.append((float(loss.detach()), float(norm)))
    return torch.tensor(steps, dtype=torch.float64)


ALONE = {
    "one process": Case(),
    "accumulation 2, checkpointing": Case(cluster=FULL, accumulation=2),
    "a step that is not taken": Case(broken=1),
    "weights as they are": Case(lr=0.0),
}
TWO = {
    "dp_shard=2, accumulation 2": Case(MeshConfig(dp_shard=2), accumulation=2),
    "sp=2, checkpointing, accumulation 2": Case(SP2, FULL, accumulation=2),
    "sp=2, a step that is not taken": Case(SP2, broken=2),
    "sp=2, weights as they are": Case(SP2, lr=0.0),
}


@pytest.fixture(scope="module")
def runs(ranks: Ranks) -> dict[str, tuple[Tensor, Tensor]]:
    alone = ranks.run_alone(stateful, [(case,) for case in ALONE.values()])
    first, second = ranks.run(2, stateful_all, list(TWO.values()))
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)
    return dict(zip(ALONE, alone, strict=True)) | dict(zip(TWO, first, strict=True))


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name, case in {**ALONE, **TWO}.items() if case.lr])
def test_steps_are_those_of_truncated_back_propagation(runs: dict[str, tuple[Tensor, Tensor]], name: str) -> None:
    steps, tokens = runs[name]
    broken = {**ALONE, **TWO}[name].broken
    torch.testing.assert_close(steps, by_hand(broken), rtol=1e-9, atol=0, equal_nan=True)
    assert torch.isfinite(tokens).all()
    without = by_hand(broken, drop=True)
    assert (steps[1:C, 0] - without[1:C, 0]).abs().max() > 1e-5, "what is carried must count"


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name, case in {**ALONE, **TWO}.items() if not case.lr])
def test_losses_are_those_of_one_pass_over_the_run(runs: dict[str, tuple[Tensor, Tensor]], name: str) -> None:
    model = LanguageModel(MODEL, VOCAB).double()
    model.initialise(SEED)
    for group in range(GROUPS):
        batch = whole(group)
        with torch.no_grad():
            logits, _ = model(batch.tokens, LocalContext(batch.docs), {})
        labels = batch.labels.flatten().long()
        nll = F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=IGNORE, reduction="none")
        torch.testing.assert_close(runs[name][1][group], nll.view(ROWS, -1), rtol=1e-10, atol=1e-12)


def begin_amid(case: Case) -> str:
    with pytest.raises(ValueError, match="training can only begin where a group of steps does") as raised:
        stateful(case)
    return str(raised.value)


@pytest.mark.distributed
def test_a_run_whose_state_is_not_here_is_refused(ranks: Ranks) -> None:
    (message,) = ranks.run_alone(begin_amid, [(Case(first=1),)])
    assert "goes on with runs [0, 1], the state held is of [-1, -1, -1, -1]" in message


# --------------------------------------------------------------------------------------------- whole runs

STATEFUL = ("data.run_blocks=4", "model.branches.attn.window=24", "checkpoint.keep_last=99")


@pytest.fixture(scope="module")
def straight(small_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a stateful run that nothing interrupted, in one process; read only."""
    run_dir = tmp_path_factory.mktemp("stateful") / "run"
    outcome = train(words(small_recipe, run_dir, *STATEFUL))
    assert outcome.code == EXIT_DONE, outcome.err
    return run_dir


def test_a_stop_waits_for_the_end_of_the_group_and_the_rest_is_the_same_run(
    small_recipe: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        before_step(patch, {2: request("save"), 5: request("stop")})
        outcome = train(words(small_recipe, run_dir, *STATEFUL, "checkpoint.every=0", "eval.every=3"))
    assert outcome.code == EXIT_STOPPED and saved(run_dir) == [4, 8]
    said = plain(outcome.out)
    for what, end in (("save", 4), ("stop", 8)):
        assert said.count(f"{what}: waits for step {end}, the end of a group of 4 steps (data.run_blocks)") == 1
    assert train(words(small_recipe, run_dir, *STATEFUL)).code == EXIT_DONE
    assert trajectory(run_dir) == trajectory(straight)


def test_a_mixture_changes_between_groups(small_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = tmp_path / "run"
    (run_dir / "control").mkdir(parents=True)
    (run_dir / "control" / "mix.yaml").write_text("weights: {lists: 0.9}\nskip: 1024\nat: 2100\n", encoding="utf-8")
    policy = ("data.policy.kind=odm_exp3", "data.policy.every=3", "data.policy.start_tokens=0")
    with monkeypatch.context() as patch:
        before_step(patch, {10: request("stop")})
        assert train(words(small_recipe, run_dir, *STATEFUL, *policy)).code == EXIT_STOPPED
    assert train(words(small_recipe, run_dir, *STATEFUL, *policy)).code == EXIT_DONE
    log = ScheduleLog.read(run_dir / "schedule.jsonl")
    assert {event.origin for event in log.events} == {"recipe", "user", "policy"}
    blocks_of_a_group = 4 * 256 // 64
    assert all(event.first_block % blocks_of_a_group == 0 for event in log.events)
    assert [event.first_block for event in log.events if event.origin == "user"] == [3 * blocks_of_a_group]

    replay = tmp_path / "replay"
    replay.mkdir()
    shutil.copy(run_dir / "schedule.jsonl", replay)
    assert train(words(small_recipe, replay, *STATEFUL)).code == EXIT_DONE
    assert column(replay, "token_hash") == column(run_dir, "token_hash")


@pytest.mark.distributed
def test_it_is_killed_and_goes_on_at_other_world_sizes(small_recipe: Path, straight: Path, tmp_path: Path) -> None:
    run_dir = copy_until(straight, tmp_path / "run", 4)
    ranks = Forked(
        2, words(small_recipe, run_dir, *STATEFUL, "mesh.dp_shard=2"), tmp_path, Kill("before_update", 1, 11)
    )
    assert ranks.wait()[1] == -signal.SIGKILL, ranks.output()
    ranks = Forked(2, words(small_recipe, run_dir, *STATEFUL, "mesh.sp=2", "train.log_every=2"), tmp_path)
    assert ranks.wait() == [EXIT_DONE] * 2, ranks.output()
    assert_clean(run_dir)
    assert [row["attempt"] for row in rows(run_dir)] == [1] * 4 + [2] * 4 + [3] * 8
    assert column(run_dir, "token_hash") == column(straight, "token_hash")
    assert drift(run_dir, straight) < 1e-5
    assert exits(run_dir)[-1]["code"] == EXIT_DONE


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("train.steps=14",), r"train.steps.*14 steps are no whole groups of 4 \(data.run_blocks\); nearest: 16"),
        (("checkpoint.every=6",), r"checkpoint.every.*6 steps are no whole groups of 4 .*; nearest: 8"),
        (("train.batch_ramp=[[0,128],[384,256]]",), r"train.batch_ramp.*3 steps of 128 .*; nearest: 512 tokens"),
        (("data.packing=unpacked",), r"data.*run_blocks: with packing unpacked no document goes on"),
        (("model.branches.attn.window=null",), r"data.run_blocks=4: .*branches.attn \(attention\) sees its whole doc"),
    ],
)
def test_what_cannot_be_is_refused_before_a_run_begins(
    small_recipe: Path, tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    outcome = train(words(small_recipe, tmp_path / "run", *STATEFUL, *overrides))
    assert outcome.code == EXIT_USAGE and told(outcome, message), outcome.err
    assert not (tmp_path / "run").exists()


def test_a_branch_begins_where_a_group_does(small_recipe: Path, straight: Path, tmp_path: Path) -> None:
    branch = (f"branch_from={straight}/checkpoints/step-00000004", "train.steps=16")
    outcome = train(
        words(small_recipe, tmp_path / "run", *STATEFUL, *branch, "data.run_blocks=8", "checkpoint.every=8")
    )
    assert outcome.code == EXIT_USAGE
    assert told(outcome, r"step 4 is amid a group of 8 steps .*; begin from a checkpoint of step 0, or of another mult")
