"""State-space mixers against transformers or their equations token by token; initial values; traps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import FalconMambaConfig as NormedPeerConfig
from transformers import MambaConfig as PeerConfig
from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer
from transformers.models.mamba.modeling_mamba import MambaMixer

from lmtrain.errors import UsageError
from lmtrain.model.branch import Place
from lmtrain.model.context import LocalContext
from lmtrain.model.mixers.longhorn import LonghornConfig
from lmtrain.model.mixers.mamba import MambaConfig
from lmtrain.model.mixers.mamba2 import Mamba2Config
from lmtrain.model.mixers.s4d import S4DConfig
from lmtrain.ops.documents import Documents
from tests.model.parity import (
    Named,
    assert_normal,
    assert_peer,
    assert_recurrence,
    assert_uniform,
    initial,
    perturbed,
    random,
)

D_MODEL = 32


@pytest.mark.parametrize("normed", [False, True], ids=["mamba", "falcon"])
def test_mamba_is_the_one_of_transformers(normed: bool) -> None:
    sizes = {"hidden_size": D_MODEL, "state_size": 5, "conv_kernel": 4, "expand": 2, "time_step_rank": 3}
    peer_cfg = (NormedPeerConfig if normed else PeerConfig)(**sizes, num_hidden_layers=1)
    peer = (FalconMambaMixer if normed else MambaMixer)(peer_cfg, 0, initialize_mixer_weights=False).eval()

    def packed(p: Named) -> Named:
        return {
            "in_proj.weight": torch.cat([p["x.weight"], p["z.weight"]]),
            "conv1d.weight": p["conv.weight"][:, None],
            "conv1d.bias": p["conv.bias"],
            "x_proj.weight": torch.cat([p["dt_in.weight"], p["B.weight"], p["C.weight"]]),
            "dt_proj.weight": p["dt_out.weight"],
            "dt_proj.bias": p["decay.dt_bias"],
            "A_log": p["decay.A_log"],
            "D": p["skip.D"],
            "out_proj.weight": p["o.weight"],
        }

    branch = perturbed(MambaConfig(d_state=5, dt_rank=3, selection_norm=normed), D_MODEL, torch.float32)
    assert_peer(branch, peer, peer, packed, D_MODEL)


def longhorn(p: Named, x: Tensor) -> Tensor:
    width = p["conv.weight"].shape[1]
    padded = F.pad(x @ p["x.weight"].T, (0, 0, width - 1, 0))
    taps = (padded[:, j : j + x.shape[1]] * p["conv.weight"][:, j] for j in range(width))
    u = F.silu(p["conv.bias"] + sum(taps))
    beta = torch.sigmoid(u @ p["dt_in.weight"].T @ p["dt_out.weight"].T + p["step.bias"])
    k, q = u @ p["B.weight"].T, u @ p["C.weight"].T
    h, outputs = x.new_zeros(x.shape[0], u.shape[2], k.shape[2]), []
    for t in range(x.shape[1]):
        step = beta[:, t] / (1 + beta[:, t] * (k[:, t] ** 2).sum(-1, keepdim=True))
        h = h * (1 - step[:, :, None] * k[:, t, None] ** 2) + (step * u[:, t])[:, :, None] * k[:, t, None]
        outputs.append((h * q[:, t, None]).sum(-1) + p["skip.D"] * u[:, t])
    return (torch.stack(outputs, dim=1) * F.silu(x @ p["z.weight"].T)) @ p["o.weight"].T


def test_longhorn_is_its_recurrence() -> None:
    """With all gradients: that of the keys passes through the step, which holds their square."""
    assert_recurrence(LonghornConfig(d_state=5, dt_rank=3), D_MODEL, longhorn)


def s4d(p: Named, x: Tensor) -> Tensor:
    """With complex modes, as the paper has them."""
    rates = torch.complex(-p["modes.log_A_real"].exp(), p["modes.A_imag"])
    factor = (rates * p["modes.log_dt"].exp()[:, None]).exp()
    read = torch.view_as_complex(p["modes.C"])
    h, outputs = torch.zeros(x.shape[0], *rates.shape, dtype=rates.dtype), []
    for t in range(x.shape[1]):
        h = factor * h + (factor - 1) / rates * x[:, t, :, None]
        outputs.append(2 * (read * h).sum(-1).real + p["skip.D"] * x[:, t])
    g = F.gelu(torch.stack(outputs, dim=1))
    return (g @ p["o.weight"].T + p["o.bias"]) * torch.sigmoid(g @ p["gate.weight"].T + p["gate.bias"])


def test_s4d_is_its_recurrence() -> None:
    assert_recurrence(S4DConfig(d_state=6), D_MODEL, s4d)


def test_s4d_is_the_same_anywhere_in_a_document() -> None:
    """Modes turn with the position, of which fp32 angles would keep little after a million tokens."""
    branch, x = (
        perturbed(S4DConfig(d_state=6), D_MODEL, torch.float32),
        random(2, 20, D_MODEL, dtype=torch.float32, seed=4),
    )
    ids = torch.zeros(2, 20, dtype=torch.int32)
    near, far = (
        branch(x, LocalContext(Documents.from_ids(ids, torch.tensor([before, before]))), {}, {})[0]
        for before in (0, 1_000_003)
    )
    torch.testing.assert_close(far, near, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [MambaConfig(d_state=24), LonghornConfig(d_state=24)], ids=lambda s: s.kind)
def test_initial_projections(settings: Any) -> None:
    """Torch's default; the output shrinks by the root of the number of branches; D is 1."""
    inner = 128
    drawn = initial(settings, 64, Place(0, 9))
    assert drawn["dt_in.weight"].shape == (4, inner)  # 64 / 16
    bounds = {
        "z.weight": 1 / 8,
        "x.weight": 1 / 8,
        "conv.weight": 0.5,
        "conv.bias": 0.5,
        "dt_in.weight": 1 / math.sqrt(inner),
        "dt_out.weight": 1 / math.sqrt(4),
        "B.weight": 1 / math.sqrt(inner),
        "C.weight": 1 / math.sqrt(inner),
        "o.weight": 1 / math.sqrt(inner) / 3,
    }
    for name, bound in bounds.items():
        assert_uniform(drawn.pop(name), bound)
    assert (drawn.pop("skip.D") == 1).all()
    assert set(drawn) == ({"decay.dt_bias", "decay.A_log"} if settings.kind == "mamba" else {"step.bias"})


def test_initial_decays() -> None:
    """Mamba: A = -1..-N, steps log-uniform in [1e-3, 1e-1]. Longhorn: beta = 1/2."""
    drawn = initial(MambaConfig(d_state=24), 64)
    torch.testing.assert_close(drawn["decay.A_log"].exp(), torch.arange(1.0, 25).double().expand(128, 24))
    assert_uniform(F.softplus(drawn["decay.dt_bias"]).log10() + 2, 1.0)
    assert (initial(LonghornConfig(), 64)["step.bias"] == 0).all()


def test_initial_modes() -> None:
    """S4D-Lin."""
    drawn = initial(S4DConfig(), 64)
    assert_uniform(drawn["modes.log_dt"] / math.log(10) + 2, 1.0)
    assert torch.allclose(drawn["modes.log_A_real"].exp(), torch.tensor(0.5).double())
    torch.testing.assert_close(drawn["modes.A_imag"], (torch.pi * torch.arange(32).double()).expand(64, 32))
    assert_normal(drawn["modes.C"], math.sqrt(0.5))
    assert_normal(drawn["skip.D"], 1.0)
    for name in ("o.weight", "o.bias", "gate.weight", "gate.bias"):
        assert_uniform(drawn[name], 1 / 8)


@pytest.mark.parametrize("make", [Mamba2Config, MambaConfig])
def test_mimetic_initial_values(make: Any) -> None:
    """Steps of 1 for every token, 1 / e of the state left after the length, C = B, convolutions that do nothing."""
    usual, drawn = (initial(make(mimetic_length=length), 64, Place(3, 9)) for length in (None, 100))
    convs = ("conv_x", "conv_bc") if make is Mamba2Config else ("conv.weight",)
    biases = ("conv_x_bias", "conv_bc_bias") if make is Mamba2Config else ("conv.bias",)
    step = "dt.weight" if make is Mamba2Config else "dt_out.weight"
    assert (drawn[step] == 0).all() and all((drawn[name] == 0).all() for name in biases)
    torch.testing.assert_close(F.softplus(drawn["decay.dt_bias"]).mean(), torch.tensor(1.0).double())
    torch.testing.assert_close((-100 * drawn["decay.A_log"].exp()).exp().mean(), torch.tensor(-1.0).double().exp())
    for name in convs:
        assert torch.equal(drawn[name][:, -1], torch.ones(len(drawn[name])).double())
        assert (drawn[name][:, :-1] == 0).all()
    assert torch.equal(drawn["B.weight"], drawn["C.weight"])
    assert_uniform(drawn["B.weight"], drawn["B.weight"].shape[1] ** -0.5)
    changed = {name for name in drawn if not torch.equal(drawn[name], usual[name])}
    assert changed == {step, "C.weight", "decay.A_log", "decay.dt_bias", *convs, *biases}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: MambaConfig(d_state=0), "mamba: d_state: expected at least 1, got 0"),
        (lambda: MambaConfig(dt_rank=0), "mamba: dt_rank: expected at least 1, got 0"),
        (lambda: MambaConfig(mimetic_length=0), "mamba: mimetic_length: expected at least 1, got 0"),
        (lambda: Mamba2Config(mimetic_length=0), "mamba2: mimetic_length: expected at least 1, got 0"),
        (lambda: LonghornConfig(conv_width=1), "longhorn: conv_width: expected 2 to 16, got 1"),
        (lambda: S4DConfig(d_state=7), "s4d: d_state: expected an even number of at least 2, got 7; use 8"),
        (lambda: S4DConfig(d_state=0), "s4d: d_state: expected an even number of at least 2, got 0; use 2"),
    ],
)
def test_settings_that_cannot_work(make, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError) as caught:
        make()
    assert str(caught.value) == says
