"""Which tokens of a row belong together: the only thing ops and contexts know about documents."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Document structure of a batch of rows, made on the host; plain data, never an argument of a module.

    One masking rule holds everywhere: column i sees column j iff ``0 <= i - j <= positions[i]``
    (j < 0: a halo, a convolution tail, a cache).

    ids: int32 ``[B, T]``, non-decreasing along T.
    before: int32 ``[B]``: tokens of column 0's document that lie left of column 0 and are held by the row or its
        carried state. A row drops its initial state iff ``before == 0``.
    cu_seqlens: int32 ``[spans + 1]``: span borders over the flattened ``[B * T]``; every row starts a span.
    max_len: the longest span.
    whole: the uncut row's Documents when this is a shard of it, else None.
    """

    ids: Tensor
    before: Tensor
    cu_seqlens: Tensor
    max_len: int
    whole: Documents | None = None

    @classmethod
    def from_ids(cls, ids: Tensor, before: Tensor | None = None, whole: Documents | None = None) -> Documents:
        """Documents of host-side integers ``ids`` ``[B, T]``; ``before`` ``[B]`` is 0 for every row unless given.

        Raises ValueError naming the argument, what was expected and what was got.
        """
        if ids.dim() != 2:
            raise ValueError(f"documents: ids must be [B, T], got shape {tuple(ids.shape)}")
        before = ids.new_zeros(ids.shape[0]) if before is None else before
        if before.shape != ids.shape[:1]:
            raise ValueError(f"documents: before: expected shape [{ids.shape[0]}], got {list(before.shape)}")
        for name, tensor in {"ids": ids, "before": before}.items():
            if tensor.is_floating_point() or tensor.is_complex():
                raise ValueError(f"documents: {name}: expected integers, got {tensor.dtype}")
        if bool((before < 0).any()):
            raise ValueError(f"documents: before: expected counts of tokens, got {int(before.min())}")
        rows, length = ids.shape
        if length > 1 and bool((ids[:, 1:] < ids[:, :-1]).any()):
            raise ValueError("documents: ids must not decrease along a row")
        ids, before = ids.to(torch.int32), before.to(torch.int32)
        opens = torch.ones_like(ids, dtype=torch.bool)
        opens[:, 1:] = ids[:, 1:] != ids[:, :-1]
        borders = torch.nonzero(opens.reshape(-1)).reshape(-1)
        cu_seqlens = torch.cat([borders, torch.tensor([rows * length])]).to(torch.int32)
        max_len = int((cu_seqlens[1:] - cu_seqlens[:-1]).max()) if ids.numel() else 0
        return cls(ids, before, cu_seqlens, max_len, whole)

    @property
    def shape(self) -> tuple[int, int]:
        return self.ids.shape[0], self.ids.shape[1]

    @property
    def single(self) -> bool:
        """Whether every row lies within one document (known on the host, without a device sync)."""
        return self.cu_seqlens.shape[0] - 1 == self.ids.shape[0]

    def starts(self) -> Tensor:
        """bool ``[B, T]``: True where a document starts; column 0 only where ``before == 0``."""
        starts = torch.empty_like(self.ids, dtype=torch.bool)
        starts[:, 1:] = self.ids[:, 1:] != self.ids[:, :-1]
        starts[:, :1] = (self.before == 0)[:, None]
        return starts

    def positions(self) -> Tensor:
        """int32 ``[B, T]``: tokens of the same document to the left, those in ``before`` included."""
        column = torch.arange(self.ids.shape[1], dtype=torch.int32, device=self.ids.device).expand_as(self.ids)
        opened = torch.where(self.starts(), column, column.new_full((), -1)).cummax(dim=1).values
        return torch.where(opened >= 0, column - opened, column + self.before[:, None]).to(torch.int32)

    def cut(self, rank: int, size: int) -> Documents:
        """The contiguous shard ``rank`` of ``size`` of every row; ``whole`` keeps the uncut row."""
        length = self.ids.shape[1]
        if length % size:
            raise ValueError(f"documents: {length} columns do not divide into {size} shards")
        if size == 1:
            return self
        width = length // size
        lo = rank * width
        return Documents.from_ids(self.ids[:, lo : lo + width].contiguous(), self.positions()[:, lo], whole=self)

    def to(self, device: torch.device | str) -> Documents:
        whole = None if self.whole is None else self.whole.to(device)
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("ids", "before", "cu_seqlens")}
        return replace(self, **moved, whole=whole)
