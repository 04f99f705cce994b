"""Next-token loss per target."""

from __future__ import annotations

import torch
from torch import Tensor

from lmtrain.ops.op import compute_dtype

IGNORE = -100


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood in nats and log-partition of each target.

    logits ``[B, T, V]``, labels int ``[B, T]``; both results ``[B, T]`` in the computing dtype, 0 where the label is
    ``IGNORE``.
    """
    valid = labels != IGNORE
    logits = logits.to(compute_dtype(logits))
    lse = torch.logsumexp(logits, dim=-1)
    picked = logits.gather(-1, torch.where(valid, labels, 0).long()[..., None])[..., 0]
    zero = lse.new_zeros(())
    return torch.where(valid, lse - picked, zero), torch.where(valid, lse, zero)
