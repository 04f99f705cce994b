"""Causal softmax attention within documents, with its log-sum-exp."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lmtrain.ops import library
from lmtrain.ops.adapters import flash_attn
from lmtrain.ops.documents import Documents
from lmtrain.ops.op import Cost, check_row, check_shape, compute_dtype


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
    ``offset`` (default ``Tk - Tq``: bottom-right aligned). Every query must see itself. Returns o ``[B, Tq, Hq, V]`` in
    v's dtype and lse ``[B, Tq, Hq]`` in the computing dtype.

    window: columns a query sees, its own included. softcap: scores become ``softcap tanh(score / softcap)``. sinks
    ``[Hq]``: one more logit per head, which has no value (gpt-oss); o counts it and lse does not, so that parts of a
    row can be merged. extra_kv: ``(k [Hkv, N, K], v [Hkv, N, V])`` that every query sees, wherever it stands
    (persistent memory, arXiv 1907.01470).
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
        softcap: float | None = None,
        sinks: Tensor | None = None,
        extra_kv: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The definition. Raises ValueError naming the argument, what was expected and what was got."""
        self._check(q, k, v, positions, window, softcap, sinks, extra_kv)
        batch, num_queries, num_heads, head_dim = q.shape
        num_kv, dtype = k.shape[2], compute_dtype(v)
        mask = visible(positions, k.shape[1], k.shape[1] - num_queries if offset is None else offset, window)
        k, v, mask = _join(k, v, mask, extra_kv)
        grouped = q.to(dtype).reshape(batch, num_queries, num_kv, num_heads // num_kv, head_dim)
        scores = torch.einsum("bighk,bjgk->bghij", grouped * scale, k.to(dtype))
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
        lse = torch.logsumexp(scores, dim=-1)
        o = torch.einsum("bghij,bjgv->bighv", torch.exp(scores - lse[..., None]), v.to(dtype))
        o = o.reshape(batch, num_queries, num_heads, v.shape[-1])
        lse = lse.permute(0, 3, 1, 2).reshape(batch, num_queries, num_heads)
        if sinks is not None:
            o = o * torch.sigmoid(lse - sinks.to(dtype))[..., None]
        return o.to(v.dtype), lse

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
        softcap: float | None = None,
        sinks: Tensor | None = None,
        extra_kv: tuple[Tensor, Tensor] | None = None,
        causal: bool = False,
        docs: Documents | None = None,
    ) -> Tensor:
        """o alone, by the fastest backend; with a softcap, which torch's fused form lacks, by the definition.

        causal: the caller knows that every query sees all columns up to its own. docs: the documents of the rows, where
        queries and keys are the columns of the same rows.
        """
        backend = library.backend(self.name, v.device.type, v.dtype)
        if backend == "flash_attn":
            if softcap is not None or sinks is not None or extra_kv is not None:
                raise library.unserved(self.name, backend, v, "a softcap, sinks or extra_kv")
            return flash_attn.attention(q, k, v, docs, window=window, scale=scale, offset=offset)
        if backend == "reference" or softcap is not None:
            options = {"softcap": softcap, "sinks": sinks, "extra_kv": extra_kv}
            return self(q, k, v, positions=positions, window=window, scale=scale, offset=offset, **options)[0]  # type: ignore[arg-type]
        self._check(q, k, v, positions, window, softcap, sinks, extra_kv)
        for name, tensor in {"q": q, "k": k}.items():  # the definition converts, torch's fused form does not
            if tensor.dtype != v.dtype:
                raise ValueError(f"attention: {name}: expected dtype {v.dtype} as v, got {tensor.dtype}")
        whole = sinks is None and extra_kv is None and window is None
        plain = causal and whole and q.shape[1] == k.shape[1] and not offset
        mask = None
        if not plain:
            mask = visible(positions, k.shape[1], k.shape[1] - q.shape[1] if offset is None else offset, window)
            k, v, mask = _join(k, v, mask, extra_kv)
        if sinks is not None:
            assert mask is not None
            q, k, v, mask = _with_sink_column(q, k, v, mask, sinks / scale)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mask = None if mask is None else mask[:, None]
        o = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=plain, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        ).transpose(1, 2)
        return o if sinks is None else o[..., :-1]

    def cost(self, q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], docs: Documents | None = None) -> Cost:
        """Causal pairs count half of the square; the explicit form executes the whole of it."""
        batch, num_queries, num_heads, head_dim = q
        pairs = batch * num_heads * num_queries * k[1]
        flops = 2 * pairs * (head_dim + v[-1])
        size = 4 * (batch * num_queries * num_heads * (head_dim + v[-1]) + batch * k[1] * k[2] * (head_dim + v[-1]))
        return Cost(flops // 2, flops, size + 8 * pairs)

    def _check(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
        extra_kv: tuple[Tensor, Tensor] | None,
    ) -> None:
        check_shape(self.name, "q", q, (None, None, None, None))
        batch, num_queries, num_heads, head_dim = q.shape
        check_shape(self.name, "k", k, (batch, None, None, head_dim))
        num_kv = k.shape[2]
        check_shape(self.name, "v", v, (*k.shape[:3], None))
        check_shape(self.name, "positions", positions, (batch, num_queries))
        if positions.is_floating_point():
            raise ValueError(f"attention: positions: expected integers, got {positions.dtype}")
        if window is not None and window < 1:
            raise ValueError(f"attention: window: expected at least 1, the query's own column, got {window}")
        if softcap is not None and not softcap > 0:
            raise ValueError(f"attention: softcap: expected above 0, got {softcap}")
        if num_kv == 0 or num_heads % num_kv:
            raise ValueError(f"attention: q: expected heads in multiples of the {num_kv} key heads, got {num_heads}")
        if sinks is not None:
            check_shape(self.name, "sinks", sinks, (num_heads,))
        if extra_kv is not None:
            check_shape(self.name, "extra_kv[0]", extra_kv[0], (num_kv, None, head_dim))
            check_shape(self.name, "extra_kv[1]", extra_kv[1], (num_kv, extra_kv[0].shape[1], v.shape[3]))
        extra = None if extra_kv is None else extra_kv[0]
        check_row(self.name, "v", v, None, q=q, k=k, sinks=sinks, extra_kv=extra)
        if positions.device != v.device:
            raise ValueError(f"attention: positions: expected device {v.device} as v, got {positions.device}")


def _join(k: Tensor, v: Tensor, mask: Tensor, extra_kv: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
    """The extra columns on the left of the others, and the mask ``[B, Tq, *]`` of all."""
    if extra_kv is None:
        return k, v, mask
    more_k, more_v = (t.to(v.dtype).transpose(0, 1).expand(v.shape[0], -1, -1, -1) for t in extra_kv)
    seen = mask.new_ones(*mask.shape[:2], more_k.shape[1])
    return torch.cat([more_k, k], dim=1), torch.cat([more_v, v], dim=1), torch.cat([seen, mask], dim=2)


def _with_sink_column(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A sink as a column that all see: one more channel in which q holds the sink, this key 1, the other keys 0.

    It has no value, and values get a channel of zeros too, for the fused forms want one width.
    """
    q = torch.cat([q, sinks.to(q.dtype)[:, None].expand(*q.shape[:3], 1)], dim=-1)
    k, v = F.pad(k, (0, 1)), F.pad(v, (0, 1))
    column = F.pad(k.new_ones(k.shape[0], 1, k.shape[2], 1), (k.shape[3] - 1, 0))
    k, v = torch.cat([column, k], dim=1), torch.cat([torch.zeros_like(v[:, :1]), v], dim=1)
    return q, k, v, torch.cat([mask.new_ones(*mask.shape[:2], 1), mask], dim=2)


attention = Attention()
# torch's fused form; in fp64, where proofs are made, the definition
library.register(
    attention.name,
    library.Backend("torch", dtypes=frozenset({torch.float32, torch.bfloat16})),
    flash_attn.BACKEND,
    library.Backend("reference"),
)
