"""Mixture of memories: its definition over each memory's own tokens, small cases by hand, routing, initial values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lmtrain.errors import UsageError
from lmtrain.model.branch import Branch, Place
from lmtrain.model.context import LocalContext
from lmtrain.model.mixers.gated_deltanet import GatedDeltaNetConfig
from lmtrain.model.mixers.mom import MoM, best
from lmtrain.model.mixers.mom_settings import MoMConfig
from lmtrain.ops.documents import Documents
from tests.model.parity import (
    BATCH,
    LENGTH,
    Named,
    assert_normal,
    assert_recurrence,
    assert_same,
    assert_uniform,
    forward,
    initial,
    perturbed,
    random,
    results,
)

D_MODEL, HEADS, KEY_DIM, VALUE_DIM = 24, 3, 4, 5
SIZES: dict[str, Any] = {"num_heads": HEADS, "head_dim": KEY_DIM, "value_dim": VALUE_DIM, "conv_width": 3}


def mixed(x: Tensor, matrix: Tensor, taps: Tensor) -> Tensor:
    """The short convolution over the tokens ``[T, D]`` of one memory of what the matrix gives, by head."""
    padded = F.pad(x @ matrix.T, (0, 0, taps.shape[1] - 1, 0))
    y = sum(padded[tap : tap + x.shape[0]] * taps[:, tap] for tap in range(taps.shape[1]))
    return F.silu(torch.as_tensor(y)).unflatten(-1, (HEADS, -1))


def unit(t: Tensor) -> Tensor:
    return t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def gated_delta_rule(v: Tensor, q: Tensor, k: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    """One row ``[T, H, *]`` of the tokens of one memory."""
    state, outputs = torch.zeros(HEADS, KEY_DIM, VALUE_DIM, dtype=v.dtype), []
    for t in range(len(v)):
        state = g[t].exp()[:, None, None] * state
        error = v[t] - torch.einsum("hkv,hk->hv", state, k[t])
        state = state + torch.einsum("hk,hv->hkv", beta[t][:, None] * k[t], error)
        outputs.append(torch.einsum("hkv,hk->hv", state, q[t]))
    return torch.stack(outputs) if outputs else v


def definition(cfg: MoMConfig, p: Named, x: Tensor) -> Tensor:
    """Each memory's convolutions and recurrence run over the list of its tokens, and over no other."""
    scores = (x @ p["router.weight"].T).softmax(-1)
    weights, chosen = scores.topk(cfg.top_k, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    rows = []
    for row in range(x.shape[0]):
        total = x.new_zeros(x.shape[1], HEADS, VALUE_DIM)
        for e in range(cfg.memories):
            of = {name: p[f"memories.{e}.{name}.weight"] for name in ("k", "v", "beta", "a")}
            if e < cfg.num_memories:
                tokens, slots = (chosen[row] == e).nonzero(as_tuple=True)
                weight = weights[row, tokens, slots]
            else:
                tokens, weight = torch.arange(x.shape[1]), x.new_ones(x.shape[1])
            mine = x[row, tokens]
            q = unit(mixed(mine, p["q.weight"], p["q_conv.weight"])) / math.sqrt(KEY_DIM)
            k = unit(mixed(mine, of["k"], p["k_conv.weight"]))
            v = mixed(mine, of["v"], p["v_conv.weight"])
            beta = torch.sigmoid(mine @ of["beta"].T)
            g = -p["decay.A_log"].exp() * F.softplus(mine @ of["a"].T + p["decay.dt_bias"])
            y = gated_delta_rule(v, q, k, beta, g)
            total = total.index_add(0, tokens, weight[:, None, None] * y)
        rows.append(total)
    y = torch.stack(rows)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5) * p["out.norm.weight"]
    return (y.flatten(2) * F.silu(x @ p["out.gate.0.weight"].T)) @ p["out.o.weight"].T


@pytest.mark.parametrize(
    ("num_memories", "top_k", "shared"), [(4, 2, True), (5, 2, False), (3, 3, True), (6, 4, False)], ids=str
)
def test_mom_is_its_definition(num_memories: int, top_k: int, shared: bool) -> None:
    cfg = MoMConfig(num_memories=num_memories, top_k=top_k, shared_memory=shared, aux_weight=0.0, **SIZES)
    assert_recurrence(cfg, D_MODEL, lambda p, x: definition(cfg, p, x))


def test_one_memory_is_a_gated_delta_rule() -> None:
    branch = perturbed(MoMConfig(num_memories=1, top_k=1, shared_memory=False, **SIZES), D_MODEL, torch.float64)
    peer = perturbed(GatedDeltaNetConfig(**SIZES), D_MODEL, torch.float64)
    theirs = {name: renamed(name) for name, _ in branch.named_parameters() if name != "router.weight"}
    peer.load_state_dict({name: branch.get_parameter(ours) for ours, name in theirs.items()})
    told = results(branch, lambda x: forward(branch, x), D_MODEL, torch.float64)
    expected = results(peer, lambda x: forward(peer, x), D_MODEL, torch.float64)
    got = {theirs.get(name, name): value for name, value in told.items() if name != "router.weight"}
    assert_same(got, expected, 1e-12)


def renamed(name: str) -> str:
    """The name that GatedDeltaNet has for a parameter of a single memory."""
    name = name.removeprefix("memories.0.")
    return name if name.startswith(("a.", "decay.", "out.")) else f"inputs.{name}"


def by_hand() -> MoM:
    """One head of one channel, two memories and the shared one. x is (side, size): a positive side uses memory 0.

    Keys are 1, values silu(size), convolutions nothing, beta 1/2, no decay: a memory moves halfway to each value.
    """
    cfg = MoMConfig(num_memories=2, top_k=1, num_heads=1, head_dim=1, value_dim=1, conv_width=2, aux_weight=0.0)
    branch = MoM(cfg, 2, Place(0, 1)).double()
    with torch.no_grad():
        for name, parameter in branch.named_parameters():
            parameter.zero_()
            if name.endswith("_conv.weight"):
                parameter[:, -1] = 1
            elif name.endswith(".v.weight"):
                parameter[0, 1] = 1
            elif name == "q.weight" or name.endswith(".k.weight"):
                parameter[0, 1] = 1e6  # of unit length afterwards
        branch.router.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        branch.decay.A_log.fill_(-100.0)
    return branch


def after(branch: Branch, x: Tensor, ids: list[int]) -> Tensor:
    """States of the three memories after one row."""
    ctx = LocalContext(Documents.from_ids(torch.tensor([ids])), carries=True)
    return branch(x[None], ctx, {}, {})[1]["delta"].flatten()


def test_every_memory_keeps_its_own_tokens() -> None:
    branch = by_hand()
    side, size = torch.tensor([1.0, -1, 1, 1, -1]), torch.tensor([1.0, 2, 3, 4, 5])
    x = torch.stack([side, size], dim=-1).double()
    a, b, c, d, e = F.silu(size.double())
    first, second = a / 8 + c / 4 + d / 2, b / 4 + e / 2
    shared = a / 32 + b / 16 + c / 8 + d / 4 + e / 2
    torch.testing.assert_close(after(branch, x, [0] * 5), torch.stack([first, second, shared]), rtol=1e-9, atol=0)


def test_a_document_starts_every_memory_anew() -> None:
    """Also those that its first token does not use."""
    branch = by_hand()
    side, size = torch.tensor([1.0, -1, 1, 1, -1]), torch.tensor([1.0, 2, 3, 4, 5])
    x = torch.stack([side, size], dim=-1).double()
    c, d, e = F.silu(size.double())[2:]
    expected = torch.stack([c / 4 + d / 2, e / 2, c / 8 + d / 4 + e / 2])
    torch.testing.assert_close(after(branch, x, [0, 0, 1, 1, 1]), expected, rtol=1e-9, atol=0)
    expected = torch.stack([x.new_zeros(()), e / 2, e / 2])
    torch.testing.assert_close(after(branch, x, [0, 0, 1, 1, 2]), expected, rtol=1e-9, atol=0)


def test_a_token_does_not_reach_memories_that_it_does_not_use() -> None:
    """Not through taps of any size either; nor do their parameters get a gradient from it."""
    branch = by_hand()
    with torch.no_grad():
        for conv in (branch.q_conv, branch.k_conv, branch.v_conv):
            conv.weight.copy_(random(*conv.weight.shape, dtype=torch.float64, seed=3))
    x = torch.tensor([[1.0, 1], [-1, 2], [1, 3]], dtype=torch.float64, requires_grad=True)
    states = after(branch, x, [0, 0, 0])
    for memory, users in enumerate(([0, 2], [1], [0, 1, 2])):
        (grad,) = torch.autograd.grad(states[memory], x, retain_graph=True)
        assert (grad != 0).any(-1).nonzero().flatten().tolist() == users
    ctx = LocalContext(Documents.from_ids(torch.zeros(1, 1, dtype=torch.int32)))
    y, _, _ = branch(x[None, :1], ctx, {}, {})
    idle = torch.autograd.grad(y.sum(), list(branch.memories[1].parameters()))
    assert all((grad == 0).all() for grad in idle)


@pytest.mark.parametrize("shared", [False, True])
def test_a_token_sees_those_that_use_its_memories(shared: bool) -> None:
    """Through taps and decays of any size: the tokens before it, in its document, with a memory in common, and no
    other."""
    cfg = MoMConfig(num_memories=5, top_k=2, shared_memory=shared, aux_weight=0.0, **SIZES)
    branch = perturbed(cfg, D_MODEL, torch.float64)
    assert isinstance(branch, MoM)
    x = random(1, 24, D_MODEL, dtype=torch.float64, seed=1).requires_grad_()
    ids = torch.tensor([[0] * 9 + [1] * 15])
    y, _, _ = branch(x, LocalContext(Documents.from_ids(ids)), {}, {})
    used = best((x @ branch.get_parameter("router.weight").T).softmax(-1), cfg.top_k)[0].float()
    common = torch.ones(24, 24, dtype=torch.bool) if shared else used @ used.T > 0
    assert shared or not common.all()
    expected = (common & (ids == ids.T)).tril()
    scored = (y[0] * random(24, D_MODEL, dtype=torch.float64, seed=2)).sum(-1)
    for t in range(24):
        (grad,) = torch.autograd.grad(scored[t], x, retain_graph=True)
        assert torch.equal((grad[0] != 0).any(-1), expected[t]), f"token {t}"


def test_taps_reach_back_along_the_tokens_of_a_memory() -> None:
    """Sides are + - + + -, taps 1/2 and 1: values are silu of c + a / 2, of e + b / 2, in all of d + c / 2."""
    branch = by_hand()
    with torch.no_grad():
        branch.v_conv.weight[:, 0] = 0.5
    side, size = torch.tensor([1.0, -1, 1, 1, -1]), torch.tensor([1.0, 2, 3, 4, 5])
    x = torch.stack([side, size], dim=-1).double()

    def halfway(*values: float) -> Tensor:
        """The state after values, each of which it moves halfway to."""
        state = x.new_zeros(())
        for value in values:
            state = (state + F.silu(torch.tensor(value).double())) / 2
        return state

    expected = torch.stack([halfway(1, 3.5, 5.5), halfway(2, 6), halfway(1, 2.5, 4, 5.5, 7)])
    torch.testing.assert_close(after(branch, x, [0] * 5), expected, rtol=1e-9, atol=0)
    # a document that starts at c: its first token in each memory has nothing before it
    expected = torch.stack([halfway(3, 5.5), halfway(5), halfway(3, 5.5, 7)])
    torch.testing.assert_close(after(branch, x, [0, 0, 1, 1, 1]), expected, rtol=1e-9, atol=0)


def test_ties_use_the_first() -> None:
    assert best(torch.tensor([[0.2, 0.3, 0.3, 0.2], [1.0, 1.0, 1.0, 1.0]]), 3).tolist() == [
        [True, True, True, False],
        [True, True, True, False],
    ]


@pytest.mark.parametrize("top_k", [1, 2])
def test_balancing_loss(top_k: int) -> None:
    """Per row: memories' share of the uses times their mean score; 1 per token and unit of weight if all are alike."""
    cfg = MoMConfig(num_memories=3, top_k=top_k, aux_weight=0.5, **SIZES)
    branch = perturbed(cfg, D_MODEL, torch.float64)
    x = random(BATCH, LENGTH, D_MODEL, dtype=torch.float64, seed=1)
    router = branch.get_parameter("router.weight")

    def told() -> tuple[Tensor, LocalContext]:
        ctx = LocalContext(Documents.from_ids(torch.zeros(BATCH, LENGTH, dtype=torch.int32)))
        return branch(x, ctx, {}, {})[0], ctx

    y, ctx = told()
    scores = (x @ router.T).softmax(-1)
    chosen = F.one_hot(scores.topk(top_k, dim=-1).indices, 3).sum(2).double()
    share = chosen.sum(1) / (LENGTH * top_k)
    expected = 0.5 * 3 * LENGTH * (share * scores.mean(1)).sum()
    torch.testing.assert_close(ctx.losses[0, "balance"], expected.detach())
    (grad,) = torch.autograd.grad((y * 0).sum(), router)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, router)[0])
    with torch.no_grad():
        router.zero_()
        assert told()[1].losses[0, "balance"].item() == pytest.approx(0.5 * BATCH * LENGTH)


def test_initial_values() -> None:
    """Matrices Glorot-uniform with gain 2^-2.5, convolutions N(0, 0.02^2), decays as Gated DeltaNet's."""
    d_model, heads, key_dim, value_dim = 128, 32, 4, 6
    cfg = MoMConfig(num_heads=heads, head_dim=key_dim, value_dim=value_dim)
    widths = {"q": heads * key_dim, "k": heads * key_dim, "v": heads * value_dim, "beta": heads, "a": heads}
    widths |= {"out.o": heads * value_dim, "out.gate.0": heads * value_dim, "router": 4}
    for name, drawn in initial(cfg, d_model).items():
        plain = name.removesuffix(".weight")
        plain = plain.split(".")[-1] if plain.startswith("memories.") else plain
        if plain in widths:
            assert_uniform(drawn, 2**-2.5 * math.sqrt(6 / (d_model + widths[plain])))
        elif name.endswith("_conv.weight"):
            assert_normal(drawn, 0.02)
        elif name == "out.norm.weight":
            assert (drawn == 1).all()
        elif name == "decay.A_log":
            assert 0.01 <= drawn.exp().min() < 4 and 12 < drawn.exp().max() <= 16
        else:
            step = F.softplus(drawn)
            assert name == "decay.dt_bias" and 0.99e-3 < step.min() < 4e-3 and 0.03 < step.max() < 0.101


def test_model_flops_count_the_memories_used() -> None:
    """The shared one among them; the scan executes all."""
    cost = MoMConfig(num_memories=7, top_k=1, **SIZES).scan_cost(D_MODEL, 10)
    two = MoMConfig(num_memories=2, top_k=2, shared_memory=False, **SIZES).scan_cost(D_MODEL, 10)
    assert cost.model_flops == two.model_flops and cost.executed_flops == 4 * two.executed_flops


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: MoMConfig(num_memories=2, top_k=3), "mom: top_k: expected at most num_memories 2, got 3"),
        (lambda: MoMConfig(top_k=0), "mom: top_k: expected at least 1, got 0"),
        (lambda: MoMConfig(conv_width=1), "mom: conv_width: expected 2 to 16, got 1"),
        (lambda: MoMConfig(aux_weight=-0.1), "mom: aux_weight: expected at least 0, got -0.1"),
    ],
)
def test_settings_that_cannot_work(make, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError) as caught:
        make()
    assert str(caught.value) == says
