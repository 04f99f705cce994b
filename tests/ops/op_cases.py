"""The ops and their variants: how inputs are made, the call, the definition. Every test of all ops runs over ``CASES``.

A new op is one entry (or a few, if it has options that change what it computes); a new backend is none: the backends
that each case runs on are those its op has registered.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lmtrain.ops import (
    Documents,
    attention,
    blockdiag_scan,
    causal_conv1d,
    delta,
    diag_scan,
    dplr,
    gla,
    library,
    linear_cross_entropy,
    rmsnorm,
    routed_conv,
    selective_scan,
    ssd,
    wkv4,
)
from lmtrain.ops.blockdiag_scan import recurrence as blockdiag_scan_recurrence
from lmtrain.ops.delta import recurrence as delta_recurrence
from lmtrain.ops.diag_scan import recurrence as diag_scan_recurrence
from lmtrain.ops.dplr import recurrence as dplr_recurrence
from lmtrain.ops.gla import recurrence as gla_recurrence
from lmtrain.ops.routed_conv import recurrence as routed_conv_recurrence
from lmtrain.ops.selective_scan import recurrence as selective_scan_recurrence
from lmtrain.ops.ssd import recurrence as ssd_recurrence
from lmtrain.ops.wkv4 import recurrence as wkv4_recurrence
from tests.ops import op_inputs
from tests.ops.op_case import Case, Outputs, Running, affine
from tests.ops.op_inputs import Draw, Tensors


def conv(width: int, activation: str, bias: bool = True) -> Case:
    def call(tensors: Tensors, docs: Documents | None) -> Outputs:
        return causal_conv1d(**tensors, docs=docs, activation=activation)

    def definition(tensors: Tensors, docs: Documents | None) -> Outputs:
        x, weight, *others = (tensors.get(name) for name in ("x", "weight", "bias"))
        positions = None if docs is None else docs.positions()
        return causal_conv1d.reference(x, weight, *others, positions, tensors.get("initial_state"), activation)

    make = partial(op_inputs.conv, width=width, bias=bias)
    whole = frozenset({"weight", "bias", "initial_state"})
    return Case("causal_conv1d", make, call, definition, whole=whole, reach=width - 1, resumes=call)


def norm(gated: bool, num_groups: int) -> Case:
    def make(draw: Draw, batch: int, length: int, decay: float) -> Tensors:
        x, weight = draw(batch, length, 21), draw(21)
        return {"x": x, "weight": weight, **({"gate": 2 * draw(batch, length, 21)} if gated else {})}

    def call(tensors: Tensors, docs: Documents | None) -> Outputs:
        return (rmsnorm(**tensors, eps=1e-5, num_groups=num_groups),)

    def definition(tensors: Tensors, docs: Documents | None) -> Outputs:
        return (rmsnorm.reference(tensors["x"], tensors["weight"], tensors.get("gate"), 1e-5, num_groups),)

    return Case("rmsnorm", make, call, definition, outputs=("y",), whole=frozenset({"weight"}), reach=0)


def softmax(
    key_heads: int,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    extra: int = 0,
    lse: bool = False,
) -> Case:
    """o by the backend, or o and its log-sum-exp by the explicit form; extra: columns that every query sees."""
    heads, keys, values = 4, 5, 6

    def make(draw: Draw, batch: int, length: int, decay: float) -> Tensors:
        tensors = {
            "v": draw(batch, length, key_heads, values),
            "q": draw(batch, length, heads, keys),
            "k": draw(batch, length, key_heads, keys),
        }
        tensors |= {"sinks": draw(heads)} if sinks else {}
        return tensors | ({"k+": draw(key_heads, extra, keys), "v+": draw(key_heads, extra, values)} if extra else {})

    def call(tensors: Tensors, docs: Documents | None) -> Outputs:
        tensors = dict(tensors)
        static: dict[str, Any] = {"extra_kv": (tensors.pop("k+"), tensors.pop("v+"))} if extra else {}
        if docs is None:
            docs = Documents.from_ids(torch.zeros(tensors["q"].shape[:2], dtype=torch.int32))
        static |= {"positions": docs.positions(), "window": window, "softcap": softcap, "scale": keys**-0.5}
        return attention(**tensors, **static) if lse else (attention.output(**tensors, **static),)

    def definition(tensors: Tensors, docs: Documents | None) -> Outputs:
        q, k, v = (tensors[name].transpose(1, 2) for name in "qkv")
        if extra:
            batch = q.shape[0]
            k = torch.cat([tensors["k+"].expand(batch, -1, -1, -1), k], dim=2)
            v = torch.cat([tensors["v+"].expand(batch, -1, -1, -1), v], dim=2)
        k, v = (t.repeat_interleave(heads // key_heads, dim=1) for t in (k, v))
        logits = q @ k.mT * keys**-0.5
        logits = logits if softcap is None else (logits / softcap).tanh() * softcap
        column = torch.arange(q.shape[2])
        seen = (
            column <= column[:, None]
            if window is None
            else (column <= column[:, None]) & (column > column[:, None] - window)
        )
        if docs is not None:
            seen = seen & (docs.ids[:, :, None] == docs.ids[:, None, :])[:, None]
        seen = torch.nn.functional.pad(seen, (extra, 0), value=True)
        logits = logits.masked_fill(~seen, -torch.inf)
        total = logits.logsumexp(dim=-1)
        if sinks:
            sink = tensors["sinks"][:, None].expand_as(total)
            logits = torch.cat([logits, sink[..., None]], dim=-1)
        o = logits.softmax(dim=-1)[..., : v.shape[2]] @ v
        return (o.transpose(1, 2), total.transpose(1, 2))[: 1 + lse]

    return Case(
        "attention",
        make,
        call,
        definition,
        outputs=("o", "lse")[: 1 + lse],
        whole=frozenset({"sinks", "k+", "v+"}),
        reach=None if window is None else window - 1,
        once=lse,
        skips=False,
    )


def loss() -> Case:
    vocabulary = 33

    def make(draw: Draw, batch: int, length: int, decay: float) -> Tensors:
        return {"hidden": draw(batch, length, 12), "weight": draw(vocabulary, 12)}

    def labels(hidden: Tensor) -> Tensor:
        return torch.arange(hidden[..., 0].numel()).view(hidden.shape[:2]) * 7 % vocabulary

    def call(tensors: Tensors, docs: Documents | None, **static: Any) -> Outputs:
        return linear_cross_entropy(**tensors, labels=labels(tensors["hidden"]), **static)

    def definition(tensors: Tensors, docs: Documents | None) -> Outputs:
        logits = tensors["hidden"] @ tensors["weight"].t()
        lse = logits.logsumexp(dim=-1)
        return lse - logits.gather(-1, labels(tensors["hidden"])[..., None])[..., 0], lse

    return Case(
        "linear_cross_entropy",
        make,
        call,
        definition,
        outputs=("nll", "lse"),
        whole=frozenset({"weight"}),
        reach=0,
        once=False,
        skips=False,
        chunks=(1, 7, 1000),
    )


_scan = partial(affine, selective_scan, selective_scan_recurrence, "x dt A B C", whole=("A",), skips=True)
_ssd = partial(affine, ssd, ssd_recurrence, "x log_a B C", wide=("log_a",), chunks=(1, 7, 100))
_gla = partial(affine, gla, gla_recurrence, "v q k g u", whole=("u",), wide=("g", "u"), chunks=(1, 7, 100))
_delta = partial(affine, delta, delta_recurrence, "v q k beta g", chunks=(1, 7, 100), tolerance=5e-6)  # 1.7e-6

CASES: dict[str, Case] = {
    "diag_scan": affine(diag_scan, diag_scan_recurrence, "x log_a", op_inputs.diag_scan, wide=("log_a",), skips=True),
    "selective_scan": _scan(partial(op_inputs.selective_scan, longhorn=False), wide=("dt", "A")),
    "longhorn": _scan(partial(op_inputs.selective_scan, longhorn=True), wide=("dt",)),
    "ssd": _ssd(partial(op_inputs.ssd, groups=2)),
    "ssd_one_group": _ssd(partial(op_inputs.ssd, groups=1)),
    "gla": _gla(partial(op_inputs.gla, bonus=False)),
    "gla_bonus": _gla(partial(op_inputs.gla, bonus=True)),
    "delta": _delta(partial(op_inputs.delta, gate="none", groups=4)),
    "delta_gated": _delta(partial(op_inputs.delta, gate="scalar", groups=2)),
    "kda": _delta(partial(op_inputs.delta, gate="vector", groups=4)),
    "kda_grouped": _delta(partial(op_inputs.delta, gate="vector", groups=1)),
    "dplr": affine(dplr, dplr_recurrence, "v r w k a b", op_inputs.dplr, chunks=(1, 7, 100)),
    "wkv4": affine(
        wkv4,
        wkv4_recurrence,
        "v k w u",
        op_inputs.wkv4,
        whole=("w", "u"),
        wide=("w", "u"),
        chunks=(1, 7, 100),
        tolerance=4e-6,  # 1.1e-6, the gradient of w under weak decay
        unique=op_inputs.wkv4_unique,
    ),
    "blockdiag_scan": affine(blockdiag_scan, blockdiag_scan_recurrence, "v A", op_inputs.blockdiag, chunks=(1, 7, 100)),
    "routed_conv": affine(
        routed_conv,
        routed_conv_recurrence,
        "x used weight",
        partial(op_inputs.routed_conv, width=4),
        whole=("weight",),
        skips=True,
        derived=op_inputs.routes,
        sees=op_inputs.routed_conv_sees,
    ),
    "conv": conv(4, "silu"),
    "conv_plain": conv(3, "none", bias=False),
    "rmsnorm": norm(False, 1),
    "rmsnorm_gated": norm(True, 1),
    "rmsnorm_grouped": norm(True, 3),
    "attention": softmax(4),
    "attention_window": softmax(2, window=3),
    "attention_softcap": softmax(4, softcap=1.5),
    "attention_sinks": softmax(2, sinks=True, extra=3),
    "attention_lse": softmax(2, window=20, softcap=1.5, sinks=True, extra=2, lse=True),
    "linear_cross_entropy": loss(),
}
AFFINE = {name: case for name, case in CASES.items() if case.affine is not None}


def running() -> dict[str, Running]:
    """Every case on every backend of its op that keeps the whole contract; an op without a choice has one, in torch."""
    backends, one = library.registered(), (library.Backend("reference"),)
    return {
        f"{name}-{backend.name}": Running(name, case, backend)
        for name, case in CASES.items()
        for backend in backends.get(case.op, one)
        if backend.lacks is None
    }
