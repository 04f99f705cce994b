"""Next-token loss per target, and the log-partition its stabilising term needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmtrain.ops.op import check_labels, compute_dtype

IGNORE = -100


class _CrossEntropy(torch.autograd.Function):
    """Keeps one ``[B, T, V]`` tensor for the backward pass and makes its gradient in place."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        valid = labels != IGNORE
        index = torch.where(valid, labels, 0).long()[..., None]
        log_p = torch.log_softmax(logits.to(compute_dtype(logits)), dim=-1)
        nll = -log_p.gather(-1, index)[..., 0]
        lse = logits.gather(-1, index)[..., 0].to(log_p.dtype) + nll
        ctx.save_for_backward(log_p, index, valid)
        ctx.dtype = logits.dtype
        zero = nll.new_zeros(())
        return torch.where(valid, nll, zero), torch.where(valid, lse, zero)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        log_p, index, valid = ctx.saved_tensors
        zero = log_p.new_zeros(())
        grad_nll, grad_lse = (torch.where(valid, grad, zero)[..., None] for grad in grads)
        grad = log_p.exp().mul_(grad_nll + grad_lse).scatter_add_(-1, index, -grad_nll)
        return grad.to(ctx.dtype), None


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood in nats, and log-partition, of each target.

    logits ``[B, T, V]``, labels int ``[B, T]``; both results ``[B, T]`` in the computing dtype, 0 where the label is
    ``IGNORE``. A row of gradients of an ignored target is exactly 0. Raises ValueError naming the argument, what was
    expected and what was got.
    """
    check_labels("cross_entropy", labels, tuple(logits.shape[:-1]))
    nll, lse = _CrossEntropy.apply(logits, labels)
    return nll, lse
