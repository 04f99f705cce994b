"""The loss straight from hidden states and head weight: the logits of all tokens are never held at once.

``cross_entropy(hidden @ weight^T, labels)`` with tokens taken ``chunk`` at a time: their logits, over which their own
gradients are written, are the largest thing held besides the gradient of the weight. Two forms:

- ``linear_cross_entropy``: nll and lse per target, both differentiable. Their gradients are known in the backward pass
  only, which makes each chunk's logits anew: 4 matrix products for the 3 of the plain form.
- ``linear_cross_entropy_sum``: the weighted sum that training takes, whose gradients follow in the forward pass from
  the chunk's own logits (as in arXiv 2410.10989): 3 matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lmtrain.ops.cross_entropy import IGNORE
from lmtrain.ops.op import check_labels, check_shape, compute_dtype

CHUNK = 512
SLAB = 32  # tokens of a chunk whose probabilities are held at once
VOCAB_BLOCK = 4096  # rows of a rounded weight gradient that are added to the sum at once


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, softcap: float | None = None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood in nats, and log-partition, of each target.

    hidden ``[..., D]`` and weight ``[V, D]`` of one dtype, labels int ``[...]``. softcap: logits become
    ``softcap tanh(logit / softcap)``. Both results are ``[...]``, in the computing dtype, 0 where the label is
    ``IGNORE``. Raises ValueError naming the argument, what was expected and what was got.
    """
    _check("linear_cross_entropy", hidden, weight, labels, None, chunk)
    nll, lse = _PerTarget.apply(hidden.flatten(0, -2), weight, labels.flatten(), softcap, chunk)
    return nll.view(labels.shape), lse.view(labels.shape)


def linear_cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    loss_weights: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum_t loss_weights_t (nll_t + z_loss lse_t^2)``, and nll and lse themselves, which carry no gradient.

    Shapes as in ``linear_cross_entropy``; loss_weights ``[...]``, 1 if None. The backward pass may run once.
    """
    _check("linear_cross_entropy_sum", hidden, weight, labels, loss_weights, chunk)
    loss_weights = None if loss_weights is None else loss_weights.flatten()
    grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    arguments = hidden.flatten(0, -2), weight, labels.flatten(), loss_weights, z_loss, softcap, chunk, grad
    total, nll, lse = _Sum.apply(*arguments)
    return total, nll.view(labels.shape), lse.view(labels.shape)


class _LogProbabilities:
    """Of the logits of a few tokens after another, in the same memory, which stays in the cache."""

    def __init__(self, hidden: Tensor, weight: Tensor, chunk: int) -> None:
        size = min(SLAB, chunk, hidden.shape[0])
        self.buffer = hidden.new_empty(size, weight.shape[0], dtype=compute_dtype(hidden))

    def score(self, logits: Tensor, index: Tensor, softcap: float | None) -> tuple[Tensor, Tensor, Tensor]:
        """nll ``[n]``, lse ``[n]`` and log probabilities ``[n, V]``."""
        logits = _capped(logits.to(self.buffer.dtype), softcap)
        log_p = torch.log_softmax(logits, dim=-1, out=self.buffer[: logits.shape[0]])
        nll = -log_p.gather(-1, index)[:, 0]
        return nll, logits.gather(-1, index)[:, 0] + nll, log_p


class _Gradients:
    """The gradients of hidden ``[N, D]`` and weight ``[V, D]`` from those of one chunk's logits after another."""

    def __init__(self, hidden: Tensor, weight: Tensor, needed: tuple[bool, bool]) -> None:
        self.inputs = hidden, weight
        self.hidden = hidden.new_empty(hidden.shape) if needed[0] else None
        # a sum over all chunks: in the computing dtype
        self.weight = weight.new_zeros(weight.shape, dtype=compute_dtype(weight)) if needed[1] else None

    def add(self, rows: slice, grad_logits: Tensor) -> None:
        hidden, weight = self.inputs
        if self.hidden is not None:
            torch.mm(grad_logits, weight, out=self.hidden[rows])
        if self.weight is not None:
            if self.weight.dtype == weight.dtype:
                self.weight.addmm_(grad_logits.t(), hidden[rows])
                return
            for total, columns in zip(self.weight.split(VOCAB_BLOCK), grad_logits.split(VOCAB_BLOCK, -1), strict=True):
                total += columns.t() @ hidden[rows]

    def final(self) -> tuple[Tensor | None, Tensor | None]:
        return self.hidden, None if self.weight is None else self.weight.to(self.inputs[1].dtype)


class _PerTarget(torch.autograd.Function):
    """Saves each token's log-partition; the backward pass makes the logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None, chunk: int
    ) -> tuple[Tensor, Tensor]:
        valid, index = _targets(labels)
        nll, lse = _empty_results(hidden)
        log_probabilities = _LogProbabilities(hidden, weight, chunk)
        for rows, logits in _chunks(hidden, weight, chunk):
            for few, part in _slabs(rows, logits):
                nll[few], lse[few], _ = log_probabilities.score(part, index[few], softcap)
        ctx.save_for_backward(hidden, weight, valid, index, lse)
        ctx.softcap, ctx.chunk = softcap, chunk
        zero = nll.new_zeros(())
        return torch.where(valid, nll, zero), torch.where(valid, lse, zero)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, valid, index, lse = ctx.saved_tensors
        grad_nll, grad_lse = (torch.where(valid, grad, grad.new_zeros(())) for grad in grads)
        gradients = _Gradients(hidden, weight, ctx.needs_input_grad[:2])
        for rows, logits in _chunks(hidden, weight, ctx.chunk):
            for few, part in _slabs(rows, logits):
                log_p = _capped(part.to(lse.dtype), ctx.softcap) - lse[few, None]
                part.copy_(_grad_logits(log_p, lse[few], index[few], grad_nll[few], grad_lse[few], ctx.softcap))
            gradients.add(rows, logits)
        return *gradients.final(), None, None, None


class _Sum(torch.autograd.Function):
    """Saves the gradients for an upstream gradient of 1; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_weights: Tensor | None,
        z_loss: float,
        softcap: float | None,
        chunk: int,
        grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        valid, index = _targets(labels)
        nll, lse = _empty_results(hidden)
        scale = torch.ones_like(nll) if loss_weights is None else loss_weights.to(nll.dtype)
        scale = torch.where(valid, scale, scale.new_zeros(()))
        log_probabilities = _LogProbabilities(hidden, weight, chunk)
        gradients = _Gradients(hidden, weight, ctx.needs_input_grad[:2] if grad else (False, False))
        for rows, logits in _chunks(hidden, weight, chunk):
            for few, part in _slabs(rows, logits):
                nll[few], lse[few], log_p = log_probabilities.score(part, index[few], softcap)
                if grad:
                    grad_lse = 2 * z_loss * scale[few] * lse[few]
                    part.copy_(_grad_logits(log_p, lse[few], index[few], scale[few], grad_lse, softcap))
            if grad:
                gradients.add(rows, logits)
        zero = nll.new_zeros(())
        nll, lse = torch.where(valid, nll, zero), torch.where(valid, lse, zero)
        ctx.gradients = gradients.final()
        ctx.mark_non_differentiable(nll, lse)
        return (scale * (nll + z_loss * lse.square())).sum(), nll, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_cross_entropy_sum: its backward pass runs once: it scales its gradients in place"
            )
        found, ctx.gradients = ctx.gradients, None
        return *(None if grad is None else grad.mul_(grads[0]) for grad in found), *[None] * 6


def _chunks(hidden: Tensor, weight: Tensor, chunk: int) -> Iterator[tuple[slice, Tensor]]:
    """Tokens and their logits ``[n, V]``, all in the same memory: fresh pages cost as much as the arithmetic on them.

    The gradients of the logits are written over them.
    """
    buffer = hidden.new_empty(min(chunk, hidden.shape[0]), weight.shape[0])
    for first in range(0, hidden.shape[0], chunk):
        rows = slice(first, min(first + chunk, hidden.shape[0]))
        yield rows, torch.mm(hidden[rows], weight.t(), out=buffer[: rows.stop - first])


def _slabs(rows: slice, logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """A few tokens of a chunk at a time, with a view of their logits."""
    for first in range(rows.start, rows.stop, SLAB):
        few = slice(first, min(first + SLAB, rows.stop))
        yield few, logits[few.start - rows.start : few.stop - rows.start]


def _targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which labels ``[N]`` count, and their columns ``[N, 1]``: the first where none counts."""
    valid = labels != IGNORE
    return valid, torch.where(valid, labels, 0).long()[:, None]


def _empty_results(hidden: Tensor) -> tuple[Tensor, Tensor]:
    nll = hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden))
    return nll, torch.empty_like(nll)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _grad_logits(
    log_p: Tensor, lse: Tensor, index: Tensor, grad_nll: Tensor, grad_lse: Tensor, softcap: float | None
) -> Tensor:
    """In place of the log probabilities."""
    slope = None if softcap is None else 1 - ((log_p + lse[:, None]) / softcap).square()
    grad = log_p.exp_().mul_((grad_nll + grad_lse)[:, None]).scatter_add_(-1, index, -grad_nll[:, None])
    return grad if slope is None else grad.mul_(slope)


def _check(name: str, hidden: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor | None, chunk: int) -> None:
    if not hidden.is_floating_point():
        raise ValueError(f"{name}: hidden: expected a floating dtype, got {hidden.dtype}")
    if hidden.dim() < 2:
        raise ValueError(f"{name}: hidden: expected shape [..., D] with at least 2 dims, got {list(hidden.shape)}")
    check_shape(name, "weight", weight, (None, hidden.shape[-1]))
    if weight.dtype != hidden.dtype:
        raise ValueError(f"{name}: weight: expected dtype {hidden.dtype} as hidden, got {weight.dtype}")
    check_labels(name, labels, tuple(hidden.shape[:-1]))
    if loss_weights is not None:
        check_shape(name, "loss_weights", loss_weights, tuple(labels.shape))
    if chunk < 1:
        raise ValueError(f"{name}: chunk: expected at least 1, got {chunk}")
    for argument, other in {"weight": weight, "labels": labels, "loss_weights": loss_weights}.items():
        if other is not None and other.device != hidden.device:
            raise ValueError(f"{name}: {argument}: expected device {hidden.device} as hidden, got {other.device}")
