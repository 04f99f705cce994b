"""causal-conv1d as backend ``causal_conv1d``: a CUDA kernel, at the signature of version 1.6.1.

    causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False,
                     final_states_out=None, activation=None)

Rows are ``[B, C, T]`` there, with C innermost in memory, a tail ``[B, C, W-1]``. It sees a whole tail or documents,
never both: where a row has both, the tail becomes columns of the first document.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmtrain.ops import library
from lmtrain.ops.adapters import needs
from lmtrain.ops.documents import Documents
from lmtrain.ops.op import compute_dtype

BACKEND = library.Backend(
    "causal_conv1d",
    "cuda",
    frozenset({torch.float32, torch.bfloat16}),
    needs("causal_conv1d"),
    lacks="kernels of other than 2 to 4 taps, channels not in eights, the same bits in repeated runs",
)


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, docs: Documents | None, tail: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """``lmtrain.ops.causal_conv1d`` of checked inputs. Raises UsageError for widths it does not serve."""
    from causal_conv1d import causal_conv1d_fn

    length, width, channels = x.shape[1], weight.shape[1], x.shape[2]
    if not 2 <= width <= 4:
        raise library.unserved("causal_conv1d", BACKEND.name, x, f"{width} taps (2 to 4)")
    if channels % 8:
        raise library.unserved("causal_conv1d", BACKEND.name, x, f"{channels} channels (multiples of 8)")
    left = x.new_zeros(x.shape[0], width - 1, channels) if tail is None else tail
    final = torch.cat([left, x], dim=1)[:, length:].contiguous()
    if not x.numel():
        return x, final
    ids = None if docs is None or docs.single else docs.ids - docs.ids[:, :1]  # a negative id would mean padding
    if tail is not None and docs is not None:
        distance = torch.arange(width - 1, 0, -1, device=x.device)
        left = torch.where((distance <= docs.before[:, None])[..., None], left, left.new_zeros(()))
    if tail is not None and ids is not None:
        x, ids = torch.cat([left, x], dim=1), torch.nn.functional.pad(ids, (width - 1, 0))
    y = causal_conv1d_fn(
        x.contiguous().transpose(1, 2),
        weight.to(compute_dtype(x)),
        None if bias is None else bias.to(compute_dtype(x)),
        seq_idx=None if ids is None else ids.contiguous(),
        initial_states=left.contiguous().transpose(1, 2) if tail is not None and ids is None else None,
        activation=None if activation == "none" else activation,
    )
    return y.transpose(1, 2)[:, -length:], final
