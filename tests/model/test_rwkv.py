"""RWKV's time and channel mixing against transformers or their equations token by token; initial values; lr factors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import RwkvConfig
from transformers.models.rwkv.modeling_rwkv import RwkvFeedForward, RwkvSelfAttention

from lmtrain.errors import UsageError
from lmtrain.model.branch import Branch, Place, branch_class
from lmtrain.model.context import LocalContext
from lmtrain.model.ffn.rwkv_channel import RWKVChannelConfig
from lmtrain.model.mixers.rwkv4 import RWKV4Config
from lmtrain.model.mixers.rwkv6 import RWKV6Config
from lmtrain.model.mixers.rwkv7 import RWKV7Config
from lmtrain.ops.documents import Documents
from tests.model.parity import (
    LENGTH,
    Named,
    assert_recurrence,
    assert_same,
    assert_uniform,
    forward,
    initial,
    perturbed,
    results,
)

D_MODEL, HEADS = 24, 3
FIRST, LATER = Place(0, 4, 0, 2), Place(2, 4, 1, 2)
RWKV7 = RWKV7Config(head_dim=8, decay_rank=4, rate_rank=5, value_rank=3, gate_rank=6)


THEIRS = {"k": "key", "v": "value", "r": "receptance", "o": "output"}


def assert_same_as_peer(branch: Branch, peer: nn.Module, mixes: str, matrices: str, others: dict[str, str]) -> None:
    """As ``parity.assert_peer``; our mix is the share of the previous token, theirs of the current one."""
    renamed = {f"{name}.weight": f"{THEIRS[name]}.weight" for name in matrices} | others

    def mixed(values: Tensor) -> Named:
        return {f"time_mix_{THEIRS[name]}": value.view(1, 1, -1) for name, value in zip(mixes, values, strict=True)}

    weights = {theirs: branch.get_parameter(ours) for ours, theirs in renamed.items()}
    peer.load_state_dict(weights | mixed(1 - branch.get_parameter("mix.weight")))
    told = results(branch, lambda x: forward(branch, x), D_MODEL, torch.float32)
    got = {theirs: told[ours] for ours, theirs in renamed.items()} | mixed(-told["mix.weight"])
    expected = results(peer, lambda x: peer(x)[0], D_MODEL, torch.float32)
    assert_same(got | {name: told[name] for name in ("y", "x")}, expected, 1e-4)


def test_rwkv4_is_the_one_of_transformers() -> None:
    peer = RwkvSelfAttention(RwkvConfig(hidden_size=D_MODEL, num_hidden_layers=2))
    others = {f"decay.{name}": name for name in ("time_decay", "time_first")}
    assert_same_as_peer(perturbed(RWKV4Config(), D_MODEL, torch.float32), peer, "kvr", "kvro", others)


def test_channel_mixing_4_is_the_one_of_transformers() -> None:
    peer = RwkvFeedForward(RwkvConfig(hidden_size=D_MODEL, num_hidden_layers=2, intermediate_size=40))
    branch = perturbed(RWKVChannelConfig(40, version="4"), D_MODEL, torch.float32)
    assert_same_as_peer(branch, peer, "kr", "kvr", {})


def shifted(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 1, 0))[:, :-1]


def head_norm(y: Tensor, p: Named) -> Tensor:
    """GroupNorm of ``[B, T, H, V]``, flat."""
    flat = y.flatten(2)
    normed = F.group_norm(flat.flatten(0, 1), y.shape[2], p["norm.weight"], p["norm.bias"], 64e-5)
    return normed.view_as(flat)


def rwkv6(p: Named, x: Tensor) -> Tensor:
    dx = shifted(x) - x
    inner = torch.tanh((x + dx * p["mix_x"]) @ p["mix_in"]).unflatten(-1, (5, -1))
    x_w, x_k, x_v, x_r, x_g = (x + dx * (p["mix"][i] + inner[:, :, i] @ p["mix_out"][i]) for i in range(5))
    w = torch.exp(-torch.exp(p["decay.time_decay"] + torch.tanh(x_w @ p["decay_in"]) @ p["decay_out"]))
    r, k, v = x_r @ p["r.weight"].T, x_k @ p["k.weight"].T, x_v @ p["v.weight"].T
    r, k, v, w = (t.unflatten(-1, (HEADS, -1)) for t in (r, k, v, w))
    state, outputs = torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None]), []
    for t in range(x.shape[1]):
        kv = k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state + p["decay.bonus"][:, :, None] * kv, r[:, t]))
        state = w[:, t, :, :, None] * state + kv
    y = head_norm(torch.stack(outputs, dim=1), p)
    return (y * F.silu(x_g @ p["gate.weight"].T)) @ p["o.weight"].T


@pytest.mark.parametrize("place", [FIRST, LATER], ids=["first", "later"])
def test_rwkv6_is_its_recurrence(place: Place) -> None:
    assert_recurrence(RWKV6Config(head_dim=8, mix_rank=5, decay_rank=4), D_MODEL, rwkv6, place)


def rwkv7(p: Named, x: Tensor, v_first: Tensor | None) -> tuple[Tensor, Tensor]:
    """The output, and the values that later layers mix in."""
    dx = shifted(x) - x
    x_r, x_w, x_k, x_v, x_a, x_g = (x + dx * mu for mu in p["mix.weight"])
    r, k, v = x_r @ p["r.weight"].T, x_k @ p["k.weight"].T, x_v @ p["v.weight"].T
    raw = p["decay.weight"] + torch.tanh(x_w @ p["decay_raw.inner"]) @ p["decay_raw.outer"]
    w = torch.exp(-math.exp(-0.5) * torch.sigmoid(raw))
    if v_first is None:
        v_first = v
    else:
        share = torch.sigmoid(p["value.weight"] + x_v @ p["value_raw.inner"] @ p["value_raw.outer"])
        v = v + (v_first - v) * share
    a = torch.sigmoid(p["rate.weight"] + x_a @ p["rate_raw.inner"] @ p["rate_raw.outer"])
    g = torch.sigmoid(x_g @ p["gate.inner"]) @ p["gate.outer"]
    kappa, key = k * p["k_k"], k * (1 + (a - 1) * p["k_a"])
    r, v, w, a, kappa, key = (t.unflatten(-1, (HEADS, -1)) for t in (r, v, w, a, kappa, key))
    kappa = kappa / kappa.norm(dim=-1, keepdim=True)
    state, outputs = torch.zeros_like(key[:, 0, :, :, None] * v[:, 0, :, None]), []
    for t in range(x.shape[1]):
        read = torch.einsum("bhkv,bhk->bhv", state, kappa[:, t])
        state = w[:, t, :, :, None] * state - (kappa * a)[:, t, :, :, None] * read[:, :, None]
        state = state + key[:, t, :, :, None] * v[:, t, :, None]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, r[:, t]))
    bonus = (r * key * p["r_k"]).sum(-1, keepdim=True) * v
    y = head_norm(torch.stack(outputs, dim=1), p) + bonus.flatten(2)
    return (y * g) @ p["o.weight"].T, v_first


def run_rwkv7(branch: Branch, x: Tensor, streams: Named) -> tuple[Tensor, Named]:
    docs = Documents.from_ids(torch.zeros(x.shape[:2], dtype=torch.int32))
    y, _, written = branch(x, LocalContext(docs), {}, streams)
    return y, written


def test_rwkv7_of_the_first_layer_is_its_recurrence() -> None:
    """And gives its values to later layers, with their gradients."""
    branch = perturbed(RWKV7, D_MODEL, torch.float64, FIRST)

    def run(x: Tensor) -> Tensor:
        y, written = run_rwkv7(branch, x, {})
        return torch.cat([y, written["v_first"]], dim=-1)

    def definition(x: Tensor) -> Tensor:
        return torch.cat(rwkv7(dict(branch.named_parameters()), x, None), dim=-1)

    expected = results(branch, definition, D_MODEL, torch.float64)
    assert_same(results(branch, run, D_MODEL, torch.float64), expected, 1e-10)


def test_rwkv7_of_a_later_layer_is_its_recurrence() -> None:
    """Values of the first come in by a stream, here a function of x, so that gradients pass; none are given on."""
    branch = perturbed(RWKV7, D_MODEL, torch.float64, LATER)

    def run(x: Tensor) -> Tensor:
        y, written = run_rwkv7(branch, x, {"v_first": torch.sin(x)})
        assert written == {}
        return y

    def definition(x: Tensor) -> Tensor:
        return rwkv7(dict(branch.named_parameters()), x, torch.sin(x))[0]

    expected = results(branch, definition, D_MODEL, torch.float64)
    assert_same(results(branch, run, D_MODEL, torch.float64), expected, 1e-10)


@pytest.mark.parametrize("version", ["6", "7"])
def test_channel_mixing_is_its_equation(version: str) -> None:
    def definition(p: Named, x: Tensor) -> Tensor:
        mixed = [x + (shifted(x) - x) * mu for mu in p["mix.weight"]]
        y = F.relu(mixed[0] @ p["k.weight"].T) ** 2 @ p["v.weight"].T
        return y if version == "7" else torch.sigmoid(mixed[1] @ p["r.weight"].T) * y

    assert_recurrence(RWKVChannelConfig(40, version=version), D_MODEL, definition)  # type: ignore[arg-type]


# Initial values, as lists over the channels n of D, written out from mixers.md: l of L is the place among its kind.

PLACES = [Place(4, 12, 2, 6), Place(0, 4, 0, 4), Place(3, 4, 3, 4), Place(0, 1)]
WIDTH = 128
every_place = pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place.of_kind}of{place.kind_count}")


def ratios(place: Place) -> tuple[float, float]:
    """r1, from 0 to 1, and r2, from 1 to nearly 0."""
    layer, layers = place.of_kind, place.kind_count
    return (layer / (layers - 1) if layers > 1 else 0.0), 1 - layer / layers


def assert_values(drawn: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(drawn, torch.tensor(expected, dtype=torch.float64).view_as(drawn), rtol=1e-5, atol=1e-6)


def assert_orthogonal(weight: Tensor, gain: float) -> None:
    """Of whichever are fewer, rows or columns."""
    short = weight if weight.shape[0] <= weight.shape[1] else weight.T
    eye = torch.eye(short.shape[0], dtype=torch.float64)
    torch.testing.assert_close(short @ short.T, gain**2 * eye, rtol=0, atol=1e-5 * gain**2)


def powers(exponent: float) -> list[float]:
    """The share of the current token that ``(n / D)^exponent`` gives."""
    return [(n / WIDTH) ** exponent for n in range(WIDTH)]


def previous(shares: list[float]) -> list[float]:
    return [1 - share for share in shares]


def falling(start: float, height: float, exponent: float) -> list[float]:
    return [start + height * (n / (WIDTH - 1)) ** exponent for n in range(WIDTH)]


@every_place
def test_initial_values_of_rwkv4(place: Place) -> None:
    drawn, (r1, r2) = initial(RWKV4Config(), WIDTH, place), ratios(place)
    assert_values(drawn["decay.time_decay"], falling(-5, 8, 0.7 + 1.3 * r1))
    assert_values(drawn["decay.time_first"], [math.log(0.3) + 0.5 * ((n + 1) % 3 - 1) for n in range(WIDTH)])
    for index, current in enumerate((powers(r2), [mu + 0.3 * r1 for mu in powers(r2)], powers(0.5 * r2))):
        assert_values(drawn["mix.weight"][index], previous(current))
    assert all((drawn[f"{name}.weight"] == 0).all() for name in "kro")
    assert_orthogonal(drawn["v.weight"], 1.0)


@every_place
def test_initial_values_of_rwkv6(place: Place) -> None:
    drawn, (r1, r2) = initial(RWKV6Config(head_dim=32), WIDTH, place), ratios(place)
    assert_values(drawn["decay.time_decay"], falling(-6, 5, 0.7 + 1.3 * r1))
    bonus = [r1 * (1 - n / (WIDTH - 1)) + 0.1 * ((n + 1) % 3 - 1) for n in range(WIDTH)]
    assert_values(drawn["decay.bonus"], bonus)
    first, half = previous(powers(r2)), previous(powers(0.5 * r2))
    assert_values(drawn["mix_x"], first)
    for index, shares in enumerate((first, first, [mu - 0.3 * r1 for mu in first], half, half)):
        assert_values(drawn["mix"][index], shares)
    for name in ("mix_in", "decay_in", "o.weight", "norm.bias"):
        assert (drawn[name] == 0).all()
    for name in ("mix_out", "decay_out"):
        assert_uniform(drawn[name], 0.01)
    for name, gain in (("r", 1.0), ("k", 0.1), ("v", 1.0), ("gate", 0.1)):
        assert_orthogonal(drawn[f"{name}.weight"], gain)
    assert_values(drawn["norm.weight"], [((place.of_kind + 1) / place.kind_count) ** 0.7] * WIDTH)


@every_place
def test_initial_values_of_rwkv7(place: Place) -> None:
    """Heads of 64 channels, whose zigzag is that of the authors' constants 31.5."""
    drawn, (r1, r2) = initial(RWKV7Config(), WIDTH, place), ratios(place)
    linear = [n / (WIDTH - 1) - 0.5 for n in range(WIDTH)]
    within = [(n % 64 - 31.5) / 31.5 for n in range(WIDTH)]
    zigzag = [z * abs(z) for z in within]
    for index, fall in enumerate((0.2, 0.9, 0.7, 0.7, 0.9, 0.2)):
        assert_values(drawn["mix.weight"][index], previous(powers(fall * r2)))
    decay = [w + 0.5 + 2.5 * z for w, z in zip(falling(-6, 6, 1 + r1**0.3), zigzag, strict=True)]
    assert_values(drawn["decay.weight"], decay)
    assert_values(drawn["rate.weight"], [-0.19 + 0.3 * z + 0.4 * x for z, x in zip(zigzag, linear, strict=True)])
    assert_values(drawn["k_k"], [0.71 - 0.1 * x for x in linear])
    assert_values(drawn["k_a"], [1.02] * WIDTH)
    assert_values(drawn["r_k"], [-0.04] * WIDTH)
    low_rank = ["decay_raw", "rate_raw", "gate"]
    if place.of_kind:
        low_rank.append("value_raw")
        assert_values(drawn["value.weight"], [0.73 - 0.4 * x for x in linear])
    assert {name for name in drawn if name.endswith((".inner", ".outer"))} == {
        f"{name}.{end}" for name in low_rank for end in ("inner", "outer")
    }
    for name in low_rank:
        assert (drawn[f"{name}.inner"] == 0).all()
        assert_orthogonal(drawn[f"{name}.outer"], 0.1)
    for name, gain in (("r", 1.0), ("k", 0.1), ("v", 1.0)):
        assert_orthogonal(drawn[f"{name}.weight"], gain)
    assert (drawn["o.weight"] == 0).all() and (drawn["norm.bias"] == 0).all()
    assert_values(drawn["norm.weight"], [((place.of_kind + 1) / place.kind_count) ** 0.7] * WIDTH)


def test_a_tall_outer_matrix_starts_larger() -> None:
    """By sqrt(rows / columns), as the authors' orthogonal values."""
    drawn = initial(RWKV7Config(head_dim=4, gate_rank=32), 8)
    assert_orthogonal(drawn["gate.outer"], 0.1 * math.sqrt(32 / 8))


@every_place
@pytest.mark.parametrize("version", ["4", "6", "7"])
def test_initial_values_of_channel_mixing(version: str, place: Place) -> None:
    drawn, (_, r2) = initial(RWKVChannelConfig(4 * WIDTH, version=version), WIDTH, place), ratios(place)  # type: ignore[arg-type]
    exponent = {"4": r2, "6": r2**3, "7": r2**4}[version]
    assert_values(drawn["mix.weight"], previous(powers(exponent)) * (1 if version == "7" else 2))
    assert_orthogonal(drawn["k.weight"], 2.0 if version == "4" else 1.0)
    assert (drawn["v.weight"] == 0).all()
    assert ("r.weight" in drawn) == (version != "7")
    assert version == "7" or (drawn["r.weight"] == 0).all()


EVERY = [RWKV4Config(), RWKV6Config(head_dim=8), RWKV7, RWKVChannelConfig(40, version="6")]


def test_what_learns_faster_and_what_decays() -> None:
    """The authors' optimizers: decays twice as fast, RWKV-4's bonus three times; only projections have weight decay."""
    faster, decaying = {}, set()
    for settings in EVERY:
        for name, info in branch_class(settings.kind)(settings, D_MODEL, LATER).param_info().items():
            assert info.lr_scale == 1 or info.fp32
            if info.lr_scale != 1:
                faster[f"{settings.kind}.{name}"] = info.lr_scale
            if info.decay:
                decaying.add(name)
    assert faster == {
        "rwkv4.decay.time_decay": 2,
        "rwkv4.decay.time_first": 3,
        "rwkv6.decay.time_decay": 2,
        "rwkv7.decay.weight": 2,
    }
    assert decaying == {f"{name}.weight" for name in ("r", "k", "v", "o", "gate")}


@pytest.mark.parametrize(("d_model", "ranks"), [(768, (64, 64, 32, 128)), (2048, (128, 128, 64, 224))])
def test_ranks_of_rwkv7(d_model: int, ranks: tuple[int, ...]) -> None:
    names = ("decay", "rate", "value", "gate")
    assert tuple(RWKV7Config().rank(name, d_model) for name in names) == ranks
    assert RWKV7Config(gate_rank=7).rank("gate", d_model) == 7


def test_long_keys_do_not_overflow() -> None:
    """RWKV-4 exponentiates keys: of any size, rising or falling along the row, they give finite means of values."""
    branch = perturbed(RWKV4Config(), D_MODEL, torch.float32)
    for scale in (1e3, -1e3):
        x = (torch.linspace(-1, 1, LENGTH)[None, :, None] * scale).expand(1, LENGTH, D_MODEL).clone().requires_grad_()
        y = forward(branch, x)
        grads = torch.autograd.grad(y.sum(), [x, *branch.parameters()])
        assert y.isfinite().all() and all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: RWKV6Config().scan_cost(96, 1), "rwkv6: head_dim 64 does not divide d_model 96; 48 does"),
        (lambda: RWKV6Config(mix_rank=0), "rwkv6: mix_rank: expected at least 1, got 0"),
        (lambda: RWKV7Config().scan_cost(96, 1), "rwkv7: head_dim 64 does not divide d_model 96; 48 does"),
        (lambda: RWKV7Config(value_rank=0), "rwkv7: value_rank: expected at least 1, got 0"),
        (lambda: RWKVChannelConfig(0), "rwkv_channel: d_ff: expected at least 1, got 0"),
    ],
)
def test_settings_that_cannot_work(make, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError) as caught:
        make()
    assert str(caught.value) == says
