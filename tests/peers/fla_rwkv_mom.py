"""RWKV and the mixture of memories in fla beside ours: weights in another order, and what fla does otherwise."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lmtrain.model.ffn.rwkv_channel import RWKVChannelConfig
from lmtrain.model.mixers.mom_settings import MoMConfig
from lmtrain.model.mixers.rwkv6 import RWKV6Config
from lmtrain.model.mixers.rwkv7 import RWKV7Config
from tests.peers.fla_layer import D_MODEL, FIRST, Layer, renamed, run_plain
from tests.peers.pair import Named

HEADS, WIDTH, D_FF = 3, 8, 40
EPS = 64e-5  # of the published RWKV


def pack_rwkv6(p: Named) -> Named:
    """fla orders the mixes r, w, k, v, g, ours are w, k, v, r, g; its narrow matrices are transposed."""
    order = [3, 0, 1, 2, 4]
    matrices = renamed(r_proj__linear="r", k_proj__linear="k", v_proj__linear="v", g_proj__linear="gate", o_proj="o")
    return matrices(p) | {
        "x_proj.0.linear.weight": p["mix_in"].unflatten(1, (5, -1))[:, order].flatten(1).T,
        "x_proj.0.mu": p["mix_x"],
        "x_proj.2.weight": p["mix_out"][order].permute(2, 0, 1).flatten(1),
        "x_bias": p["mix"][order],
        "w_proj.linear.lora.0.weight": p["decay_in"].T,
        "w_proj.linear.lora.2.weight": p["decay_out"].T,
        "w_proj.linear.lora.2.bias": p["decay.time_decay"],
        "bonus": p["decay.bonus"],
        "g_norm.weight": p["norm.weight"],
        "g_norm.bias": p["norm.bias"],
    }


def pack_rwkv7(p: Named) -> Named:
    found = renamed(r_proj="r", k_proj="k", v_proj="v", o_proj="o", k_k="k_k", k_a="k_a", r_k="r_k", g_norm="norm")(p)
    found |= {f"x_{name}": mix.view(1, 1, -1) for name, mix in zip("rwkvag", p["mix.weight"], strict=True)}
    found["g_norm.bias"] = p["norm.bias"]
    for theirs, ours in {"w": "decay_raw", "a": "rate_raw", "v": "value_raw", "g": "gate"}.items():
        if f"{ours}.inner" in p:  # the first layer has no value
            found |= {f"{theirs}_lora.lora.{i}.weight": p[f"{ours}.{end}"].T for i, end in ((0, "inner"), (2, "outer"))}
            if ours != "gate":
                found[f"{theirs}_lora.lora.2.bias"] = p[f"{ours.removesuffix('_raw')}.weight"]
    return found


def run_rwkv7(layer: nn.Module, p: Named, x: Tensor, **told: Any) -> Tensor:
    """By fla's recurrence in plain torch; of the first layer, the values that it gives to later ones, too."""
    from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence

    def recurrence(
        r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, **told: Any
    ) -> tuple[Tensor, None]:
        r, w, k, v, a, b = (t.transpose(1, 2) for t in (r * r.shape[-1] ** 0.5, w, k, v, a, b))
        return dplr_recurrence(r, k, v, a, b, w)[0].transpose(1, 2), None

    first = layer.layer_idx == 0
    streams = {} if first else {"v_first": torch.sin(x)}
    with patch("fla.layers.rwkv7.chunk_rwkv7", recurrence):
        y, _, _, v_first = functional_call(layer, p, (x.clone(),), streams)  # its backward overwrites its input
    return torch.cat([y, v_first], dim=-1) if first else y


def rwkv7(layer: int, **settings: Any) -> Layer:
    ranks = {"decay_rank": 4, "rate_rank": 5, "value_rank": 3, "gate_rank": 6}
    names = {"decay_rank": "decay", "rate_rank": "a", "value_rank": "v", "gate_rank": "gate"}
    arguments = {f"{name}_low_rank_dim": ranks[rank] for rank, name in names.items()}
    arguments |= {"hidden_size": D_MODEL, "head_dim": WIDTH, "layer_idx": layer, "num_hidden_layers": 2}
    return Layer(
        RWKV7Config(head_dim=WIDTH, **ranks),
        "RWKV7Attention",
        arguments | {"norm_eps": EPS / WIDTH},  # times the width of a head
        pack_rwkv7,
        run_rwkv7,
        packs=False,
        note="with fla's recurrence: its kernel for training inverts the triangle of a chunk in fp16",
        **settings,
    )


def pack_channel6(p: Named) -> Named:
    key, receptance = p["mix.weight"]
    matrices = renamed(key__linear="k", receptance__linear="r", value="v")
    return matrices(p) | {"key.mu": key, "receptance.mu": receptance}


def pack_channel7(p: Named) -> Named:
    return renamed(key="k", value="v")(p) | {"x_k": p["mix.weight"][0]}


def mom(num_memories: int, top_k: int) -> Layer:
    names = {"gate": "router", "q_proj": "q", "g_proj": "out.gate.0", "o_norm": "out.norm", "o_proj": "out.o"}
    names |= {"A_log": "decay.A_log", "dt_bias": "decay.dt_bias"} | {f"{name}_conv1d": f"{name}_conv" for name in "qkv"}
    for theirs, ours in {"k": "k", "v": "v", "b": "beta", "a": "a"}.items():
        names |= {f"{theirs}_proj__{e}": f"memories.{e}.{ours}" for e in range(num_memories)}
        names[f"shared_{theirs}"] = f"memories.{num_memories}.{ours}"
    taps = 4

    def run(layer: nn.Module, p: Named, x: Tensor) -> Tensor:
        with patch.object(Tensor, "argsort", lambda t: torch.argsort(t, stable=True)):
            return run_plain(layer, p, x)

    return Layer(
        MoMConfig(
            num_memories=num_memories,
            top_k=top_k,
            aux_weight=0.0,
            num_heads=HEADS,
            head_dim=4,
            value_dim=8,
            conv_width=taps,
        ),
        "MomAttention",
        {"hidden_size": D_MODEL, "num_heads": HEADS, "head_dim": 4, "expand_v": 2, "conv_size": taps}
        | {"num_memories": num_memories, "topk": top_k, "shared_mem": True},
        renamed(**names),
        run,
        packs=False,
        note="fla sorts tokens by memory with a sort that is not stable, here made so; as it evaluates: in training "
        "its convolutions run on into the next memory",
    )


RWKV_AND_MOM = [
    Layer(
        RWKV6Config(head_dim=WIDTH, mix_rank=5, decay_rank=4),
        "RWKV6Attention",
        {"hidden_size": D_MODEL, "num_heads": HEADS, "expand_k": 1.0, "norm_eps": EPS}
        | {"proj_low_rank_dim": 5, "gate_low_rank_dim": 4},
        pack_rwkv6,
        note="fla's epsilon is by default 1e-5, its keys half as wide; here as published",
    ),
    rwkv7(0, place=FIRST),
    rwkv7(1, streams=lambda x: {"v_first": torch.sin(x)}),
    Layer(
        RWKVChannelConfig(D_FF, version="6"),
        "models.rwkv6.modeling_rwkv6.RWKV6FeedForward",
        {"hidden_size": D_MODEL, "intermediate_size": D_FF},
        pack_channel6,
    ),
    Layer(
        RWKVChannelConfig(D_FF),
        "models.rwkv7.modeling_rwkv7.RWKV7FeedForward",
        {"hidden_size": D_MODEL, "intermediate_size": D_FF, "layer_idx": 1, "num_hidden_layers": 2},
        pack_channel7,
    ),
    mom(3, 3),
    mom(4, 2),
]
