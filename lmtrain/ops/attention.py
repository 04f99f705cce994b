"""Causal softmax attention within documents, with its log-sum-exp."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lmtrain.ops import library
from lmtrain.ops.documents import Documents
from lmtrain.ops.op import Cost, check_shape, compute_dtype


def visible(positions: Tensor, num_keys: int, offset: int, window: int | None) -> Tensor:
    """bool ``[B, Tq, Tk]``: query i sees key column ``i + offset - d`` iff ``0 <= d <= positions[i]``, d < window."""
    column = torch.arange(positions.shape[1], device=positions.device) + offset
    distance = column[:, None] - torch.arange(num_keys, device=positions.device)[None, :]
    mask = (distance >= 0) & (distance <= positions[:, :, None])
    return mask if window is None else mask & (distance < window)


class Attention:
    """``o_i = sum_j softmax_j(scale q_i . k_j) v_j`` over the visible j.

    q ``[B, Tq, Hq, K]``, k ``[B, Tk, Hkv, K]``, v ``[B, Tk, Hkv, V]``, positions int32 ``[B, Tq]`` (tokens of the
    query's document to its left); query head h reads key head ``h // (Hq / Hkv)``. Query 0 stands at key column
    ``offset`` (default ``Tk - Tq``: bottom-right aligned). Returns o ``[B, Tq, Hq, V]`` in v's dtype and lse
    ``[B, Tq, Hq]`` in the computing dtype. Every query must see itself.
    """

    name = "attention"

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        positions: Tensor,
        window: int | None = None,
        scale: float,
        offset: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        batch, num_queries, num_heads, head_dim = q.shape
        num_keys, num_kv = k.shape[1], k.shape[2]
        check_shape(self.name, "k", k, (batch, None, None, head_dim))
        check_shape(self.name, "v", v, (batch, num_keys, num_kv, None))
        check_shape(self.name, "positions", positions, (batch, num_queries))
        if num_heads % num_kv:
            raise ValueError(f"attention: {num_heads} query heads do not divide by {num_kv} key heads")
        dtype = compute_dtype(v)
        offset = num_keys - num_queries if offset is None else offset
        grouped = q.to(dtype).reshape(batch, num_queries, num_kv, num_heads // num_kv, head_dim)
        scores = torch.einsum("bighk,bjgk->bghij", grouped * scale, k.to(dtype))
        mask = visible(positions, num_keys, offset, window)[:, None, None]
        scores = scores.masked_fill(~mask, float("-inf"))
        lse = torch.logsumexp(scores, dim=-1)
        weights = torch.exp(scores - lse[..., None])
        o = torch.einsum("bghij,bjgv->bighv", weights, v.to(dtype))
        return (
            o.reshape(batch, num_queries, num_heads, v.shape[-1]).to(v.dtype),
            lse.permute(0, 3, 1, 2).reshape(batch, num_queries, num_heads),
        )

    def output(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        positions: Tensor,
        window: int | None = None,
        scale: float,
        offset: int | None = None,
        causal: bool = False,
    ) -> Tensor:
        """o alone, by the fastest backend. causal: the caller knows that every query sees all columns up to its own."""
        if library.backend(self.name, v.device.type, v.dtype) == "reference":
            return self(q, k, v, positions=positions, window=window, scale=scale, offset=offset)[0]
        plain = causal and window is None and q.shape[1] == k.shape[1] and not offset
        offset = k.shape[1] - q.shape[1] if offset is None else offset
        mask = None if plain else visible(positions, k.shape[1], offset, window)[:, None]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        o = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=plain, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return o.transpose(1, 2)

    def cost(self, q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], docs: Documents | None = None) -> Cost:
        """Causal pairs count half of the square; the explicit form executes the whole of it."""
        batch, num_queries, num_heads, head_dim = q
        pairs = batch * num_heads * num_queries * k[1]
        flops = 2 * pairs * (head_dim + v[-1])
        size = 4 * (batch * num_queries * num_heads * (head_dim + v[-1]) + batch * k[1] * k[2] * (head_dim + v[-1]))
        return Cost(flops // 2, flops, size + 8 * pairs)


attention = Attention()
# torch's fused form; in fp64, where proofs are made, the definition
library.register(
    attention.name,
    library.Backend("torch", dtypes=frozenset({torch.float32, torch.bfloat16})),
    library.Backend("reference"),
)
