"""Functions of fla beside the ops that say the same: its definitions in plain torch, and its Triton kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lmtrain.ops import diag_scan
from tests.ops import op_inputs
from tests.peers.fla_function import (
    Function,
    call_rwkv4,
    called,
    output_only,
    run_delta,
    run_dplr,
    run_gla,
    run_rwkv7,
    run_ssd,
    run_wkv4,
    without,
)
from tests.peers.pair import Named, Outputs

HEADS = 4  # of op_inputs.ssd
heads = torch.arange(HEADS, dtype=torch.float64)
retained = partial(run_ssd, constant=torch.log1p(-torch.exp2(-5 - heads)))
undecayed = partial(run_ssd, constant=torch.zeros(HEADS))
lightning = partial(run_ssd, constant=-8 / HEADS * (1 - 1 / 6) * heads)  # of layer 1 of 6

scalar_decay = partial(op_inputs.ssd, groups=HEADS)
constant_decay = without(scalar_decay, "log_a")
vector_decay = partial(op_inputs.gla, bonus=False)
with_bonus = partial(op_inputs.gla, bonus=True)
plain_rule = partial(op_inputs.delta, gate="none", groups=4)
gated_rule = partial(op_inputs.delta, gate="scalar", groups=4)
grouped_rule = partial(op_inputs.delta, gate="vector", groups=2)

SSD = "q=C k=B v=x"
DPLR = "q=r k v alpha=a beta=b gk=w"
RWKV6 = "r=q k v w=g u"
SLOPES = "slopes: fla has g_h = -8/H (1 - l/L) h, ours are MiniMax's 2^(-8 (h + 1)/H) (1 - l/(L - 1 + 1e-5) + 1e-5)"


def of_rwkv7(draw: Callable[..., Tensor], batch: int, length: int, decay: float) -> Named:
    """Log decays in (-e^-1/2, 0): the kernel is made for no others."""
    t = op_inputs.dplr(draw, batch, length, decay)
    return t | {"w": -math.exp(-0.5) * torch.sigmoid(t["w"])}


def run_diagonal(t: Named) -> Outputs:
    return diag_scan(t["x"], t["log_a"], initial_state=t["initial_state"])


DEFINITIONS = [
    Function("ssd", "simple_gla.naive.naive_recurrent_simple_gla", scalar_decay, run_ssd, called(f"{SSD} g=log_a")),
    Function("ssd", "simple_gla.naive.naive_chunk_simple_gla", scalar_decay, run_ssd, called(f"{SSD} g=log_a")),
    Function(
        "ssd",
        "simple_gla.naive.naive_parallel_simple_gla",
        without(scalar_decay, "initial_state"),
        output_only(run_ssd),
        called(f"{SSD} g=log_a", stateless=True),
    ),
    Function(
        "ssd",
        "retention.naive.naive_retention",
        without(constant_decay, "initial_state"),
        output_only(retained),
        called(SSD, heads_first=True, stateless=True),
    ),
    Function("ssd", "linear_attn.naive.naive_recurrent_linear_attn", constant_decay, undecayed, called(SSD)),
    Function("gla", "gla.naive.naive_recurrent_gla", vector_decay, run_gla, called("q k v gk=g")),
    Function(
        "gla",
        "rwkv6.recurrent_naive.naive_recurrent_rwkv6",
        with_bonus,
        run_gla,
        called("q k v w=g u", heads_first=True, scale=1.0),
    ),
    Function(
        "delta", "delta_rule.naive.delta_rule_recurrence", plain_rule, run_delta, called("q k v beta", heads_first=True)
    ),
    Function(
        "delta",
        "delta_rule.naive.delta_rule_chunkwise",
        without(plain_rule, "initial_state"),
        output_only(run_delta),
        called("q k v beta", heads_first=True, stateless=True),
        length=64,
    ),
    Function(
        "delta",
        "gated_delta_rule.naive.naive_recurrent_gated_delta_rule",
        gated_rule,
        run_delta,
        called("q k v beta g"),
    ),
    Function(
        "delta", "gated_delta_rule.naive.naive_chunk_gated_delta_rule", gated_rule, run_delta, called("q k v beta g")
    ),
    Function("delta", "kda.naive.naive_recurrent_kda", grouped_rule, run_delta, called("q k v beta g")),
    Function("delta", "kda.naive.naive_chunk_kda", grouped_rule, run_delta, called("q k v beta g"), length=64),
    Function(
        "dplr",
        "generalized_delta_rule.dplr.naive.dplr_recurrence",
        op_inputs.dplr,
        run_dplr,
        called(DPLR, heads_first=True),
    ),
    Function(
        "dplr",
        "generalized_delta_rule.dplr.naive.dplr_chunkwise",
        op_inputs.dplr,
        run_dplr,
        called(DPLR, heads_first=True),
        length=64,
    ),
    Function("diag_scan", "hgrn.naive.naive_recurrent_hgrn", op_inputs.diag_scan, run_diagonal, called("x g=log_a")),
]
KERNELS = [
    Function("ssd", "simple_gla.chunk_simple_gla", scalar_decay, run_ssd, called(f"{SSD} g=log_a")),
    Function("ssd", "simple_gla.fused_recurrent_simple_gla", scalar_decay, run_ssd, called(f"{SSD} g=log_a")),
    Function("ssd", "retention.chunk_retention", constant_decay, retained, called(SSD)),
    Function("ssd", "linear_attn.chunk_linear_attn", constant_decay, undecayed, called(SSD, normalize=False)),
    Function(
        "ssd",
        "lightning_attn.chunk_lightning_attn",
        constant_decay,
        lightning,
        called(SSD, layer_idx=1, num_layers=6),
        length=128,
        note=f"{SLOPES}; lengths that are no multiple of 64 leave NaN in fla's state of heads that forget fast",
    ),
    Function("gla", "gla.chunk_gla", vector_decay, run_gla, called("q k v g")),
    Function("gla", "gla.fused_recurrent_gla", vector_decay, run_gla, called("q k v gk=g")),
    Function("gla", "rwkv6.chunk_rwkv6", with_bonus, run_gla, called(RWKV6, scale=1.0)),
    Function(
        "gla",
        "rwkv6.fused_recurrent_rwkv6",
        with_bonus,
        output_only(run_gla),
        output_only(called(RWKV6, scale=1.0)),
        note="outputs alone: fla's backward takes no gradient of the state",
    ),
    Function("delta", "delta_rule.fused_recurrent_delta_rule", plain_rule, run_delta, called("q k v beta")),
    Function("delta", "gated_delta_rule.chunk_gated_delta_rule", gated_rule, run_delta, called("q k v beta g")),
    Function("delta", "kda.chunk_kda", grouped_rule, run_delta, called("q k v beta g")),
    Function(
        "dplr",
        "rwkv7.chunk_rwkv7",
        of_rwkv7,
        run_rwkv7,
        called("r w k v a b", safe_gate=True, lower_bound=-math.exp(-0.5), chunk_size=64),
        tolerance=1e-3,
        note="fla inverts the triangle of a chunk in fp16, whatever the inputs",
    ),
    Function("diag_scan", "hgrn.fused_recurrent_hgrn", op_inputs.diag_scan, run_diagonal, called("x g=log_a")),
    Function("wkv4", "rwkv4.fused_recurrent_rwkv4", op_inputs.wkv4, run_wkv4, call_rwkv4),
]
FUNCTIONS = DEFINITIONS + KERNELS
