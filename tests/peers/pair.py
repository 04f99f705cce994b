"""One thing computed twice: by another project and by ours, with the gradients of every input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Named = dict[str, Tensor]
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Pair:
    """kind: the op or mixer. name: of theirs. ours: in the given dtype. note: where the two conventions differ.

    Both give outputs and gradients by the same names. tolerance: of the largest value of each tensor.
    """

    kind: str
    name: str
    theirs: Callable[[], Named]
    ours: Callable[[torch.dtype], Named]
    tolerance: float = 1e-4
    note: str = ""


def outcome(run: Callable[[Named], Outputs], leaves: Named) -> Named:
    """Outputs of ``run``, and of a random weighting of them the gradients of every leaf."""
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    outputs = run(leaves)
    generator = torch.Generator().manual_seed(1)
    weighted = [(out * torch.randn(out.shape, generator=generator).to(out)).sum() for out in outputs]
    grads = torch.autograd.grad(torch.stack(weighted).sum(), list(leaves.values()))
    found = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    return found | {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}


def cast(tensors: Named, dtype: torch.dtype) -> Named:
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def furthest(got: Named, expected: Named) -> tuple[float, str]:
    """The largest error over the largest value of a tensor, and that tensor's name; infinite if not a number."""
    if {name: t.shape for name, t in got.items()} != {name: t.shape for name, t in expected.items()}:
        raise ValueError(f"the two have different outputs or inputs: {list(got)} beside {list(expected)}")
    errors = {}
    for name, value in expected.items():
        error = (got[name].double() - value.double()).abs().max() / value.double().abs().max()
        errors[name] = float(error) if error.isfinite() else float("inf")
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst
