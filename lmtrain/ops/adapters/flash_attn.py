"""flash-attn as backend ``flash_attn``: the CUDA kernels of FlashAttention-2, at the signature of version 2.8.4.

    flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False, window_size=(-1, -1), ..., deterministic=False, ...)

Documents are sequences over the flattened rows. Query head h reads key head ``h // (Hq / Hkv)``, as here. Its window
counts the columns left of the query, ours the query too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmtrain.ops import library
from lmtrain.ops.adapters import needs
from lmtrain.ops.documents import Documents

MAX_HEAD_DIM = 256

BACKEND = library.Backend(
    "flash_attn",
    "cuda",
    frozenset({torch.bfloat16}),
    needs("flash_attn"),
    lacks="keys other than the row's own (a cache, gathered shards), values of another width than the keys, "
    f"heads not in eights up to {MAX_HEAD_DIM}",
)


def attention(
    q: Tensor, k: Tensor, v: Tensor, docs: Documents | None, *, window: int | None, scale: float, offset: int | None
) -> Tensor:
    """o of ``lmtrain.ops.attention``. Raises UsageError for a call that it cannot serve.

    docs: the documents of q's rows, which are those of k and v too; None if they are not.
    """
    from flash_attn import flash_attn_varlen_func

    head_dim, width = q.shape[3], v.shape[3]
    refused = {
        "keys other than the row's own": docs is None or q.shape[1] != k.shape[1] or bool(offset),
        f"heads of {head_dim} (eights up to {MAX_HEAD_DIM})": head_dim % 8 != 0 or head_dim > MAX_HEAD_DIM,
        f"values of {width} beside keys of {head_dim}": width != head_dim,
        "an empty row": not q.numel(),
    }
    for combination, found in refused.items():
        if found:
            raise library.unserved("attention", BACKEND.name, v, combination)
    assert docs is not None
    o = flash_attn_varlen_func(
        *(t.to(v.dtype).flatten(0, 1) for t in (q, k, v)),
        cu_seqlens_q=docs.cu_seqlens,
        cu_seqlens_k=docs.cu_seqlens,
        max_seqlen_q=docs.max_len,
        max_seqlen_k=docs.max_len,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        deterministic=True,
    )
    return o.unflatten(0, q.shape[:2])
