"""A branch held to what others wrote: a module of transformers, or the paper's equations token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lmtrain.model.branch import Branch, Place, branch_class
from lmtrain.model.context import LocalContext
from lmtrain.model.init import draw
from lmtrain.ops.documents import Documents

BATCH, LENGTH = 2, 37
Named = dict[str, Tensor]
PLACE = Place(0, 4)


def initial(settings: Any, d_model: int, place: Place = PLACE) -> Named:
    """The initial values of every parameter, fp64."""
    branch = branch_class(settings.kind)(settings, d_model, place)
    shapes = {name: tuple(parameter.shape) for name, parameter in branch.named_parameters()}
    return {name: draw(name, info, shapes[name], seed=0).double() for name, info in branch.param_info().items()}


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def perturbed(settings: Any, d_model: int, dtype: torch.dtype, place: Place = PLACE) -> Branch:
    """The branch near its initial values, none of them 0 or 1: there some errors do not show."""
    branch = branch_class(settings.kind)(settings, d_model, place).to(dtype)
    with torch.no_grad():
        for index, (name, value) in enumerate(initial(settings, d_model, place).items()):
            noise = 0.3 * random(*value.shape, dtype=torch.float64, seed=100 + index)
            branch.get_parameter(name).copy_(value + noise)
    return branch


def forward(branch: Branch, x: Tensor) -> Tensor:
    """Of rows of one document each."""
    ids = torch.zeros(x.shape[:2], dtype=torch.int32)
    return branch(x, LocalContext(Documents.from_ids(ids)), {}, {})[0]


def results(module: nn.Module, run: Callable[[Tensor], Tensor], d_model: int, dtype: torch.dtype) -> Named:
    """y = run(x), and of a random weighting of it the gradients of x and of every parameter."""
    x = random(BATCH, LENGTH, d_model, dtype=dtype, seed=2).requires_grad_()
    y = run(x)
    named = dict(module.named_parameters())
    grads = torch.autograd.grad((y * random(*y.shape, dtype=dtype, seed=3)).sum(), [x, *named.values()])
    return dict(zip(("y", "x", *named), (y.detach(), *grads), strict=True))


def assert_same(got: Named, expected: Named, tolerance: float) -> None:
    """Every tensor within ``tolerance`` of its largest value."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        error, scale = (got[name] - value).abs().max(), value.abs().max()
        assert error <= tolerance * scale, f"{name}: {error:.1e} off, of {scale:.1e}"


def assert_recurrence(
    settings: Any, d_model: int, definition: Callable[[Named, Tensor], Tensor], place: Place = PLACE
) -> None:
    """The branch is ``definition(parameters, x)`` in fp64, with all gradients."""
    branch = perturbed(settings, d_model, torch.float64, place)
    expected = results(branch, lambda x: definition(dict(branch.named_parameters()), x), d_model, torch.float64)
    assert_same(results(branch, lambda x: forward(branch, x), d_model, torch.float64), expected, 1e-10)


def assert_peer(
    branch: Branch, peer: nn.Module, run: Callable[[Tensor], Tensor], packed: Callable[[Named], Named], d_model: int
) -> None:
    """The peer with our weights gives our outputs and gradients in fp32; ``packed``: parameters under its names."""
    missing, unexpected = peer.load_state_dict(packed(branch.state_dict()), strict=False)
    assert not unexpected and not set(missing) & dict(peer.named_parameters()).keys()
    told = results(branch, lambda x: forward(branch, x), d_model, torch.float32)
    grads = packed({name: value for name, value in told.items() if name not in ("y", "x")})
    assert_same({"y": told["y"], "x": told["x"], **grads}, results(peer, run, d_model, torch.float32), 1e-4)


def assert_normal(drawn: Tensor, std: float) -> None:
    """N(0, std^2), within five standard errors."""
    error = 5 / drawn.numel() ** 0.5
    assert abs(drawn.mean()) < std * error and abs(drawn.std() / std - 1) < error


def assert_uniform(drawn: Tensor, bound: float) -> None:
    """U(-bound, bound), within five standard errors."""
    error = 5 / drawn.numel() ** 0.5
    assert 0.9 * bound < drawn.abs().max() <= bound * 1.0001
    assert abs(drawn.mean()) < bound * error and abs(drawn.std() * 3**0.5 / bound - 1) < error
