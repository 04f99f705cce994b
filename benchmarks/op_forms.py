"""What benchmarks/ops.py measures: each op with its inputs, its forms in plain torch, transformers' form, and the bars.

The torch forms of an op are its own reference at several chunk sizes, and the recurrence over unbound tokens, without
documents, which is what torch runs fastest of that kind. All compute the same function of the same leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from op_roofline import Work, extent, ssd_work
from torch import Tensor
from torch.func import functional_call
from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mamba.modeling_mamba import causal_conv1d_fn, mamba_selective_scan
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated, mamba2_chunk_scan
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru
from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

from lmtrain.ops import causal_conv1d, delta, diag_scan, dplr, gla, library, rmsnorm, selective_scan, ssd, wkv4
from lmtrain.ops.linear_cross_entropy import linear_cross_entropy_sum
from lmtrain.ops.op import Cost

Form = Callable[..., Tensor]
EPS = 1e-5


@dataclass(frozen=True)
class Entry:
    """One op.

    sizes: of its inputs, besides T. inputs: from sizes and T to the leaves; all floating ones get gradients.
    torch, transformers: name -> form, of which the fastest counts; ``default`` is how transformers runs its own.
    cost: of one forward, from sizes and T. bound: what the roofline is made of: FLOPs executed in products, as many
    exponentials as the product of the dims ``exps``, or a copy of inputs and outputs; or, if there is ``work``, from
    sizes and T to that of the forward and the backward, all that it counts.
    faster: at T = 1024, forward and backward, how many times faster than (torch, transformers) it must be; memory: the
    share of torch's peak that it may take.
    """

    sizes: dict[str, int]
    inputs: Callable[..., list[Tensor]]
    ours: Form
    torch: dict[str, Form]
    cost: Callable[..., Cost]
    transformers: dict[str, Form] = field(default_factory=dict)
    default: str | None = None
    bound: Literal["products", "exps", "copy"] = "copy"
    exps: str = ""
    work: Callable[..., tuple[Work, Work]] | None = None
    faster: tuple[float | None, float | None] = (None, None)
    memory: float | None = None


def reference(op: Any, *chunks: int) -> dict[str, Form]:
    """Our own pure-torch backend, at each of these chunk sizes."""

    def at(**static: int) -> Form:
        def form(*inputs: Tensor) -> Tensor:
            library.set_kernels("reference")
            try:
                return op(*inputs, **static)[0]
            finally:
                library.set_kernels("auto")

        return form

    return {f"chunk {chunk}": at(chunk=chunk) for chunk in chunks} or {"reference": at()}


def first(op: Any) -> Form:
    return lambda *inputs: op(*inputs)[0]


def over_time(step: Callable[..., tuple[Tensor, Tensor]], state: Tensor, *inputs: Tensor) -> Tensor:
    outputs = []
    for tokens in zip(*(t.unbind(1) for t in inputs), strict=True):
        y, state = step(state, *tokens)
        outputs.append(y)
    return torch.stack(outputs, dim=1)


def diagonal_loop(x: Tensor, log_a: Tensor) -> Tensor:
    def step(state: Tensor, value: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
        state = decay * state + value
        return state, state

    return over_time(step, torch.zeros_like(x[:, 0]), x, log_a.exp())


def selective_loop(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    def step(state: Tensor, rate: Tensor, value: Tensor, key: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        state = (rate[..., None] * a).exp() * state + value[..., None] * key
        return (state @ query[:, 0, :, None]).squeeze(-1), state

    return over_time(step, x.new_zeros(x.shape[0], *a.shape), dt, dt * x, b, c)


def linear_loop(v: Tensor, q: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """ssd and gla: log decays ``[B, T, H, 1 or K]``."""

    def step(state: Tensor, value: Tensor, query: Tensor, key: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
        state = decay[..., None] * state + key[..., None] * value[..., None, :]
        return (query[..., None, :] @ state).squeeze(-2), state

    return over_time(step, v.new_zeros(v.shape[0], v.shape[2], q.shape[3], v.shape[3]), v, q, k, g.exp())


def delta_loop(v: Tensor, q: Tensor, k: Tensor, beta: Tensor, g: Tensor) -> Tensor:
    def step(state: Tensor, value: Tensor, query: Tensor, key: Tensor, rate: Tensor, decay: Tensor) -> Any:
        state = decay[..., None] * state
        wrong = rate[..., None] * (value - (key[..., None, :] @ state).squeeze(-2))
        state = state + key[..., None] * wrong[..., None, :]
        return (query[..., None, :] @ state).squeeze(-2), state

    decay = (g[..., None] if g.dim() == 3 else g).exp()
    return over_time(step, v.new_zeros(v.shape[0], v.shape[2], q.shape[3], v.shape[3]), v, q, k, beta, decay)


def dplr_loop(v: Tensor, r: Tensor, w: Tensor, k: Tensor, a: Tensor, b: Tensor) -> Tensor:
    def step(state: Tensor, value: Tensor, query: Tensor, decay: Tensor, key: Tensor, read: Tensor, to: Tensor) -> Any:
        kept = decay[..., None] * state + to[..., None] * (read[..., None, :] @ state)
        state = kept + key[..., None] * value[..., None, :]
        return (query[..., None, :] @ state).squeeze(-2), state

    return over_time(step, v.new_zeros(v.shape[0], v.shape[2], r.shape[3], v.shape[3]), v, r, w.exp(), k, a, b)


def wkv4_loop(v: Tensor, k: Tensor, w: Tensor, u: Tensor) -> Tensor:
    def step(state: Tensor, value: Tensor, key: Tensor) -> Any:
        above, below, top = state
        both = torch.maximum(top, key + u)
        old, new = (top - both).exp(), (key + u - both).exp()
        y = (old * above + new * value) / (old * below + new)
        both = torch.maximum(top + w, key)
        old, new = (top + w - both).exp(), (key - both).exp()
        return y, (old * above + new * value, old * below + new, both)

    empty = torch.zeros_like(v[:, 0])
    return over_time(step, (empty, empty, empty - 1e38), v, k)  # type: ignore[arg-type]


def ssd_loop(x: Tensor, log_a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    queries, keys = (t.expand(*x.shape[:3], -1) for t in (c, b))
    return linear_loop(x, queries, keys, log_a[..., None])


def convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = F.conv1d(x.mT, weight[:, None], bias, padding=weight.shape[1] - 1, groups=x.shape[2])
    return F.silu(y[..., : x.shape[1]].mT)


def whole_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), labels.flatten(), reduction="sum")


def rglru_scan(x: Tensor, log_a: Tensor) -> Tensor:
    resets = torch.zeros_like(x, dtype=torch.bool)
    module: Any = None  # which it does not read
    return RecurrentGemmaRglru._rnn_scan(module, x, log_a.exp(), resets, None)[0]


def normed(module: torch.nn.Module, weight: Tensor, *inputs: Tensor) -> Tensor:
    return functional_call(module, {"weight": weight}, inputs)


def ssd_chunked(chunk: int) -> Form:
    return lambda x, log_a, b, c: mamba2_chunk_scan(x, torch.ones_like(log_a), log_a, b, c, chunk_size=chunk)


def delta_chunked(rule: Callable[..., tuple[Tensor, Any]], chunk: int) -> Form:
    # it scales q by K^-1/2
    return lambda v, q, k, beta, g: rule(q * q.shape[-1] ** 0.5, k, v, g=g, beta=beta, chunk_size=chunk)[0]


def rows(T: int, B: int, D: int, count: int = 1) -> Tensor:
    return torch.randn(count, B, T, D)


def heads(T: int, B: int, H: int, K: int, V: int, vectors: int) -> list[Tensor]:
    """v, and per head ``vectors`` of K, the second of length 1."""
    v, first, unit, *rest = (torch.randn(B, T, H, size) for size in (V, *[K] * vectors))
    return [v, first / K**0.5, F.normalize(unit, dim=-1), *rest]


def selective_inputs(T: int, B: int, D: int, N: int) -> list[Tensor]:
    rates = -torch.arange(1.0, N + 1).repeat(D, 1)  # Mamba's initial A
    return [torch.randn(B, T, D), 0.1 * torch.rand(B, T, D), rates, *torch.randn(2, B, T, 1, N)]


def ssd_inputs(T: int, B: int, H: int, P: int, N: int) -> list[Tensor]:
    b, c = torch.randn(2, B, T, 1, N)
    return [torch.randn(B, T, H, P), -torch.rand(B, T, H), b / N**0.5, c]


def gla_inputs(T: int, **sizes: int) -> list[Tensor]:
    *inputs, g = heads(T, **sizes, vectors=3)
    return [*inputs, -0.1 * g.abs()]


def delta_inputs(T: int, **sizes: int) -> list[Tensor]:
    *inputs, g = heads(T, **sizes, vectors=3)
    return [*inputs, torch.rand(g.shape[:3]), -0.1 * g[..., 0].abs()]


def kda_inputs(T: int, **sizes: int) -> list[Tensor]:
    *inputs, g = heads(T, **sizes, vectors=3)
    return [*inputs, torch.rand(g.shape[:3]), -0.1 * g.abs()]


def dplr_inputs(T: int, **sizes: int) -> list[Tensor]:
    """As RWKV-7 makes them: what is removed is a part of what a unit key reads."""
    v, r, unit, w, k, part = heads(T, **sizes, vectors=5)
    return [v, r, -0.1 * w.abs(), k / sizes["K"] ** 0.5, -unit, unit * part.sigmoid()]


def cost_of(op: Any, *inputs: str, **static: Any) -> Callable[..., Cost]:
    return lambda **sizes: op.cost(*(extent(dims, sizes) for dims in inputs), **static)


def loss_cost(T: int, B: int, D: int, V: int) -> Cost:
    flops = 2 * B * T * D * V
    return Cost(flops, flops, 4 * (V * D + B * T * (D + 2)))


HEADS = {"B": 1, "H": 8, "K": 64, "V": 64}
ROWS = {"B": 1, "D": 1024}
CHUNKS, SHORT_CHUNKS = (16, 32, 64, 128), (4, 8, 16, 32)  # short: the torch form holds T * chunk numbers per channel

ENTRIES = {
    "diag_scan": Entry(
        sizes=ROWS,
        inputs=lambda **sizes: [*rows(**sizes), -rows(**sizes)[0].abs()],
        ours=first(diag_scan),
        torch=reference(diag_scan) | {"loop": diagonal_loop},
        transformers={"RecurrentGemma": rglru_scan},
        cost=cost_of(diag_scan, "BTD", "BTD"),
    ),
    "selective_scan": Entry(
        sizes={"B": 1, "D": 512, "N": 16},
        inputs=selective_inputs,
        ours=first(selective_scan),
        torch=reference(selective_scan) | {"loop": selective_loop},
        transformers={
            "Mamba": lambda x, dt, a, b, c: mamba_selective_scan(x.mT, dt.mT, a, b[:, :, 0].mT, c[:, :, 0].mT).mT
        },
        cost=cost_of(selective_scan, "BTD", "BTD", "DN", "BT1N", "BT1N"),
        bound="exps",
        exps="BTDN",
        faster=(40, 300),
    ),
    "ssd": Entry(
        sizes={"B": 1, "H": 16, "P": 64, "N": 64},
        inputs=ssd_inputs,
        ours=first(ssd),
        torch=reference(ssd, 32, 64, 128, 256) | {"loop": ssd_loop},
        transformers={f"chunk {chunk}": ssd_chunked(chunk) for chunk in (32, 64, 128, 256)},
        default="chunk 256",
        cost=cost_of(ssd, "BTHP", "BTH", "BT1N", "BT1N"),
        work=ssd_work,
        faster=(4, 8),
    ),
    "gla": Entry(
        sizes=HEADS,
        inputs=gla_inputs,
        ours=lambda *inputs: gla(*inputs, None)[0],
        torch=reference(lambda *inputs, chunk: gla(*inputs, None, chunk=chunk), *SHORT_CHUNKS) | {"loop": linear_loop},
        cost=cost_of(gla, "BTHV", "BTHK"),
        bound="products",
        faster=(4, None),
    ),
    "delta": Entry(
        sizes=HEADS,
        inputs=delta_inputs,
        ours=first(delta),
        torch=reference(delta, *CHUNKS) | {"loop": delta_loop},
        transformers={f"chunk {chunk}": delta_chunked(torch_chunk_gated_delta_rule, chunk) for chunk in CHUNKS},
        default="chunk 64",
        cost=cost_of(delta, "BTHV", "BTHK", "BTHK", "BTH", "BTH"),
        bound="products",
        faster=(4, 5),
    ),
    "delta by channel": Entry(
        sizes=HEADS,
        inputs=kda_inputs,
        ours=first(delta),
        torch=reference(delta, *SHORT_CHUNKS) | {"loop": delta_loop},
        transformers={f"chunk {chunk}": delta_chunked(chunk_kimi_delta_attention, chunk) for chunk in (16, 32, 64)},
        default="chunk 64",
        cost=cost_of(delta, "BTHV", "BTHK", "BTHK", "BTH", "BTHK"),
        bound="products",
    ),
    "dplr": Entry(
        sizes=HEADS,
        inputs=dplr_inputs,
        ours=first(dplr),
        torch=reference(dplr, *SHORT_CHUNKS) | {"loop": dplr_loop},
        cost=cost_of(dplr, "BTHV", "BTHK"),
        bound="products",
        faster=(4, None),
    ),
    "wkv4": Entry(
        sizes=ROWS,
        inputs=lambda D, **sizes: [*rows(D=D, **sizes, count=2), -torch.rand(D), torch.randn(D)],
        ours=first(wkv4),
        torch=reference(wkv4, *SHORT_CHUNKS) | {"loop": wkv4_loop},
        transformers={"RWKV": lambda v, k, w, u: rwkv_linear_attention_cpu((-w).log(), u, k, v)[0]},
        cost=cost_of(wkv4, "BTD"),
        bound="exps",
        exps="2BTD",  # of the four of a token, two have exponent 0
        faster=(None, 30),
    ),
    "causal_conv1d": Entry(
        sizes=ROWS | {"W": 4},
        inputs=lambda T, B, D, W: [torch.randn(B, T, D), torch.randn(D, W), torch.randn(D)],
        ours=first(causal_conv1d),
        torch=reference(causal_conv1d) | {"F.conv1d": convolution},
        transformers={"Mamba": lambda x, weight, bias: causal_conv1d_fn(x.mT, weight, bias, activation="silu").mT},
        cost=cost_of(causal_conv1d, "BTD", "DW"),
        faster=(4, None),
    ),
    "rmsnorm": Entry(
        sizes=ROWS,
        inputs=lambda **sizes: [*rows(**sizes), torch.rand(sizes["D"])],
        ours=lambda x, weight: rmsnorm(x, weight, eps=EPS),
        torch={"F.rms_norm": lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS)},
        transformers={"Llama": lambda x, weight: normed(LlamaRMSNorm(weight.numel(), EPS), weight, x)},
        cost=cost_of(rmsnorm, "BTD", "D"),
        faster=(1, None),
    ),
    "rmsnorm gated": Entry(
        sizes=ROWS,
        inputs=lambda **sizes: [*rows(**sizes, count=2), torch.rand(sizes["D"])],
        ours=lambda x, gate, weight: rmsnorm(x, weight, eps=EPS, gate=gate),
        torch={"F.rms_norm": lambda x, gate, weight: F.rms_norm(x * F.silu(gate), weight.shape, weight, EPS)},
        transformers={
            "Mamba2": lambda x, gate, weight: normed(MambaRMSNormGated(x.shape[-1], x.shape[-1], EPS), weight, x, gate)
        },
        cost=cost_of(rmsnorm, "BTD", "D", gated=True),
        faster=(1, None),
    ),
    "linear_cross_entropy": Entry(
        sizes={"B": 2, "D": 1024, "V": 32768},
        inputs=lambda T, B, D, V: [torch.randn(B, T, D), torch.randn(V, D) / D**0.5, torch.randint(V, (B, T))],
        ours=lambda *inputs: linear_cross_entropy_sum(*inputs)[0],
        torch={"F.linear, F.cross_entropy": whole_loss},
        cost=loss_cost,
        bound="products",
        faster=(1, None),
        memory=1 / 3,
    ),
}
