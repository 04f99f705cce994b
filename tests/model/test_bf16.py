"""Every branch computed in bf16, as the trainer casts it, beside the same branch in fp32; documents in bf16.

A branch in bf16 is held to what rounding its matrices alone does to it in fp32: where a gradient is the small rest of
large terms, as of keys in front of a norm over three channels or of a decay, both are far off, by 17 % at the worst.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path

from lmtrain.model.branch import Branch, Place, State
from lmtrain.model.context import LocalContext
from lmtrain.model.mixers.rg_lru import RGLRU
from lmtrain.ops.documents import Documents
from tests.model.parity import Named, perturbed, random
from tests.model.row_checks import BRANCHES, D_MODEL, documents

every_branch = pytest.mark.parametrize("name", BRANCHES)
TAILS = {"conv", "q_conv", "k_conv", "v_conv", "shift", "k", "v"}
"""Carried in the dtype of x: columns that convolutions and token shifts look back on, keys and values of softmax."""
NOISE = 0.005
"""Of bf16 products themselves, relative RMS: the worst output of a plain MLP, 0.0054, of which rounding is half."""
FACTOR, FACTORS = 4.0, {"rwkv6": 7.0, "rwkv7": 6.0, "mom_alone": 6.0}
"""By which errors may exceed those of rounding alone plus ``NOISE``. Measured: at most 1.7, but 2.8 in RWKV-6 and 2.4
in RWKV-7, whose rates pass two exponentials or three products of rounded numbers, 2.2 in a memory that few tokens
use."""
OUTPUT, OUTPUTS = 0.025, {"rwkv6": 0.045}
"""Relative RMS of the output itself. Measured: 0.0027 to 0.0115, 0.0174 in RWKV-6."""


def build(name: str, *, rounded: bool, dtype: torch.dtype) -> Branch:
    """In fp32; rounded: what does not stay fp32 in the trainer, to bf16, and then kept as ``dtype``."""
    branch = perturbed(BRANCHES[name], D_MODEL, torch.float32, Place(1, 4))
    modules = [module for module in branch.modules() if getattr(module, "keeps_fp32", False)]
    exact = {parameter for module in modules for parameter in module.parameters()}
    for parameter in set(branch.parameters()) - exact:
        if rounded:
            parameter.data = parameter.data.bfloat16().to(dtype)
    return branch


def row() -> Tensor:
    """Numbers that bf16 has."""
    return random(*documents().shape, D_MODEL, dtype=torch.float32, seed=0).bfloat16()


def run(branch: Branch, x: Tensor) -> tuple[Named, State]:
    """y, the gradients of x and of every parameter, and the state after the row."""
    x = x.detach().requires_grad_()
    y, state, _ = branch(x, LocalContext(documents(), carries=True), {}, {})
    weights = random(*y.shape, dtype=torch.float32, seed=3).bfloat16().to(y.dtype)
    named = {"x": x, **dict(branch.named_parameters())}
    grads = torch.autograd.grad(y, list(named.values()), weights, materialize_grads=True)
    return {"y": y.detach(), **dict(zip(named, grads, strict=True))}, state


def relative_rms(got: Tensor, expected: Tensor) -> float:
    """A gradient that is nearly 0, as of a query that sees one key, counts as one of 1e-3."""
    scale = expected.square().mean().sqrt().clamp(min=1e-3)
    return float((got.float() - expected).square().mean().sqrt() / scale)


@every_branch
def test_bf16_is_near_fp32(name: str) -> None:
    exact, _ = run(build(name, rounded=False, dtype=torch.float32), row().float())
    rounded, _ = run(build(name, rounded=True, dtype=torch.float32), row().float())
    branch = build(name, rounded=True, dtype=torch.bfloat16)
    got, state = run(branch, row())
    wide = {parameter for parameter, info in branch.param_info().items() if info.fp32}
    for found, value in got.items():
        assert value.dtype == (torch.float32 if found in wide else torch.bfloat16), found
        assert value.isfinite().all(), found
        error, allowed = (relative_rms(t, exact[found]) for t in (value, rounded[found]))
        allowed = FACTORS.get(name, FACTOR) * (allowed + NOISE)
        assert error < allowed, f"{found}: relative RMS {error:.4f}, allowed {allowed:.4f}"
    assert relative_rms(got["y"], exact["y"]) < OUTPUTS.get(name, OUTPUT)
    for path, leaf in tree_flatten_with_path(state)[0]:
        if leaf.is_floating_point():
            assert leaf.dtype == (torch.bfloat16 if path[-1].key in TAILS else torch.float32), path


@every_branch
def test_documents_are_independent_in_bf16(name: str) -> None:
    """Of what stands before the last document of each row, its outputs keep their bits, and have gradients of 0."""
    branch, docs = build(name, rounded=True, dtype=torch.bfloat16), documents()
    own = (docs.ids == docs.ids[:, -1:])[..., None]
    x = row().requires_grad_()
    y, _, _ = branch(x, LocalContext(docs), {}, {})
    (grad,) = torch.autograd.grad(torch.where(own, y, 0).sum(), x)
    assert (grad[~own.expand_as(grad)] == 0).all() and (grad[own.expand_as(grad)] != 0).any()
    other, _, _ = branch(torch.where(own, x, x.flip(0) - 1), LocalContext(docs), {}, {})
    assert torch.equal(torch.where(own, other, 0), torch.where(own, y, 0))


def test_gates_of_rg_lru_are_those_of_fp32() -> None:
    """To the bit, for the same input: an error of its gate would be one of the decay of every later token."""
    u = random(*documents().shape, 12, dtype=torch.float32, seed=4).bfloat16()
    starts = documents().starts()
    exact, branch = (build("rg_lru", rounded=rounded, dtype=torch.bfloat16) for rounded in (False, True))
    assert isinstance(exact, RGLRU) and isinstance(branch, RGLRU)
    for got, expected in zip(branch.gates(u, starts), exact.gates(u.float(), starts), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["mamba2", "gated_deltanet", "kda"])
def test_a_long_row_decays_as_in_fp32(name: str) -> None:
    """By exp(-3) to exp(-6) over tokens of zeros: a step, or its product with the rate, that was rounded to bf16 would
    be off by up to 2^-9 in the same direction at every token. What a row writes does not depend on its state."""
    length, branch = 1024, build(name, rounded=True, dtype=torch.bfloat16)
    A_log, dt_bias = (branch.get_parameter(f"decay.{each}") for each in ("A_log", "dt_bias"))
    (kept,) = branch.state_shapes().keys() - TAILS
    shape = branch.state_shapes()[kept]
    docs = Documents.from_ids(torch.zeros(1, length, dtype=torch.int32), torch.tensor([1]))
    x = torch.zeros(1, length, D_MODEL, dtype=torch.bfloat16)
    before = 100 * random(1, *shape, dtype=torch.float32, seed=5)
    with torch.no_grad():
        dt_bias.copy_(torch.linspace(-3.1, -2.9, len(dt_bias)))  # steps of 0.044 to 0.054
        A_log.copy_((torch.linspace(3, 6, len(A_log)) / (0.049 * length)).log())
        after, written = (
            branch(x, LocalContext(docs, carries=True), {kept: each}, {})[1][kept] for each in (before, 0 * before)
        )
        steps = F.softplus(dt_bias.double()).view(shape[0], -1)  # of heads, or of their key channels
        decay = (-length * A_log.double().exp()[:, None] * steps).exp()[..., None]
    torch.testing.assert_close((after - written).double(), decay * before, rtol=1e-4, atol=0)
