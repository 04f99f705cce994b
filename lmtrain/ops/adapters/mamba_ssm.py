"""mamba-ssm as backend ``mamba_ssm``: the CUDA selective scan, at the signature of version 2.3.2.

    selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                      return_last_state=False)

Rows are ``[B, D, T]`` there, B and C ``[B, G, N, T]``. It starts from zero, knows no documents and gives no gradient of
the last state. Its mamba_chunk_scan_combined is no backend of ``ssd``: it takes dt and A where the op takes x dt and
log a, which a zero log decay does not give back, and it sums decays across documents before it masks them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmtrain.ops import library
from lmtrain.ops.adapters import needs
from lmtrain.ops.documents import Documents
from lmtrain.ops.op import compute_dtype

MAX_STATE = 256

BACKEND = library.Backend(
    "mamba_ssm",
    "cuda",
    frozenset({torch.float32, torch.bfloat16}),
    needs("mamba_ssm"),
    lacks="documents within a row, an initial state, the final state's gradient, decay=longhorn, "
    f"states wider than {MAX_STATE}, the same bits in repeated runs",
)


class _WithoutGradient(torch.autograd.Function):
    """Identity that refuses a gradient."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, y: Tensor) -> Tensor:
        ctx.refusal = library.unserved("selective_scan", BACKEND.name, y, "the gradient of the final state")
        return state.view_as(state)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        raise ctx.refusal


def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor | None,
    b: Tensor,
    c: Tensor,
    docs: Documents | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``lmtrain.ops.selective_scan`` of checked inputs. Raises UsageError for a call that it cannot serve."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    refused = {
        "decay=longhorn": a is None,
        "documents within a row": docs is not None and not docs.single,
        "an initial state": initial_state is not None,
        "an empty row": not x.numel(),
        f"states of {b.shape[3]} (up to {MAX_STATE})": b.shape[3] > MAX_STATE,
    }
    for combination, found in refused.items():
        if found:
            raise library.unserved("selective_scan", BACKEND.name, x, combination)
    assert a is not None
    values, dt, rates, b, c = (t.to(compute_dtype(x)) for t in (x, dt, a, b, c))
    y, state = selective_scan_fn(
        values.transpose(1, 2).contiguous(),
        dt.transpose(1, 2).contiguous(),
        rates.contiguous(),
        b.permute(0, 2, 3, 1).contiguous(),
        c.permute(0, 2, 3, 1).contiguous(),
        return_last_state=True,
    )
    return y.transpose(1, 2).to(x.dtype), _WithoutGradient.apply(state, y)
