"""The compiled kernels of an op as its ``cpu`` backend: what torch must know of them to trace and differentiate.

An op ``X`` of the library is a pair: ``lmtrain::X`` of tensors (some may be None) and then plain values, and
``lmtrain::X_backward`` of the gradients of its outputs and what was saved for it. It returns the gradients in the order
of the inputs that have one, also of those that were None.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lmtrain.ops import library

# how a result looks: as this tensor, or of its dtype and of this shape
Like = Tensor | tuple[Tensor, tuple[int, ...]]
Inputs = tuple[Any, ...]

DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16})


def compiled(
    name: str,
    outputs: Callable[..., tuple[Like, ...]],
    gradients: Callable[..., tuple[Like | None, ...]],
    *,
    returned: int = 2,
    saved: Callable[[Inputs, tuple[Tensor, ...]], Inputs] = lambda inputs, outputs: inputs,
) -> library.Backend:
    """The backend ``cpu`` of op ``name``; its kernels are registered when they are first asked for.

    outputs: how the forward's outputs look, from its inputs. Those after the first ``returned`` have no gradient: they
        are there for the backward.
    saved: ``(inputs, outputs)`` to what the backward gets after the gradients; by default the inputs.
    gradients: from what is saved, how the gradient of each input looks as the backward returns it; None for an input
        that never has one. A gradient with one dim more than its input is made of parts and summed over them.
    """

    def fake_forward(*inputs: Any) -> tuple[Tensor, ...]:
        return tuple(_empty(like) for like in outputs(*inputs))

    def fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(_empty(like) for like in gradients(*arguments[returned:]) if like is not None)

    def save(ctx: Any, inputs: Inputs, output: tuple[Tensor, ...] | Tensor) -> None:
        output = (output,) if isinstance(output, Tensor) else output
        ctx.mark_non_differentiable(*output[returned:])
        ctx.set_materialize_grads(False)  # else each backward fills zeros as large as the states that are kept
        ctx.returned = tuple((value.shape, value.dtype) for value in output[:returned])
        kept = saved(inputs, output)
        ctx.save_for_backward(*(value for value in kept if value is None or isinstance(value, Tensor)))
        ctx.plain = tuple(value for value in kept if value is not None and not isinstance(value, Tensor))
        ctx.dims = tuple(value.dim() if isinstance(value, Tensor) else None for value in inputs)

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        kept = (*ctx.saved_tensors, *ctx.plain)  # read once: activation checkpointing recomputes, and only once
        given = (
            kept[0].new_zeros(shape, dtype=dtype) if grad is None else grad
            for grad, (shape, dtype) in zip(grads, ctx.returned, strict=False)
        )
        found = iter(getattr(torch.ops.lmtrain, f"{name}_backward")(*given, *kept))
        results: list[Tensor | None] = []
        for dims, like in zip(ctx.dims, gradients(*kept), strict=True):
            grad = None if like is None else next(found)
            if grad is not None and dims is not None and grad.dim() > dims:
                grad = grad.sum(dim=0)
            results.append(None if dims is None else grad)
        return tuple(results)

    @cache
    def register() -> None:
        torch.library.register_fake(f"lmtrain::{name}", fake_forward)
        torch.library.register_fake(f"lmtrain::{name}_backward", fake_backward)
        torch.library.register_autograd(f"lmtrain::{name}", backward, setup_context=save)

    def missing() -> str | None:
        reason = library.load()
        if reason is None and not hasattr(torch.ops.lmtrain, name):
            reason = f"the compiled library is older than it; rebuild it with `{library.BUILD_COMMAND}`"
        if reason is None:
            register()
        return reason

    return library.Backend("cpu", "cpu", DTYPES, missing)


def _empty(like: Like) -> Tensor:
    tensor, shape = (like, like.shape) if isinstance(like, Tensor) else like
    return tensor.new_empty(shape)
