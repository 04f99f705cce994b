"""Ops whose transition is a matrix per head, and the chunks that such rows are computed in.

A chunk of Q tokens is affine in the state that enters it:

    y = reader . S + own            S' = gamma . S + end

with ``reader`` ``[Q, K]``, ``own`` ``[Q, V]``, ``gamma`` ``[K, K]``, ``end`` ``[K, V]`` (WY form; arXiv 2406.06484).
Log decays are summed from the writing token to the reading one, within one document: no factor exceeds 1, and documents
stay independent to the bit.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmtrain.ops.documents import Documents
from lmtrain.ops.op import AffineOp, Span, check_row, check_shape, check_static, compute_dtype
from lmtrain.ops.op import starts_of as starts_of


@dataclass(frozen=True)
class Chunks:
    """All chunks of a batch of rows: each tensor ``[B, n, H, ...]`` as in the module, in the computing dtype."""

    reader: Tensor
    own: Tensor
    gamma: Tensor
    end: Tensor


@dataclass(frozen=True)
class Decays:
    """Summed log decays within chunks, ``[B, n, H, ..., W]`` with W = 1 or K, and the pairs they are meant for.

    between: ``[..., i, j, W]``, over the tokens (j, i]; ``seen`` ``[B, n, 1, i, j, 1]``: j <= i of one document.
    entered: ``[..., i, W]``, from the chunk's border to i; ``carried`` ``[B, n, 1, i, 1]``: i is of the document that
    entered the chunk. Elsewhere both are finite and mean nothing.
    """

    between: Tensor
    seen: Tensor
    entered: Tensor
    carried: Tensor

    @property
    def reach(self) -> Tensor:
        """``[..., i, W]``: what is left at token i of the state that entered."""
        return torch.where(self.carried, self.entered.exp(), self.entered.new_zeros(()))

    @property
    def leave(self) -> Tensor:
        """``[..., j, W]``: what is left after the chunk of that which token j wrote."""
        left = self.between[..., -1, :, :]
        return torch.where(self.seen[..., -1, :, :], left.exp(), left.new_zeros(()))


def in_chunks(tensor: Tensor, chunk: int) -> Tensor:
    """``[B, T, ...]`` to ``[B, n, Q, ...]``, the last chunk filled up with zeros."""
    batch, length, *rest = tensor.shape
    count = -(-length // chunk)
    pad = count * chunk - length
    padded = F.pad(tensor, (0, 0) * len(rest) + (0, pad)) if pad else tensor
    return padded.reshape(batch, count, chunk, *rest)


def previous(tensor: Tensor, dim: int) -> Tensor:
    """``tensor`` moved on by one along ``dim``; the first is zeros."""
    first, rest = tensor.narrow(dim, 0, 1), tensor.narrow(dim, 0, tensor.shape[dim] - 1)
    return torch.cat([torch.zeros_like(first), rest], dim=dim)


def decays(logs: Tensor, starts: Tensor) -> Decays:
    """Of log decays ``[B, n, H, Q, W]`` and document starts ``[B, n, Q]``."""
    chunk = logs.shape[3]
    opened = starts.cumsum(dim=2)  # documents opened so far in the chunk
    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=logs.device).tril()
    seen = ((opened[:, :, :, None] == opened[:, :, None, :]) & lower)[:, :, None, :, :, None]
    carried = (opened == 0)[:, :, None, :, None]
    zero = logs.new_zeros(())
    between = torch.where(seen & lower.tril(-1)[:, :, None], logs[..., :, None, :], zero).cumsum(dim=-3)
    return Decays(between, seen, torch.where(carried, logs, zero).cumsum(dim=-2), carried)


def scores(decay: Tensor, keys: Tensor, *readers: Tensor) -> tuple[Tensor, ...]:
    """``[..., i, j]``: <reader_i, decay_ij key_j> for each of ``readers`` ``[..., Q, K]``; decay ``[..., i, j, W]``."""
    if decay.shape[-1] == 1:
        return tuple((reader @ keys.mT) * decay[..., 0] for reader in readers)
    seen = keys[..., None, :, :] * decay
    return (seen @ torch.stack(readers, dim=-1)).unbind(-1)


def fold(chunks: Chunks, state: Tensor) -> tuple[Tensor, Tensor]:
    """State that enters each chunk ``[B, n, H, K, V]``, and the one after the last, from the one before the first."""
    entering = []
    for gamma, end in zip(chunks.gamma.unbind(1), chunks.end.unbind(1), strict=True):
        entering.append(state)
        state = apply(gamma, state) + end
    return torch.stack(entering, dim=1) if entering else state[:, None][:, :0], state


def apply(gamma: Tensor, state: Tensor) -> Tensor:
    """``gamma . state``; a matrix of zeros forgets even infinities; what is finite stays, for gamma's gradient."""
    forgets = (gamma == 0).all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
    return gamma @ torch.where(forgets & ~state.isfinite(), state.new_zeros(()), state)


class MatrixOp(AffineOp):
    """An op with gamma ``[B, H, K, K]`` over a state ``[B, H, K, V]``, computed by chunks in torch."""

    kind = "matrix"
    needs_state = True

    @abstractmethod
    def chunks(self, *inputs: Tensor | None, docs: Documents | None, chunk: int | None) -> Chunks:
        """Checks the inputs (ValueError) and summarises their chunks; ``chunk`` None: the op's own length."""

    def __call__(
        self,
        *inputs: Tensor | None,
        docs: Documents | None = None,
        initial_state: Tensor | None = None,
        **static: Any,
    ) -> tuple[Tensor, Tensor]:
        """y ``[B, T, H, V]`` in the values' dtype and the state after the last column.

        static: ``chunk``, tokens computed at once, which does not change the function. Raises ValueError naming the
        argument, what was expected and what was got.
        """
        check_static(self.name, static, "chunk")
        chunks = self.chunks(*inputs, docs=docs, chunk=static.get("chunk"))
        values = inputs[0]
        assert values is not None
        keys, width = chunks.end.shape[3:]
        state = self.check_state(values, keys, docs, initial_state)
        if state is None:
            state = chunks.end.new_zeros(values.shape[0], values.shape[2], keys, width)
        entering, state = fold(chunks, state)
        y = (chunks.reader @ entering + chunks.own).transpose(2, 3)
        return y.flatten(1, 2)[:, : values.shape[1]].to(values.dtype), state

    def span(self, *inputs: Tensor | None, docs: Documents | None = None) -> Span:
        chunks = self.chunks(*inputs, docs=docs, chunk=None)
        batch, _, heads, size, width = chunks.end.shape
        eye = torch.eye(size, dtype=chunks.end.dtype, device=chunks.end.device).expand(batch, heads, size, size)
        # the transition is what becomes of the identity, beside the state from zero
        both = Chunks(chunks.reader, chunks.own, chunks.gamma, F.pad(chunks.end, (size, 0)))
        gamma, state = fold(both, F.pad(eye, (0, width)))[1].split((size, width), dim=-1)
        return Span(gamma, state)

    def gamma(self, *inputs: Tensor | None, docs: Documents | None = None) -> Tensor:
        """``[B, H, K, K]``: the product of the transitions."""
        return self.span(*inputs, docs=docs).gamma

    def apply(self, gamma: Tensor, state: Tensor) -> Tensor:
        return apply(gamma, state)

    def transpose(self, gamma: Tensor, grad: Tensor) -> Tensor:
        return apply(gamma.mT, grad)

    def outer(self, grad: Tensor, state: Tensor) -> Tensor:
        return grad @ state.mT

    def check_state(self, values: Tensor, keys: int, docs: Documents | None, state: Tensor | None) -> Tensor | None:
        """The initial state in the computing dtype, without the rows whose column 0 starts a document."""
        if state is None:
            return None
        batch, length, heads, width = values.shape
        check_shape(self.name, "initial_state", state, (batch, heads, keys, width))
        check_row(self.name, "v", values, None, initial_state=state)
        state = state.to(compute_dtype(values))
        return state if docs is None or not length else self.drop(state, docs.before)
