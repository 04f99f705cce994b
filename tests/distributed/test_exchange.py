"""What ranks of one row tell each other, values and gradients, against one process with ordinary autograd."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lmtrain.model.context import LocalContext
from lmtrain.ops import AffineOp, Cost, Documents, Span, ssd
from lmtrain.parallel.context import SequenceContext
from lmtrain.parallel.exchange import GatherSequence, Halo, PrefixState, from_heads, to_heads
from tests.distributed.ranks import Ranks

pytestmark = pytest.mark.distributed

BATCH, HEADS, STATE, DIM = 2, 4, 3, 2
worlds = pytest.mark.parametrize("world", [2, 3])


class MatrixScan(AffineOp):
    """``S_t = M_t S_{t-1} + k_t v_t^T, y_t = S_t^T k_t``: a matrix kind, whose state must be known before y.

    v ``[B,T,H,V]``, k ``[B,T,H,K]``, M ``[B,T,H,K,K]``.
    """

    name = "matrix_scan"
    kind = "matrix"
    needs_state = True

    def __call__(
        self, *inputs: Tensor | None, docs: Documents | None = None, initial_state: Tensor | None = None, **static: Any
    ) -> tuple[Tensor, Tensor]:
        v, k, m = inputs
        assert v is not None and k is not None and m is not None and docs is not None
        state = v.new_zeros(*k.shape[:1], *k.shape[2:], v.shape[-1]) if initial_state is None else initial_state
        y = []
        for t, start in enumerate(docs.starts().unbind(1)):
            state = torch.where(start[:, None, None, None], state.new_zeros(()), state)
            state = m[:, t] @ state + k[:, t, :, :, None] * v[:, t, :, None, :]
            y.append((k[:, t, :, None, :] @ state)[:, :, 0])
        return torch.stack(y, 1), state

    def gamma(self, *inputs: Tensor | None, docs: Documents | None = None) -> Tensor:
        m = inputs[2]
        assert m is not None and docs is not None
        product = m[:, 0]
        for t in range(1, m.shape[1]):
            product = m[:, t] @ product
        return torch.where(docs.starts().any(1)[:, None, None, None], product.new_zeros(()), product)

    def span(self, *inputs: Tensor | None, docs: Documents | None = None) -> Span:
        return Span(self.gamma(*inputs, docs=docs), self(*inputs, docs=docs)[1])

    def apply(self, gamma: Tensor, state: Tensor) -> Tensor:
        return gamma @ state

    def transpose(self, gamma: Tensor, grad: Tensor) -> Tensor:
        return gamma.mT @ grad

    def outer(self, grad: Tensor, state: Tensor) -> Tensor:
        return grad @ state.mT

    def step(self, *inputs: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def cost(self, *shapes: tuple[int, ...]) -> Cost:
        raise NotImplementedError


OPS: dict[str, AffineOp] = {"scalar": ssd, "matrix": MatrixScan()}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def told(outputs: dict[str, Tensor], leaves: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Outputs, and the gradients of a random functional of them (one that ``expected`` can repeat for every rank)."""
    total = sum((out * random(*out.shape, seed=seed + i)).sum() for i, out in enumerate(outputs.values()))
    grads = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    detached = {name: out.detach() for name, out in outputs.items()}
    return detached | {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        torch.testing.assert_close(got[name], want, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


# --- a case: the whole input, what a rank does with its shard, what one process does with all of it ---

Exchange = Callable[[dict[str, Tensor], dist.ProcessGroup], dict[str, Tensor]]
WHOLE = ("initial",)  # inputs every rank has whole; their gradient is a sum over ranks


def on_rank(exchange: Exchange, shards: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    rank = dist.get_rank()
    leaves = {name: leaf(tensor) for name, tensor in shards[rank].items()}
    assert dist.group.WORLD is not None
    return told(exchange(leaves, dist.group.WORLD), leaves, seed=100 * rank)


def compare(
    ranks: Ranks,
    exchange: Exchange,
    shards: list[dict[str, Tensor]],
    reference: Callable[[list[dict[str, Tensor]], int], dict[str, Tensor]],
) -> None:
    """``exchange`` on ranks against ``reference(all leaves, rank)``, what that rank must get."""
    got = ranks.run(len(shards), on_rank, exchange, shards)
    leaves = [{name: leaf(tensor) for name, tensor in shard.items() if name not in WHOLE} for shard in shards]
    shared = {name: leaf(tensor) for name, tensor in shards[0].items() if name in WHOLE}
    total = torch.zeros((), dtype=torch.float64)
    for rank, found in enumerate(got):
        outputs = reference([{**mine, **shared} for mine in leaves], rank)
        total = total + sum(
            (out * random(*out.shape, seed=100 * rank + i)).sum() for i, out in enumerate(outputs.values())
        )
        assert_equal({name: found[name] for name in outputs}, outputs)
    for rank, mine in enumerate(leaves):
        grads = torch.autograd.grad(total, list(mine.values()), retain_graph=True)
        expected = {f"grad_{name}": grad for name, grad in zip(mine, grads, strict=True)}
        assert_equal({name: got[rank][name] for name in expected}, expected)
    for name, tensor in shared.items():
        (expected_grad,) = torch.autograd.grad(total, tensor, retain_graph=True)
        assert_equal({name: got[0][f"grad_{name}"]}, {name: expected_grad})  # whole on the first rank
        assert all((other[f"grad_{name}"] == 0).all() for other in got[1:])


def prefix(kind: str, leaves: dict[str, Tensor], group: dist.ProcessGroup) -> dict[str, Tensor]:
    incoming, final = PrefixState.apply(OPS[kind], group, leaves["gamma"], leaves["state"], leaves.get("initial"))
    return {"incoming": incoming, "final": final}


@worlds
@pytest.mark.parametrize("kind", OPS)
@pytest.mark.parametrize("initial", [True, False], ids=["initial", "none"])
def test_prefix_state(ranks: Ranks, world: int, kind: str, initial: bool) -> None:
    """The last output, the row's final state, is the same on all ranks, and so is its gradient's sum."""
    shape = (BATCH, HEADS, STATE, DIM)
    shards = []
    for rank in range(world):
        gamma = random(*shape[:2], *((STATE, STATE) if kind == "matrix" else ()), seed=10 + rank)
        gamma[rank % BATCH] = 0  # a document starts here in this row
        shards.append({"gamma": gamma, "state": random(*shape, seed=20 + rank)})
        if initial:
            shards[-1]["initial"] = random(*shape, seed=30)

    def reference(leaves: list[dict[str, Tensor]], rank: int) -> dict[str, Tensor]:
        entering = [leaves[0]["initial"] if initial else torch.zeros(shape, dtype=torch.float64)]
        for one in leaves:
            gamma, state = one["gamma"], entering[-1]
            moved = gamma @ state if kind == "matrix" else gamma[..., None, None] * state
            entering.append(moved + one["state"])
        return {"incoming": entering[rank], "final": entering[-1]}

    compare(ranks, partial(prefix, kind), shards, reference)


def halo(leaves: dict[str, Tensor], group: dist.ProcessGroup) -> dict[str, Tensor]:
    left, last = Halo.apply(leaves["x"], 3, leaves.get("initial"), group)
    return {"left": left, "last": last}


@worlds
@pytest.mark.parametrize("length", [3, 5])  # 3: the shard is all halo
@pytest.mark.parametrize("tail", [True, False], ids=["tail", "none"])
def test_halo(ranks: Ranks, world: int, length: int, tail: bool) -> None:
    shards = [{"x": random(BATCH, length, DIM, seed=rank)} for rank in range(world)]
    if tail:
        shards = [shard | {"initial": random(BATCH, 3, DIM, seed=30)} for shard in shards]

    def reference(leaves: list[dict[str, Tensor]], rank: int) -> dict[str, Tensor]:
        first = leaves[0]["initial"] if tail else torch.zeros(BATCH, 3, DIM, dtype=torch.float64)
        row = torch.cat([first, *(one["x"] for one in leaves)], dim=1)
        return {"left": row[:, rank * length : rank * length + 3], "last": row[:, -3:]}

    compare(ranks, halo, shards, reference)


def gather(leaves: dict[str, Tensor], group: dist.ProcessGroup) -> dict[str, Tensor]:
    return {"row": GatherSequence.apply(leaves["x"], group)}


@worlds
def test_gather_sequence(ranks: Ranks, world: int) -> None:
    shards = [{"x": random(BATCH, 5, HEADS, DIM, seed=rank)} for rank in range(world)]
    compare(ranks, gather, shards, lambda leaves, rank: {"row": torch.cat([one["x"] for one in leaves], dim=1)})


def heads_there_and_back(leaves: dict[str, Tensor], group: dist.ProcessGroup) -> dict[str, Tensor]:
    q, k = to_heads([leaves["q"], leaves["k"]], group)
    return {"q": q, "k": k, "back": from_heads(q * q, group)}


@worlds
def test_heads(ranks: Ranks, world: int) -> None:
    """q has twice the heads of k and another width; ``back`` is what each rank computed from its heads."""
    shards = [
        {"q": random(BATCH, 5, 2 * world, 3, seed=rank), "k": random(BATCH, 5, world, 2, seed=10 + rank)}
        for rank in range(world)
    ]

    def reference(leaves: list[dict[str, Tensor]], rank: int) -> dict[str, Tensor]:
        row = {name: torch.cat([one[name] for one in leaves], dim=1) for name in ("q", "k")}
        mine = {name: tensor.chunk(world, dim=2)[rank] for name, tensor in row.items()}
        return mine | {"back": leaves[rank]["q"].square()}

    compare(ranks, heads_there_and_back, shards, reference)


# --- the context: an op of each kind over a cut row ---


def inputs(kind: str, length: int) -> dict[str, Tensor]:
    shape = (BATCH, length, HEADS)
    if kind == "scalar":
        decay, groups = -random(*shape, seed=2).abs() / 3, (BATCH, length, 2, STATE)
        keys = {"log_a": decay, "b": random(*groups, seed=3), "c": random(*groups, seed=4)}
    else:
        keys = {"k": random(*shape, STATE, seed=2), "m": random(*shape, STATE, STATE, seed=3) / 2}
    return {"x": random(*shape, DIM, seed=1), **keys}


def scan_on_rank(kind: str, docs: Documents, whole: dict[str, Tensor], initial: Tensor) -> dict[str, Tensor]:
    group = dist.group.WORLD
    assert group is not None
    leaves = {name: leaf(t.chunk(group.size(), dim=1)[group.rank()]) for name, t in whole.items()}
    leaves["initial"] = leaf(initial)
    *given, start = leaves.values()
    ctx = SequenceContext(docs.cut(group.rank(), group.size()), group, "auto")
    y, final = ctx.scan(OPS[kind], *given, initial_state=start)
    weights = random(*docs.shape, HEADS, DIM, seed=5).chunk(group.size(), dim=1)[group.rank()]
    total = (y * weights).sum() + (final * random(*final.shape, seed=6)).sum() / group.size()
    grads = torch.autograd.grad(total, list(leaves.values()))
    return {"y": y.detach(), "final": final.detach()} | dict(zip(leaves, grads, strict=True))


@worlds
@pytest.mark.parametrize("kind", OPS)
@pytest.mark.parametrize("length", [1, 4])
def test_scan_of_a_cut_row(ranks: Ranks, world: int, kind: str, length: int) -> None:
    """One column a shard and more; one row starts a document at the first shard edge, the other never does."""
    total_length = world * length
    ids = torch.zeros(BATCH, total_length, dtype=torch.int32)
    ids[0, length:] = 1
    docs = Documents.from_ids(ids, torch.tensor([2, 1]))
    whole, initial = inputs(kind, total_length), random(BATCH, HEADS, STATE, DIM, seed=7)
    got = ranks.run(world, scan_on_rank, kind, docs, whole, initial)

    leaves = {name: leaf(t) for name, t in {**whole, "initial": initial}.items()}
    *given, start = leaves.values()
    y, final = LocalContext(docs).scan(OPS[kind], *given, initial_state=start)
    total = (y * random(*y.shape, seed=5)).sum() + (final * random(*final.shape, seed=6)).sum()
    grads = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    assert_equal({"y": torch.cat([one["y"] for one in got], dim=1)}, {"y": y.detach()})
    for one in got:
        assert_equal({"final": one["final"]}, {"final": final.detach()})
    for name, expected in grads.items():
        parts = [one[name] for one in got]
        found = torch.stack(parts).sum(0) if name == "initial" else torch.cat(parts, dim=1)
        assert_equal({name: found}, {name: expected})


def no_shorter_halo(width: int) -> str:
    group = dist.group.WORLD
    assert group is not None
    docs = Documents.from_ids(torch.zeros(1, 4, dtype=torch.int32)).cut(group.rank(), 2)
    try:
        SequenceContext(docs, group, "auto").halo(torch.zeros(1, 2, 1), width, None)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_shard_shorter_than_the_halo_is_refused(ranks: Ranks) -> None:
    for message in ranks.run(2, no_shorter_halo, 3):
        assert message == "UsageError: sp: a shard of 2 columns is shorter than the 3 a convolution looks back"
