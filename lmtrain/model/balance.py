"""The loss that keeps a router from using only some of what it can choose from (arXiv 2101.03961, eq. 4-6, per row)."""

from __future__ import annotations

from torch import Tensor

from lmtrain.model.context import Context


def balance_loss(used: Tensor, scores: Tensor, ctx: Context) -> Tensor:
    """Sum over this rank's tokens of ``E * sum_e f_e p_e``: 1 a token when balanced.

    used: bool or int ``[B, T, E]``, which of the E a token uses; f is the share of the row's uses that fell on e, over
    all ranks of the row. scores ``[B, T, E]``, of which p are the shares.
    """
    share = scores / scores.sum(dim=-1, keepdim=True)
    counts = ctx.all_sum(used.sum(dim=1), over="row")
    load = counts.to(share.dtype) / counts.sum(dim=-1, keepdim=True)  # [B, E]
    return scores.shape[-1] * (load[:, None] * share).sum()
