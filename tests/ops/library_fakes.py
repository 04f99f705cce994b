"""The functions of other projects' libraries that adapters call, in plain torch: their signatures, their conventions.

Each has the parameters of the version it names, and computes token by token what that version documents, so that an
adapter's translation can be held to our definitions without a GPU.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

Step = Callable[[Tensor, dict[str, Tensor]], tuple[Tensor, Tensor]]


class Fake(types.ModuleType):
    """A library that is not there."""


def install(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make every fake importable as its original is. Returns the list of names called, as it grows."""
    called: list[str] = []
    for path, functions in MODULES.items():
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            if not isinstance(sys.modules.get(name), Fake):
                monkeypatch.setitem(sys.modules, name, Fake(name))
        for function in functions:
            setattr(sys.modules[path], function.__name__, _noted(function, called))
    return called


def _noted(function: Callable[..., Any], called: list[str]) -> Callable[..., Any]:
    def noting(*arguments: Any, **named: Any) -> Any:
        called.append(function.__name__)
        return function(*arguments, **named)

    return noting


# --- flash-linear-attention: fla-core 0.6.0, fla/ops/<op>/chunk.py


def _chunked(
    step: Step,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    heads: int,
    **rows: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Steps along every sequence: the rows, or those that cu_seqlens cuts the only row into."""
    v, k = rows["v"], rows["k"]
    if cu_seqlens is None:
        spans = [(row, 0, v.shape[1]) for row in range(v.shape[0])]
    else:
        assert v.shape[0] == 1 and cu_seqlens.dtype == torch.int64
        borders = cu_seqlens.tolist()
        assert borders[0] == 0 and borders[-1] == v.shape[1] and all(low < high for low, high in pairwise(borders))
        spans = [(0, low, high) for low, high in pairwise(borders)]
    shape = (len(spans), heads, k.shape[-1], v.shape[-1])
    assert initial_state is None or (tuple(initial_state.shape) == shape and initial_state.dtype != torch.bfloat16)
    states = v.new_zeros(shape, dtype=torch.promote_types(v.dtype, torch.float32))
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    outputs, finals = [], []
    for span, (row, low, high) in enumerate(spans):
        state = states[span] if initial_state is None else initial_state[span]
        for t in range(low, high):
            y, state = step(state, {name: tensor[row, t].to(state.dtype) for name, tensor in rows.items()})
            outputs.append(scale * y)
        finals.append(state)
    return torch.stack(outputs).view(v.shape).to(v.dtype), torch.stack(finals) if output_final_state else None


def _read(state: Tensor, query: Tensor) -> Tensor:
    return torch.einsum("hkv,hk->hv", state, query)


def _write(key: Tensor, value: Tensor) -> Tensor:
    return key[:, :, None] * value[:, None, :]


def chunk_gla(
    q, k, v, g, scale=None, initial_state=None, output_final_state=False, state_v_first=False, cu_seqlens=None,
    cu_seqlens_cpu=None,
):  # fmt: skip
    def step(state: Tensor, at: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        state = at["g"].exp()[:, :, None] * state + _write(at["k"], at["v"])
        return _read(state, at["q"]), state

    return _chunked(step, scale, initial_state, output_final_state, cu_seqlens, v.shape[2], q=q, k=k, v=v, g=g)


def chunk_simple_gla(
    q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False, state_v_first=False,
    cu_seqlens=None, cu_seqlens_cpu=None, **kwargs,
):  # fmt: skip
    def step(state: Tensor, at: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        state = at["g"].exp()[:, None, None] * state + _write(at["k"], at["v"])
        return _read(state, at["q"]), state

    assert q.shape == k.shape and q.shape[2] == v.shape[2]
    return _chunked(step, scale, initial_state, output_final_state, cu_seqlens, v.shape[2], q=q, k=k, v=v, g=g)


def chunk_rwkv6(
    r, k, v, w, u, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, cu_seqlens_cpu=None,
    **kwargs,
):  # fmt: skip
    def step(state: Tensor, at: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        written = _write(at["k"], at["v"])
        y = _read(state + u[:, :, None] * written, at["r"])
        return y, at["w"].exp()[:, :, None] * state + written

    return _chunked(step, scale, initial_state, output_final_state, cu_seqlens, v.shape[2], r=r, k=k, v=v, w=w)


def _delta_step(decay: Callable[[Tensor], Tensor], group: int) -> Step:
    def step(state: Tensor, at: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        query, key = (at[name].repeat_interleave(group, dim=0) for name in ("q", "k"))
        state = decay(at["g"]) * state if "g" in at else state
        state = state + _write(key, at["beta"][:, None] * (at["v"] - _read(state, key)))
        return _read(state, query), state

    return step


def chunk_delta_rule(
    q, k, v, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
    cu_seqlens=None, cu_seqlens_cpu=None, **kwargs,
):  # fmt: skip
    assert q.dtype == k.dtype == v.dtype != torch.float32
    assert q.shape[2] == v.shape[2]
    step = _delta_step(torch.exp, 1)
    return _chunked(step, scale, initial_state, output_final_state, cu_seqlens, v.shape[2], q=q, k=k, v=v, beta=beta)


def chunk_gated_delta_rule(
    q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
    use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, state_v_first=False, cu_seqlens=None,
    cu_seqlens_cpu=None, chunk_indices=None, cp_context=None, **kwargs,
):  # fmt: skip
    assert g.shape == beta.shape == v.shape[:3]
    step, heads = _delta_step(lambda g: g.exp()[:, None, None], v.shape[2] // q.shape[2]), v.shape[2]
    return _chunked(step, scale, initial_state, output_final_state, cu_seqlens, heads, q=q, k=k, v=v, g=g, beta=beta)


def chunk_kda(
    q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
    use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, safe_gate=False,
    lower_bound=None, disable_recompute=False, return_intermediate_states=False, state_v_first=False, cu_seqlens=None,
    cu_seqlens_cpu=None, cp_context=None, use_graph=False, max_num_seqs=None, **kwargs,
):  # fmt: skip
    assert g.shape == (*v.shape[:3], k.shape[3])
    step, heads = _delta_step(lambda g: g.exp()[:, :, None], v.shape[2] // q.shape[2]), v.shape[2]
    return _chunked(step, scale, initial_state, output_final_state, cu_seqlens, heads, q=q, k=k, v=v, g=g, beta=beta)


def chunk_rwkv7(
    r, w, k, v, a, b, scale=1.0, initial_state=None, output_final_state=False, cu_seqlens=None, cu_seqlens_cpu=None,
    safe_gate=False, chunk_size=None, disable_recompute=False, cp_context=None, lower_bound=None,
):  # fmt: skip
    def step(state: Tensor, at: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        read = _read(state, at["a"])
        state = at["w"].exp()[:, :, None] * state + _write(at["b"], read) + _write(at["k"], at["v"])
        return _read(state, at["r"]), state

    rows = {"r": r, "w": w, "k": k, "v": v, "a": a, "b": b}
    return _chunked(step, scale, initial_state, output_final_state, cu_seqlens, v.shape[2], **rows)


# --- causal-conv1d 1.6.1, causal_conv1d/causal_conv1d_interface.py and csrc/causal_conv1d.cpp


def causal_conv1d_fn(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None,
    activation=None,
):  # fmt: skip
    (batch, channels, length), width = x.shape, weight.shape[1]
    assert activation in (None, "silu", "swish") and 2 <= width <= 4
    assert x.stride(1) == 1 and channels % 8 == 0 and x.stride(0) % 8 == 0 and x.stride(2) % 8 == 0
    assert seq_idx is None or initial_states is None
    left = x.new_zeros(batch, channels, width - 1)
    if initial_states is not None:
        assert initial_states.shape == left.shape and initial_states.stride(1) == 1
        assert initial_states.dtype == x.dtype
        left = initial_states
    row = torch.cat([left, x], dim=2)
    y = torch.zeros_like(x) if bias is None else bias[:, None].expand_as(x)
    if seq_idx is not None:
        assert seq_idx.shape == (batch, length) and seq_idx.dtype == torch.int32 and seq_idx.is_contiguous()
        assert int(seq_idx.min()) >= 0
        of = F.pad(seq_idx, (width - 1, 0), value=-1)
    for tap in range(width):
        seen = row[:, :, tap : tap + length]
        if seq_idx is not None:
            seen = torch.where((of[:, tap : tap + length] == seq_idx)[:, None], seen, seen.new_zeros(()))
        y = y + weight[:, tap, None] * seen
    return F.silu(y) if activation else y


# --- mamba-ssm 2.3.2, mamba_ssm/ops/selective_scan_interface.py


class _LastState(torch.autograd.Function):
    """ "Note that the gradient of the last state is not considered in the backward pass"."""

    @staticmethod
    def forward(ctx: Any, state: Tensor) -> Tensor:
        return state.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.zeros_like(grads[0])


def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):  # fmt: skip
    batch, channels, length = u.shape
    assert u.dtype == delta.dtype == B.dtype == C.dtype and u.stride(-1) == 1
    B, C = (t.repeat_interleave(channels // t.shape[1], dim=1) for t in (B, C))
    state, outputs = u.new_zeros(batch, channels, A.shape[1]), []
    for t in range(length):
        state = (delta[:, :, t, None] * A).exp() * state + (delta * u)[:, :, t, None] * B[..., t]
        outputs.append((state * C[..., t]).sum(dim=-1))
    y = torch.stack(outputs, dim=2)
    return (y, _LastState.apply(state)) if return_last_state else y


# --- flash-attn 2.8.4, flash_attn/flash_attn_interface.py


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    assert q.dtype == k.dtype == v.dtype and q.shape[2] == k.shape[2] == v.shape[2] and q.shape[2] % 8 == 0
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    group, left, outputs = q.shape[1] // k.shape[1], window_size[0], []
    keys, values = (t.repeat_interleave(group, dim=1) for t in (k, v))
    for (low_q, high_q), (low, high) in zip(
        pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True
    ):
        assert high_q - low_q <= max_seqlen_q and high - low <= max_seqlen_k
        scores = torch.einsum("ihd,jhd->hij", q[low_q:high_q], keys[low:high])
        scores = scores * (q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale)
        column = torch.arange(high_q - low_q)[:, None] + (high - low) - (high_q - low_q)
        distance = column - torch.arange(high - low)
        mask = distance >= (0 if causal else -window_size[1] if window_size[1] >= 0 else -(high - low))
        mask = mask if left < 0 else mask & (distance <= left)
        weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
        outputs.append(torch.einsum("hij,jhd->ihd", weights, values[low:high]))
    return torch.cat(outputs)


MODULES: dict[str, tuple[Callable[..., Any], ...]] = {
    "fla.ops.gla": (chunk_gla,),
    "fla.ops.simple_gla": (chunk_simple_gla,),
    "fla.ops.rwkv6": (chunk_rwkv6,),
    "fla.ops.rwkv7": (chunk_rwkv7,),
    "fla.ops.delta_rule": (chunk_delta_rule,),
    "fla.ops.gated_delta_rule": (chunk_gated_delta_rule,),
    "fla.ops.kda": (chunk_kda,),
    "causal_conv1d": (causal_conv1d_fn,),
    "mamba_ssm.ops.selective_scan_interface": (selective_scan_fn,),
    "flash_attn": (flash_attn_varlen_func,),
}
