"""Linear attention and its kin against transformers or their equations token by token; initial values; traps."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from lmtrain.errors import UsageError
from lmtrain.model.branch import Place
from lmtrain.model.context import LocalContext
from lmtrain.model.mixers.gla import GLAConfig
from lmtrain.model.mixers.hgrn2 import BoundedForget, HGRN2Config
from lmtrain.model.mixers.lightnet import LightNetConfig
from lmtrain.model.mixers.linear_attention import LinearAttentionConfig
from lmtrain.model.mixers.retnet import RetNetConfig
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


def scan(decay: Tensor, k: Tensor, v: Tensor, q: Tensor) -> Tensor:
    """S_t = decay_t S_{t-1} + k_t v_t^T, y_t = S_t^T q_t; decay ``[B, T, H, K]`` or ``[H, 1]``."""
    state, outputs = torch.zeros_like(k[:, 0, :, :, None]), []
    for t in range(k.shape[1]):
        factor = decay[:, t] if decay.dim() == 4 else decay
        state = factor[..., None] * state + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, dim=1)


def normed(y: Tensor, weight: Tensor, eps: float) -> Tensor:
    return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight


@pytest.mark.parametrize(
    ("place", "layer", "layers"), [(Place(4, 10), 2, 5), (Place(9, 10), 4, 5), (Place(0, 1), 0, 1)]
)
def test_lightning_is_the_one_of_minimax(place: Place, layer: int, layers: int) -> None:
    """Its queries, keys and values are packed per head; its layers are two branches each."""
    heads, width = 3, 6
    cfg = LinearAttentionConfig(num_heads=heads, head_dim=width, decay="lightning", norm_eps=1e-6)
    peer_cfg = MiniMaxConfig(
        hidden_size=D_MODEL, num_attention_heads=heads, head_dim=width, num_hidden_layers=layers, block_size=16
    )
    peer = MiniMaxLightningAttention(peer_cfg, layer)

    def packed(p: Named) -> Named:
        parts = [p[f"{name}.weight"].view(heads, width, D_MODEL) for name in "qkv"]
        return {
            "norm.weight": p["out.norm.weight"],
            "qkv_proj.weight": torch.cat(parts, dim=1).flatten(0, 1),
            "out_proj.weight": p["out.o.weight"],
            "output_gate.weight": p["out.gate.0.weight"],
        }

    branch = perturbed(cfg, D_MODEL, torch.float32, place)
    assert_peer(branch, peer, lambda x: peer(x, None, None)[0], packed, D_MODEL)


FEATURES = {
    "elu": lambda x: torch.where(x > 0, x + 1, x.exp()),
    "relu": lambda x: x.clamp(min=0),
    "identity": lambda x: x,
}


@pytest.mark.parametrize("feature_map", FEATURES)
def test_linear_attention_is_its_recurrence(feature_map: str) -> None:
    def definition(p: Named, x: Tensor) -> Tensor:
        q, k, v = ((x @ p[f"{name}.weight"].T).unflatten(-1, (3, 5)) for name in "qkv")
        phi = FEATURES[feature_map]
        y = scan(x.new_ones(3, 1), phi(k), v, phi(q) / math.sqrt(5))
        return normed(y, p["out.norm.weight"], 1e-5).flatten(2) @ p["out.o.weight"].T

    assert_recurrence(LinearAttentionConfig(num_heads=3, head_dim=5, feature_map=feature_map), D_MODEL, definition)  # type: ignore[arg-type]


def test_retention_is_its_recurrence() -> None:
    """The rotation as a product of complex numbers: channel i beside i + K/2."""
    heads, key_dim = 3, 4

    def rotated(x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[1])[:, None, None] * 100.0 ** (-2 * torch.arange(key_dim // 2).double() / key_dim)
        turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag], dim=-1)

    def definition(p: Named, x: Tensor) -> Tensor:
        q, k, v = ((x @ p[f"{name}.weight"].T).unflatten(-1, (heads, -1)) for name in "qkv")
        gamma = torch.tensor([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128], dtype=x.dtype)[:, None]
        y = scan(gamma, rotated(k), v, rotated(q) / math.sqrt(key_dim))
        y = normed(y, p["out.norm.weight"], 1e-5).flatten(2)
        return (y * F.silu(x @ p["out.gate.0.weight"].T)) @ p["out.o.weight"].T

    assert_recurrence(RetNetConfig(num_heads=heads, expand_k=0.5, expand_v=1.0, rope_theta=100.0), D_MODEL, definition)


def test_gla_is_its_recurrence() -> None:
    def definition(p: Named, x: Tensor) -> Tensor:
        q, k, v = ((x @ p[f"{name}.weight"].T).unflatten(-1, (3, -1)) for name in "qkv")
        raw = x @ p["decay_in.weight"].T @ p["decay_out.weight"].T + p["decay.bias"]
        decay = (F.logsigmoid(raw) / 16).exp().unflatten(-1, (3, -1))
        y = normed(scan(decay, k, v, q / math.sqrt(4)), p["out.norm.weight"], 1e-5).flatten(2)
        return (y * F.silu(x @ p["out.gate.0.weight"].T)) @ p["out.o.weight"].T

    assert_recurrence(GLAConfig(num_heads=3, gate_rank=5), D_MODEL, definition)


@pytest.mark.parametrize("index", [0, 3])
def test_hgrn2_is_its_recurrence(index: int) -> None:
    """The lower bound as a share of the odds: lb / (1 - lb) = e^b l / (L - l)."""
    place = Place(index, 4)

    def definition(p: Named, x: Tensor) -> Tensor:
        odds = p["forget.bound"].exp() * index / (4 - index)
        bound = odds / (1 + odds)
        f = bound + (1 - bound) * torch.sigmoid(x @ p["f.weight"].T)
        q, f, v = (t.unflatten(-1, (3, 8)) for t in (F.silu(x @ p["q.weight"].T), f, x @ p["i.weight"].T))
        y = scan(f, 1 - f, v, q / math.sqrt(8)).flatten(2)
        return normed(y, p["out.norm.weight"], 1e-5) @ p["out.o.weight"].T

    assert_recurrence(HGRN2Config(head_dim=8), D_MODEL, definition, place)


def test_lightnet_is_a_softmax_over_the_past() -> None:
    """For every key channel; and so are its gradients."""

    def definition(p: Named, x: Tensor) -> Tensor:
        q, k, v = ((x @ p[f"{name}.weight"].T).unflatten(-1, (3, 8)) for name in "qkv")
        past = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()[:, :, None, None]
        weights = torch.where(past, k[:, None], -math.inf).softmax(dim=2)  # [B, t, s, H, K]
        y = torch.einsum("btshk,bshv,bthk->bthv", weights, v, F.silu(q) / math.sqrt(8)).flatten(2)
        gate = F.silu(x @ p["out.gate.0.weight"].T @ p["out.gate.1.weight"].T)
        return (normed(y, p["out.norm.weight"], 1e-6) * gate) @ p["out.o.weight"].T

    assert_recurrence(LightNetConfig(head_dim=8, gate_rank=5), D_MODEL, definition)


@pytest.mark.parametrize("scale", [1e3, -1e3])
def test_lightnet_bears_any_keys(scale: float) -> None:
    """Exponentials of keys of any size, rising or falling along the row, neither overflow nor vanish."""
    branch = perturbed(LightNetConfig(head_dim=8, gate_rank=5), D_MODEL, torch.float32)
    x = (torch.linspace(-1, 1, 40)[None, :, None].expand(1, 40, D_MODEL) * scale).clone().requires_grad_()
    y = forward(branch, x)
    grads = torch.autograd.grad(y.sum(), [x, *branch.parameters()])
    assert y.isfinite().all() and all(grad.isfinite().all() for grad in grads)


def test_lightnet_starts_anew_with_a_document() -> None:
    """A first token sees itself alone: the state is v_0, whatever its key and what came before."""
    branch = perturbed(LightNetConfig(head_dim=8, gate_rank=5), D_MODEL, torch.float64)
    docs = Documents.from_ids(torch.tensor([[0, 0, 0, 1]]))
    x = random(1, 4, D_MODEL, dtype=torch.float64, seed=0)
    _, state, _ = branch(x, LocalContext(docs, carries=True), {}, {})
    v, k = (x[0, 3] @ branch.get_parameter(f"{name}.weight").T for name in "vk")
    torch.testing.assert_close(state["gla"][0], v.view(3, 1, 8).expand(3, 8, 8), rtol=0, atol=1e-15)
    torch.testing.assert_close(state["z"][0], torch.stack([k, torch.ones_like(k)]))


@pytest.mark.parametrize(("index", "count"), [(0, 6), (2, 6), (5, 6), (0, 1)])
def test_lower_bounds_start_at_the_share_of_depth(index: int, count: int) -> None:
    """l / L as at the paper's initial values: 0 in the first branch, whose gradients are finite."""
    forget = BoundedForget(3, Place(index, count)).double()
    assert (initial(HGRN2Config(head_dim=4), 8, Place(index, count))["forget.bound"] == 0).all()
    with torch.no_grad():
        forget.bound.zero_()
    raw = torch.tensor([-2e3, 0.0, 2e3], dtype=torch.float64, requires_grad=True)
    g = forget(raw)
    share = index / count
    assert g[0] == -2e3 if not index else torch.allclose(g[0].exp(), raw.new_tensor(share))
    torch.testing.assert_close(g[1:].exp(), raw.new_tensor([share + (1 - share) / 2, 1.0]))
    grads = torch.autograd.grad(g.sum(), [raw, forget.bound])
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[1] == 0).all() == (index == 0)


SETTINGS = [
    LinearAttentionConfig(num_heads=4),
    LinearAttentionConfig(num_heads=4, decay="lightning"),
    RetNetConfig(num_heads=4),
    GLAConfig(num_heads=4),
    HGRN2Config(head_dim=32),
    LightNetConfig(head_dim=32, gate_rank=48),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings.kind)
def test_initial_values(settings) -> None:  # type: ignore[no-untyped-def]
    """Every matrix N(0, 0.02^2), whatever the depth; norms 1; what learns a decay 0."""
    for name, drawn in initial(settings, 128).items():
        if name.endswith("norm.weight"):
            assert (drawn == 1).all()
        elif name in ("decay.bias", "forget.bound"):
            assert (drawn == 0).all()
        else:
            assert_normal(drawn, 0.02)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LinearAttentionConfig(num_heads=0), "linear_attention: num_heads: expected at least 1, got 0"),
        (
            lambda: LinearAttentionConfig(num_heads=3).width(8),
            "linear_attention: d_model 8 does not divide by num_heads 3; set head_dim, or num_heads 2",
        ),
        (
            lambda: LinearAttentionConfig(decay="lightning", feature_map="relu"),
            "linear_attention: feature_map relu: lightning has silu and no other; leave it out, or set decay none",
        ),
        (
            lambda: RetNetConfig(num_heads=8).widths(12),
            "retnet: expand_k 1.0 of d_model 12 does not divide by num_heads 8; num_heads 6 does",
        ),
        (
            lambda: RetNetConfig(num_heads=4).widths(12),
            "retnet: rotary keys need an even number of channels per head, got 3; double expand_k",
        ),
        (
            lambda: GLAConfig(num_heads=4, expand_k=0.3).widths(8),
            "gla: expand_k 0.3 of d_model 8 does not divide by num_heads 4",
        ),
        (lambda: GLAConfig(gate_rank=0), "gla: gate_rank: expected at least 1, got 0"),
        (
            lambda: HGRN2Config().scan_cost(192, 1),
            "hgrn2: head_dim 128 does not divide d_model 192; 96 does",
        ),
        (lambda: LightNetConfig(head_dim=0), "lightnet: head_dim: expected at least 1, got 0"),
    ],
)
def test_settings_that_cannot_work(make, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError) as caught:
        make()
    assert str(caught.value) == says
