"""Every mesh trains the same model: losses and gradient norms of 20 steps equal those of one process.

AdamW and clipping hide a wrong gradient scale from the loss, hence the norms; the controls at the end show that the
comparison notices what is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from lmtrain.data.batch import Batch, make_batch
from lmtrain.engine.fsdp import FSDPEngine
from lmtrain.engine.optimizer import OptimizerConfig
from lmtrain.model.config import ModelConfig
from lmtrain.model.context import LocalContext
from lmtrain.model.ffn.mlp import MLPConfig
from lmtrain.model.ffn.moe_settings import MoEConfig
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.mixers.attention_settings import AttentionConfig
from lmtrain.model.mixers.mamba2 import Mamba2Config
from lmtrain.ops.cross_entropy import IGNORE
from lmtrain.parallel.config import ClusterConfig, MeshConfig
from lmtrain.parallel.context import SequenceContext
from lmtrain.parallel.exchange import AllToAll, GatherSequence, Halo, PrefixState
from lmtrain.parallel.mesh import build_mesh, resolve
from tests.distributed.ranks import Ranks

pytestmark = pytest.mark.distributed

VOCAB = 64
ROWS, LENGTH = 4, 32
STEPS, FEW = 20, 4  # 20 as promised; few where four ranks share two cores, and for the controls
SEED = 1
LR = 1e-2
Z_LOSS = 1e-3
OPTIMIZER = OptimizerConfig(clip_norm=0.3)
MODEL = ModelConfig(
    d_model=16,
    branches={
        "ssm": Mamba2Config(d_state=8, head_dim=8, num_groups=2, chunk=8),
        "wide": AttentionConfig(num_heads=4, num_kv_heads=2, qk_norm=True),
        "local": AttentionConfig(num_heads=4, num_kv_heads=2, rope=False, window=5),
        "swiglu": MLPConfig(d_ff=24),
        "gelu": MLPConfig(d_ff=24, activation="gelu"),
        "relu2": MLPConfig(d_ff=24, activation="relu2"),
        "moe": MoEConfig(num_experts=4, top_k=2, d_expert=8, num_shared=1, aux_weight=0.05),
        "biased": MoEConfig(4, 2, 8, router="sigmoid", balance="bias", bias_rate=1e-2, activation="gelu"),
    },
    pattern="ssm swiglu wide moe local relu2 biased gelu ssm",
)
# where documents start in each row; the shard edge of sp=2 is column 16, of sp=4 also 8 and 24
STARTS = ((5, 16, 20), (8, 15, 27), (3, 17, 30), (4, 5, 6, 15, 16, 17, 18, 24))
PADDED = 5  # columns of padding at the end of row 1: ragged label counts


PLAIN = ClusterConfig()


@dataclass(frozen=True)
class Case:
    """One run: where, how, and what is left out of it (a key of ``LEFT_OUT``)."""

    mesh: MeshConfig
    cluster: ClusterConfig = PLAIN
    accumulation: int = 1
    steps: int = STEPS
    dtype: torch.dtype = torch.float64
    left_out: str | None = None
    rolled: int = 0  # which rows share a micro-batch
    model: ModelConfig = MODEL

    @property
    def world(self) -> int:
        return abs(self.mesh.dp_replicate * self.mesh.dp_shard * self.mesh.sp)


def batch(step: int, rows: slice, rolled: int = 0) -> Batch:
    """Some rows of the step's batch: every second token follows from the one before it."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (ROWS, LENGTH + 1), generator=generator)
    tokens[:, 1::2] = (tokens[:, :-1:2] * 3 + 1) % VOCAB
    ids = torch.zeros(ROWS, LENGTH + 1, dtype=torch.int32)
    padding = torch.zeros(ROWS, LENGTH + 1, dtype=torch.bool)
    for row, starts in enumerate(STARTS):
        ids[row, list(starts)] = 1
    padding[1, LENGTH + 1 - PADDED :] = True
    ids[1, LENGTH + 1 - PADDED] = 1
    ids = ids.cumsum(1)
    order = (torch.arange(ROWS) + step + rolled) % ROWS  # every rank meets every row
    weights = torch.rand(ROWS, LENGTH, generator=generator) + 0.5
    chosen = order[rows]
    made = make_batch(
        tokens[chosen],
        ids[chosen],
        source=torch.zeros(len(chosen), LENGTH),
        block=chosen + ROWS * step,
        padding=padding[chosen],
    )
    return replace(made, loss_weights=weights[chosen])


def train(case: Case) -> Tensor:
    """``[steps, 2]``: loss per target and gradient norm, of an engine on the world this process is in."""
    with left_out(case.left_out):
        mesh = build_mesh(resolve(case.mesh, dist.get_world_size()), "cpu")
        engine = FSDPEngine(
            case.model,
            VOCAB,
            mesh=mesh,
            cluster=case.cluster,
            optimizer=OPTIMIZER,
            device=torch.device("cpu"),
            dtype=case.dtype,
            seed=SEED,
            z_loss=Z_LOSS,
        )
        told = []
        used: dict[int, Tensor | int] = {}
        rows = ROWS // mesh.data_size // case.accumulation
        for step in range(case.steps):
            first = mesh.data_rank * case.accumulation
            slices = [slice(i * rows, (i + 1) * rows) for i in range(first, first + case.accumulation)]
            parts = [batch(step, each, case.rolled) for each in slices]
            micro_batches = [part.cut(mesh.sequence_rank, mesh.sp) for part in parts]
            info = engine.train_step(micro_batches, LR, torch.zeros(2, dtype=torch.int64))
            told.append((info.loss, info.grad_norm))
            for place, load in info.router_load.items():
                used[place] = used.get(place, 0) + load
    assert used or case.model is not MODEL
    assert all(bool((load > 0).all()) for load in used.values()), "every expert must take part"
    return torch.tensor(told, dtype=torch.float64)


def train_all(cases: list[Case]) -> list[Tensor]:
    return [train(case) for case in cases]


def train_plainly() -> Tensor:
    """What ``train`` must give, written without engine, mesh or FSDP."""
    model = LanguageModel(MODEL, VOCAB).double()
    model.initialise(SEED)
    info = model.param_info()
    named = dict(model.named_parameters())
    groups = [
        {
            "params": [parameter for name, parameter in named.items() if info[name].decay == decays],
            "weight_decay": OPTIMIZER.weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps)
    told = []
    for step in range(STEPS):
        data = batch(step, slice(None))
        assert data.loss_weights is not None
        targets = int((data.labels != IGNORE).sum())
        ctx = LocalContext(data.docs)
        ctx.tokens = torch.tensor(targets, dtype=torch.float64)
        logits, _ = model(data.tokens, ctx, {})
        lse = logits.logsumexp(dim=-1)
        nll = F.cross_entropy(logits.flatten(0, 1), data.labels.flatten().long(), reduction="none").view_as(lse)
        lse = torch.where(data.labels == IGNORE, 0, lse)
        ((nll + Z_LOSS * lse.square()) * data.loss_weights).sum().div(targets).backward()
        norm = torch.stack([parameter.grad.square().sum() for parameter in named.values()]).sum().sqrt()
        assert OPTIMIZER.clip_norm is not None and norm > OPTIMIZER.clip_norm
        for parameter in named.values():
            parameter.grad.mul_(OPTIMIZER.clip_norm / norm)
        optimizer.step()
        optimizer.zero_grad()
        for (place, name), load in ctx.notes.items():
            model.stack[place].branch.after_step({name: load})
        told.append((float(nll.detach().sum()) / targets, float(norm)))
    return torch.tensor(told, dtype=torch.float64)


# --- what the controls leave out: each exchange returns what a rank knows by itself ---


def _alone_state(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
    incoming, final = ORIGINAL[PrefixState][0](ctx, *inputs)
    return torch.zeros_like(incoming), final


def _alone_state_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    return tuple(g if g is None else torch.zeros_like(g) for g in ORIGINAL[PrefixState][1](ctx, *grads))


def _alone_halo(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
    left, last = ORIGINAL[Halo][0](ctx, *inputs)
    return torch.zeros_like(left), last


def _alone_halo_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    return tuple(g if g is None else torch.zeros_like(g) for g in ORIGINAL[Halo][1](ctx, *grads))


def _alone_row(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
    row = ORIGINAL[GatherSequence][0](ctx, x, group)
    own = torch.zeros_like(row).unflatten(1, (group.size(), -1))
    own[:, group.rank()] = x
    return own.flatten(1, 2)


def _alone_row_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    return grads[0].unflatten(1, (ctx.group.size(), -1))[:, ctx.group.rank()].contiguous(), None


def _alone_heads(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
    ctx.group = group
    return x.clone()


def _alone_heads_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    return grads[0], None


ALONE: dict[Any, tuple[Callable[..., Any], Callable[..., Any]]] = {
    PrefixState: (_alone_state, _alone_state_backward),
    Halo: (_alone_halo, _alone_halo_backward),
    GatherSequence: (_alone_row, _alone_row_backward),
    AllToAll: (_alone_heads, _alone_heads_backward),
}
ORIGINAL = {exchange: (exchange.forward, exchange.backward) for exchange in ALONE}
LEFT_OUT = [
    f"{exchange.__name__} {part}" for exchange in ALONE for part in ("forward", "backward", "forward+backward")
] + ["sum reduction", "router counts"]


@contextmanager
def left_out(what: str | None) -> Iterator[None]:
    """Runs the body without one thing (``LEFT_OUT``)."""
    with ExitStack() as patches:
        if what == "sum reduction":
            for method in ("set_gradient_divide_factor", "set_force_sum_reduction_for_comms"):
                patches.enter_context(mock.patch.object(FSDPModule, method, lambda self, value: None))
        elif what == "router counts":
            patches.enter_context(mock.patch.object(SequenceContext, "all_sum", lambda self, counts, over: counts))
        elif what is not None:
            name, parts = what.split()
            (exchange,) = (each for each in ALONE if each.__name__ == name)
            for part, alone in zip(("forward", "backward"), ALONE[exchange], strict=True):
                if part in parts.split("+"):
                    patches.enter_context(mock.patch.object(exchange, part, staticmethod(alone)))
        yield


# --- the runs ---

SP2 = MeshConfig(dp_shard=1, sp=2)
FULL = ClusterConfig(activation_checkpointing=True)
ROOT = ClusterConfig(fsdp_units="root")


def _sp_attention(method: Literal["heads", "gather"], cluster: ClusterConfig = PLAIN) -> ClusterConfig:
    return replace(cluster, sp_attention=method)


ONE = MeshConfig(dp_shard=1)
DOUBLE = {
    "one process": Case(ONE),
    "one process, accumulation 2": Case(ONE, accumulation=2),
    "one process, checkpointing": Case(ONE, FULL),
    "one process, root unit": Case(ONE, ROOT),
    "dp_shard=2": Case(MeshConfig(dp_shard=2)),
    "dp_shard=2, accumulation 2, checkpointing, root unit": Case(
        MeshConfig(dp_shard=2), replace(FULL, fsdp_units="root"), accumulation=2
    ),
    "dp_replicate=2": Case(MeshConfig(dp_replicate=2, dp_shard=1)),
    "sp=2, heads": Case(SP2, _sp_attention("heads")),
    "sp=2, gather": Case(SP2, _sp_attention("gather")),
    "sp=2, heads, checkpointing": Case(SP2, _sp_attention("heads", FULL)),
    "sp=2, gather, checkpointing, root unit": Case(SP2, _sp_attention("gather", replace(FULL, fsdp_units="root"))),
    "sp=2, accumulation 2": Case(SP2, accumulation=2),
    "ep=2 over dp_shard=2": Case(MeshConfig(dp_shard=2, ep=2)),
    "ep=2 over sp=2, accumulation 2": Case(replace(SP2, ep=2), accumulation=2),
    "dp_shard=2 sp=2 ep=2, checkpointing": Case(MeshConfig(dp_shard=2, sp=2, ep=2), FULL, steps=FEW),
    "dp_shard=2 sp=2, checkpointing": Case(MeshConfig(dp_shard=2, sp=2), FULL, steps=FEW),
    "dp_replicate=2 sp=2": Case(MeshConfig(dp_replicate=2, dp_shard=1, sp=2), steps=FEW),
    "sp=4": Case(MeshConfig(dp_shard=1, sp=4), steps=FEW),
}
SINGLE = {
    "one process, fp32": Case(ONE, dtype=torch.float32),
    "one process, accumulation 2, fp32": Case(ONE, accumulation=2, dtype=torch.float32),
    "one process, accumulation 4, fp32": Case(ONE, accumulation=4, dtype=torch.float32),
    "one process, accumulation 2 of other rows, fp32": Case(ONE, accumulation=2, dtype=torch.float32, rolled=1),
    "one process, accumulation 4 in another order, fp32": Case(ONE, accumulation=4, dtype=torch.float32, rolled=2),
    "dp_shard=2, fp32": Case(MeshConfig(dp_shard=2), dtype=torch.float32),
    "sp=2, heads, fp32": Case(SP2, _sp_attention("heads"), dtype=torch.float32),
    "sp=2, gather, fp32": Case(SP2, _sp_attention("gather"), dtype=torch.float32),
}
CONTROLS = {
    what: Case(
        MeshConfig(dp_shard=2) if what == "sum reduction" else SP2,
        _sp_attention("heads" if what.startswith("AllToAll") else "gather"),
        steps=FEW,
        left_out=what,
    )
    for what in LEFT_OUT
}


@pytest.fixture(scope="module")
def runs(ranks: Ranks) -> dict[str, Tensor]:
    """Every run by name."""
    cases = {**DOUBLE, **SINGLE, **CONTROLS}
    worlds = {name: case.world for name, case in cases.items()}
    alone = [name for name, world in worlds.items() if world == 1]
    found = dict(zip(alone, ranks.run_alone(train, [(cases[name],) for name in alone]), strict=True))
    for world in (2, 4):
        names = [name for name, size in worlds.items() if size == world]
        results = ranks.run(world, train_all, [cases[name] for name in names])
        for other in results[1:]:  # losses and norms are reduced: every rank tells the same
            assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))
        found |= dict(zip(names, results[0], strict=True))
    return found


def difference(run: Tensor, reference: Tensor) -> Tensor:
    """The largest relative difference of losses and of norms ``[2]``."""
    return ((run - reference[: len(run)]).abs() / reference[: len(run)].abs()).amax(0)


def test_one_process_equals_plain_torch(runs: dict[str, Tensor]) -> None:
    one = runs["one process"]
    assert one[-1, 0] < 0.95 * one[0, 0], "the loss must fall, or equality says little"
    assert OPTIMIZER.clip_norm is not None and (one[:, 1] > OPTIMIZER.clip_norm).all(), "clipping must be active"
    assert difference(one, train_plainly()).max() < 1e-8


@pytest.mark.parametrize("name", [name for name in DOUBLE if name != "one process"])
def test_equals_one_process(runs: dict[str, Tensor], name: str) -> None:
    loss, norm = difference(runs[name], runs["one process"]).tolist()
    assert loss < 1e-8 and norm < 1e-8, f"loss differs by {loss:.1e}, gradient norm by {norm:.1e}"


@pytest.mark.parametrize("name", [name for name, case in SINGLE.items() if case.world > 1])
def test_equals_one_process_in_fp32(runs: dict[str, Tensor], name: str) -> None:
    """As close as one process is to itself under another split into micro-batches."""
    reference, *splits = (runs[name] for name, case in SINGLE.items() if case.world == 1)
    allowed = (4 * torch.stack([difference(split, reference) for split in splits]).amax(0)).clamp(min=1e-6)
    found = difference(runs[name], reference)
    assert (found <= allowed).all(), f"loss and norm differ by {found.tolist()}, allowed {allowed.tolist()}"


@pytest.mark.parametrize("what", LEFT_OUT)
def test_notices_what_is_left_out(runs: dict[str, Tensor], what: str) -> None:
    assert difference(runs[what], runs["one process"]).max() > 1e-6
