"""Mixers of the delta rule against transformers or their equations token by token; initial values; traps."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import KimiLinearConfig, Qwen3NextConfig
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from lmtrain.errors import UsageError
from lmtrain.model.context import LocalContext
from lmtrain.model.delta_inputs import DeltaInputs, unit
from lmtrain.model.mixers.deltanet import DeltaNetConfig
from lmtrain.model.mixers.gated_deltanet import GatedDeltaNetConfig
from lmtrain.model.mixers.kda import KDAConfig
from lmtrain.ops.documents import Documents
from tests.model.parity import (
    Named,
    assert_normal,
    assert_peer,
    assert_recurrence,
    forward,
    initial,
    perturbed,
    random,
)

D_MODEL = 24


def convolved(p: Named) -> Tensor:
    """The convolutions of q, k and v as one, as transformers stores them."""
    return torch.cat([p[f"inputs.{name}_conv.weight"] for name in "qkv"])[:, None]


def test_gated_deltanet_is_the_one_of_qwen3_next() -> None:
    """It packs q, k, v and z, and beta and a, by key head; two value heads read each of its key heads."""
    heads, group, key_dim, value_dim = 2, 2, 4, 5
    cfg = GatedDeltaNetConfig(
        num_heads=heads, num_value_heads=heads * group, head_dim=key_dim, value_dim=value_dim, norm_eps=1e-6
    )
    peer_cfg = Qwen3NextConfig(
        hidden_size=D_MODEL,
        linear_num_key_heads=heads,
        linear_num_value_heads=heads * group,
        linear_key_head_dim=key_dim,
        linear_value_head_dim=value_dim,
        num_hidden_layers=1,
    )
    peer = Qwen3NextGatedDeltaNet(peer_cfg, 0)

    def by_key_head(p: Named, *names: str) -> Tensor:
        return torch.cat([p[f"{name}.weight"].view(heads, -1, D_MODEL) for name in names], dim=1).flatten(0, 1)

    def packed(p: Named) -> Named:
        return {
            "in_proj_qkvz.weight": by_key_head(p, "inputs.q", "inputs.k", "inputs.v", "out.gate.0"),
            "in_proj_ba.weight": by_key_head(p, "inputs.beta", "a"),
            "conv1d.weight": convolved(p),
            "dt_bias": p["decay.dt_bias"],
            "A_log": p["decay.A_log"],
            "norm.weight": p["out.norm.weight"],
            "out_proj.weight": p["out.o.weight"],
        }

    assert_peer(perturbed(cfg, D_MODEL, torch.float32), peer, peer, packed, D_MODEL)


def test_kda_is_the_one_of_kimi_linear() -> None:
    heads, width = 3, 4
    cfg = KDAConfig(num_heads=heads, head_dim=width, norm_eps=1e-6)
    peer_cfg = KimiLinearConfig(
        hidden_size=D_MODEL, linear_num_heads=heads, linear_head_dim=width, num_hidden_layers=1, rms_norm_eps=1e-6
    )
    peer = KimiLinearDeltaAttention(peer_cfg, 0)

    def packed(p: Named) -> Named:
        return {
            **{f"{name}_proj.weight": p[f"inputs.{name}.weight"] for name in "qkv"},
            "conv1d.weight": convolved(p),
            "forget_gate.f_a_proj.weight": p["decay_in.weight"],
            "forget_gate.f_b_proj.weight": p["decay_out.weight"],
            "forget_gate.dt_bias": p["decay.dt_bias"],
            "forget_gate.A_log": p["decay.A_log"].view(1, 1, heads, 1),
            "b_proj.weight": p["inputs.beta.weight"],
            "g_a_proj.weight": p["out.gate.0.weight"],
            "g_b_proj.weight": p["out.gate.1.weight"],
            "o_norm.weight": p["out.norm.weight"],
            "o_proj.weight": p["out.o.weight"],
        }

    assert_peer(perturbed(cfg, D_MODEL, torch.float32), peer, peer, packed, D_MODEL)


def delta_rule(max_beta: float, p: Named, x: Tensor) -> Tensor:
    """DeltaNet with 3 heads of 4 channels: S_t = (I - beta k k^T) S_{t-1} + beta k v^T."""

    def mixed(name: str) -> Tensor:
        weight = p[f"inputs.{name}_conv.weight"]
        padded = F.pad(x @ p[f"inputs.{name}.weight"].T, (0, 0, weight.shape[1] - 1, 0))
        y = sum(padded[:, tap : tap + x.shape[1]] * weight[:, tap] for tap in range(weight.shape[1]))
        return F.silu(torch.as_tensor(y)).unflatten(-1, (3, 4))

    q, k, v = mixed("q"), mixed("k"), mixed("v")
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    beta = max_beta * torch.sigmoid(x @ p["inputs.beta.weight"].T)
    state, outputs = torch.zeros(x.shape[0], 3, 4, 4, dtype=x.dtype), []
    for t in range(x.shape[1]):
        scaled = beta[:, t, :, None, None] * k[:, t, :, :, None]
        transition = torch.eye(4, dtype=x.dtype) - scaled * k[:, t, :, None]
        state = transition @ state + scaled * v[:, t, :, None]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) / 2)
    y = torch.stack(outputs, dim=1)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5) * p["out.norm.weight"]
    return y.flatten(2) @ p["out.o.weight"].T


@pytest.mark.parametrize("negative", [False, True])
def test_deltanet_is_its_recurrence(negative: bool) -> None:
    """The write key is +beta k: the minus is the transition's."""
    cfg = DeltaNetConfig(num_heads=3, head_dim=4, conv_width=3, negative_eigenvalues=negative)
    assert_recurrence(cfg, D_MODEL, partial(delta_rule, 2.0 if negative else 1.0))


def test_keys_have_length_one_and_beta_its_bound() -> None:
    """Longer keys or a larger beta diverge; a key of zeros stays finite, and so does its gradient."""
    inputs = DeltaInputs(D_MODEL, 2, 3, 4, 5, 4, max_beta=2.0)
    with torch.no_grad():
        for index, parameter in enumerate(inputs.parameters()):
            parameter.copy_(5 * random(*parameter.shape, dtype=torch.float32, seed=index))
    ctx = LocalContext(Documents.from_ids(torch.zeros(2, 9, dtype=torch.int32)))
    v, q, k, beta, _ = inputs(random(2, 9, D_MODEL, dtype=torch.float32, seed=9), ctx, {})
    assert (v.shape, q.shape, k.shape, beta.shape) == ((2, 9, 4, 5), (2, 9, 2, 3), (2, 9, 2, 3), (2, 9, 4))
    for t, longest in ((k, 1.0), (q, 3**-0.5)):
        assert 0.999 * longest < t.norm(dim=-1).max() < 1.00001 * longest
    assert beta.min() >= 0 and 1 < beta.max() <= 2
    nothing = torch.zeros(3, requires_grad=True)
    (grad,) = torch.autograd.grad(unit(nothing).sum(), nothing)
    assert (unit(nothing) == 0).all() and grad.isfinite().all()


@pytest.mark.parametrize(
    "settings",
    [DeltaNetConfig(num_heads=2, head_dim=4, negative_eigenvalues=True), KDAConfig(num_heads=2, head_dim=4)],
    ids=lambda s: s.kind,
)
def test_long_rows_stay_bounded(settings) -> None:  # type: ignore[no-untyped-def]
    branch = perturbed(settings, D_MODEL, torch.float32)
    x = random(1, 4096, D_MODEL, dtype=torch.float32, seed=0).requires_grad_()
    y = forward(branch, x)
    grads = torch.autograd.grad(y.square().mean(), [x, *branch.parameters()])
    assert y.abs().max() < 1e3 and all(grad.isfinite().all() for grad in grads)


SETTINGS = [
    DeltaNetConfig(num_heads=4, head_dim=32),
    GatedDeltaNetConfig(num_heads=32, num_value_heads=64, head_dim=2, value_dim=2),
    KDAConfig(num_heads=64, head_dim=2),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings.kind)
def test_initial_values(settings) -> None:  # type: ignore[no-untyped-def]
    """Matrices and convolutions N(0, 0.02^2), whatever the depth; steps log-uniform in [1e-3, 1e-1]; rates uniform."""
    for name, drawn in initial(settings, 128).items():
        if name.endswith("norm.weight"):
            assert (drawn == 1).all()
        elif name.startswith("decay."):
            low, high = (-3, -1) if name.endswith("dt_bias") else (1 if settings.kind == "kda" else 0.01, 16)
            uniform = F.softplus(drawn).log10() if name.endswith("dt_bias") else drawn.exp()
            error = 5 / math.sqrt(drawn.numel())
            assert uniform.min() >= low - 1e-3 and uniform.max() <= high + 1e-3
            assert abs(uniform.mean() - (low + high) / 2) < (high - low) * error / math.sqrt(12)
            assert abs(uniform.std() * math.sqrt(12) / (high - low) - 1) < error
        else:
            assert_normal(drawn, 0.02)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: DeltaNetConfig(num_heads=0), "deltanet: num_heads: expected at least 1, got 0"),
        (lambda: DeltaNetConfig(conv_width=1), "deltanet: conv_width: expected 2 to 16, got 1"),
        (
            lambda: GatedDeltaNetConfig(num_heads=4, num_value_heads=6),
            "gated_deltanet: num_heads 4 does not divide num_value_heads 6; 3 does",
        ),
        (lambda: GatedDeltaNetConfig(value_dim=0), "gated_deltanet: value_dim: expected at least 1, got 0"),
        (lambda: KDAConfig(head_dim=0), "kda: head_dim: expected at least 1, got 0"),
    ],
)
def test_settings_that_cannot_work(make, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError) as caught:
        make()
    assert str(caught.value) == says
