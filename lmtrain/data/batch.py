"""What the loader hands to an engine: rows of tokens with their labels and documents."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmtrain.ops.cross_entropy import IGNORE
from lmtrain.ops.documents import Documents


@dataclass(frozen=True)
class Batch:
    """One micro-batch of rows, or one sequence shard of it.

    tokens, labels, positions: int32 ``[B, T]``; labels are shifted before any cut and are ``IGNORE`` on padding and
        across a document border.
    loss_weights: fp32 ``[B, T]`` or None; scales targets, never marks padding.
    source: int32 ``[B, T]`` source id. block: int64 ``[B]`` sample index k. run: int64 ``[B]`` the run of consecutive
        blocks the row continues.
    num_targets: local ``count(labels != IGNORE)``. log_length: schedule events visible when the batch was made.
    """

    tokens: Tensor
    labels: Tensor
    docs: Documents
    positions: Tensor
    source: Tensor
    block: Tensor
    run: Tensor
    num_targets: int
    log_length: int
    loss_weights: Tensor | None = None

    def cut(self, rank: int, size: int) -> Batch:
        """The contiguous sequence shard ``rank`` of ``size``; ``docs.whole`` keeps the uncut row."""
        if size == 1:
            return self
        docs = self.docs.cut(rank, size)
        width = docs.shape[1]

        def columns(tensor: Tensor) -> Tensor:
            return tensor[:, rank * width : (rank + 1) * width].contiguous()

        labels = columns(self.labels)
        return replace(
            self,
            tokens=columns(self.tokens),
            labels=labels,
            docs=docs,
            positions=columns(self.positions),
            source=columns(self.source),
            num_targets=int((labels != IGNORE).sum()),
            loss_weights=None if self.loss_weights is None else columns(self.loss_weights),
        )

    def to(self, device: torch.device | str) -> Batch:
        names = ("tokens", "labels", "positions", "source", "block", "run")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        weights = None if self.loss_weights is None else self.loss_weights.to(device, non_blocking=True)
        return replace(self, **moved, docs=self.docs.to(device), loss_weights=weights)


def make_batch(
    tokens: Tensor,
    ids: Tensor,
    *,
    source: Tensor,
    block: Tensor,
    run: Tensor | None = None,
    log_length: int = 1,
    before: Tensor | None = None,
    padding: Tensor | None = None,
    targets: Tensor | None = None,
    labels: Tensor | None = None,
) -> Batch:
    """A batch from whole windows.

    tokens: int ``[B, T + 1]``: inputs are ``[:, :T]``, labels ``[:, 1:]``. ids: int32 ``[B, T + 1]`` document ids.
    A label whose document differs from its input's is ignored. padding: bool ``[B, T + 1]``, True where no token is.
    targets: bool ``[B, T + 1]``, True for the tokens that may be labels; None: all. labels: int32 ``[B, T]``, what is
    asked after each input, ``IGNORE`` where nothing is; None: the next token.
    """
    asked = tokens[:, 1:].to(torch.int32) if labels is None else labels
    ignored = ids[:, 1:] != ids[:, :-1]
    if padding is not None:
        ignored = ignored | padding[:, 1:] | padding[:, :-1]
    if targets is not None:
        ignored = ignored | ~targets[:, 1:]
    if labels is not None:
        ignored = ignored | (labels == IGNORE)
    docs = Documents.from_ids(ids[:, :-1].contiguous(), before)
    return Batch(
        tokens=tokens[:, :-1].to(torch.int32).contiguous(),
        labels=asked.masked_fill(ignored, IGNORE).contiguous(),
        docs=docs,
        positions=docs.positions(),
        source=source.to(torch.int32),
        block=block.to(torch.int64),
        run=block.to(torch.int64) if run is None else run.to(torch.int64),
        num_targets=asked.numel() - int(torch.count_nonzero(ignored)),
        log_length=log_length,
    )
