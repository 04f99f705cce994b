"""flash-linear-attention as backend ``fla``: Triton kernels for CUDA, at the signatures of fla-core 0.6.0.

    gla     fla.ops.gla.chunk_gla; with u fla.ops.rwkv6.chunk_rwkv6
    ssd     fla.ops.simple_gla.chunk_simple_gla; it has no groups: B and C are repeated to one per head
    delta   fla.ops.delta_rule.chunk_delta_rule without g (q and k repeated to one per value head),
            fla.ops.gated_delta_rule.chunk_gated_delta_rule with g per head, fla.ops.kda.chunk_kda with g per channel
    dplr    fla.ops.rwkv7.chunk_rwkv7

As here, rows are ``[B, T, H, *]``, states ``[K, V]`` in fp32, log decays natural and summed in fp32. Unlike here, q is
multiplied by ``K ** -0.5`` unless ``scale`` says otherwise, and documents are sequences of one row: ``cu_seqlens`` over
the flattened rows, with a state for each. Every sequence is cut into chunks of its own, so documents stay independent
to the bit. In bf16 alone: Triton multiplies fp32 in tf32. Its tiles are tuned by timing: the bits are the same within a
process, and may differ in the next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lmtrain.ops import library
from lmtrain.ops.adapters import needs
from lmtrain.ops.documents import Documents
from lmtrain.ops.op import compute_dtype

MAX_KEY_DIM = 256

_BF16 = frozenset({torch.bfloat16})
WHOLE = library.Backend("fla", "cuda", _BF16, needs("fla"))
UP_TO_256 = library.Backend("fla", "cuda", _BF16, needs("fla"), lacks=f"key heads wider than {MAX_KEY_DIM}")


def gla(
    v: Tensor, q: Tensor, k: Tensor, g: Tensor, u: Tensor | None, docs: Documents | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``lmtrain.ops.gla`` of checked inputs."""
    from fla.ops.gla import chunk_gla
    from fla.ops.rwkv6 import chunk_rwkv6

    logs, queries, keys = g.to(compute_dtype(v)), q.to(v.dtype), k.to(v.dtype)
    if u is None:
        return _sequences(chunk_gla, docs, initial_state, q=queries, k=keys, v=v, g=logs)

    def kernel(**arguments: Any) -> tuple[Tensor, Tensor]:
        return chunk_rwkv6(u=u.to(logs.dtype), **arguments)

    return _sequences(kernel, docs, initial_state, r=queries, k=keys, v=v, w=logs)


def ssd(
    x: Tensor, log_a: Tensor, b: Tensor, c: Tensor, docs: Documents | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``lmtrain.ops.ssd`` of checked inputs."""
    from fla.ops.simple_gla import chunk_simple_gla

    keys, queries = (_per_head(t, x).to(x.dtype) for t in (b, c))
    logs = log_a.to(compute_dtype(x))
    return _sequences(chunk_simple_gla, docs, initial_state, q=queries, k=keys, v=x, g=logs)


def delta(
    v: Tensor,
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    g: Tensor | None,
    docs: Documents | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``lmtrain.ops.delta`` of checked inputs. Raises UsageError for key heads that are too wide."""
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.kda import chunk_kda

    _check_key_dim("delta", v, k)
    dtype = compute_dtype(v)
    queries, keys, rates = q.to(v.dtype), k.to(v.dtype), beta.to(dtype)
    if g is None:
        queries, keys = _per_head(queries, v), _per_head(keys, v)
        return _sequences(chunk_delta_rule, docs, initial_state, q=queries, k=keys, v=v, beta=rates)
    kernel = chunk_gated_delta_rule if g.dim() == 3 else chunk_kda
    return _sequences(kernel, docs, initial_state, q=queries, k=keys, v=v, g=g.to(dtype), beta=rates)


def dplr(
    v: Tensor,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    a: Tensor,
    b: Tensor,
    docs: Documents | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``lmtrain.ops.dplr`` of checked inputs. Raises UsageError for key heads that are too wide."""
    from fla.ops.rwkv7 import chunk_rwkv7

    _check_key_dim("dplr", v, k)
    r, k, a, b = (t.to(v.dtype) for t in (r, k, a, b))
    return _sequences(chunk_rwkv7, docs, initial_state, r=r, w=w.to(compute_dtype(v)), k=k, v=v, a=a, b=b)


def _sequences(
    kernel: Callable[..., tuple[Tensor, Tensor]], docs: Documents | None, initial_state: Tensor | None, **rows: Tensor
) -> tuple[Tensor, Tensor]:
    """y and the rows' final states of ``kernel`` over ``rows`` ``[B, T, ...]``, each document a sequence.

    A row's state enters its first document and leaves its last.
    """
    v, keys = rows["v"], rows["k"]
    batch, length, heads, width = v.shape
    if not length or not batch:
        empty = v.new_zeros(batch, heads, keys.shape[-1], width, dtype=compute_dtype(v))
        return v, empty if initial_state is None else initial_state.to(empty.dtype)
    if initial_state is not None:
        initial_state = initial_state.to(compute_dtype(v))
    settings: dict[str, Any] = {"scale": 1.0, "output_final_state": True}
    if docs is None or docs.single:
        y, state = kernel(**rows, initial_state=initial_state, **settings)
        return y.to(v.dtype), state
    borders = docs.cu_seqlens.long()
    columns = torch.arange(batch + 1, device=borders.device) * length
    first = torch.searchsorted(borders, columns)  # of each row, among the documents of all rows
    if initial_state is not None:
        fresh = initial_state.new_zeros(borders.shape[0] - 1, *initial_state.shape[1:])
        initial_state = fresh.index_copy(0, first[:-1], initial_state)
    flat = {name: t.reshape(1, batch * length, *t.shape[2:]) for name, t in rows.items()}
    y, states = kernel(**flat, initial_state=initial_state, cu_seqlens=borders, **settings)
    return y.reshape(v.shape).to(v.dtype), states.index_select(0, first[1:] - 1)


def _per_head(grouped: Tensor, values: Tensor) -> Tensor:
    """``[B, T, G, K]`` with each group repeated for its heads of ``values`` ``[B, T, H, V]``."""
    return grouped.repeat_interleave(values.shape[2] // grouped.shape[2], dim=2)


def _check_key_dim(op: str, values: Tensor, keys: Tensor) -> None:
    if keys.shape[-1] > MAX_KEY_DIM:
        raise library.unserved(op, "fla", values, f"key heads of {keys.shape[-1]} (up to {MAX_KEY_DIM})")
