"""Layers of fla beside the mixers that say the same; those whose weights are packed otherwise: ``fla_rwkv_mom.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lmtrain.model.mixers.deltanet import DeltaNetConfig
from lmtrain.model.mixers.gated_deltanet import GatedDeltaNetConfig
from lmtrain.model.mixers.gla import GLAConfig
from lmtrain.model.mixers.hgrn2 import HGRN2Config
from lmtrain.model.mixers.kda import KDAConfig
from lmtrain.model.mixers.lightnet import LightNetConfig
from lmtrain.model.mixers.linear_attention import LinearAttentionConfig
from lmtrain.model.mixers.retnet import RetNetConfig
from tests.peers.fla_layer import D_MODEL, LATER, Layer, renamed, run_plain
from tests.peers.fla_rwkv_mom import RWKV_AND_MOM
from tests.peers.pair import Named

HEADS, WIDTH, RANK = 3, 8, 5
READOUT = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "out.o"}
GATED = READOUT | {"g_proj": "out.gate.0", "g_norm_swish_gate": "out.norm"}
DECAY = {"A_log": "decay.A_log", "dt_bias": "decay.dt_bias"}
DELTA = {f"{name}_proj": f"inputs.{name}" for name in "qkv"} | {
    f"{name}_conv1d": f"inputs.{name}_conv" for name in "qkv"
}
DELTA |= {"b_proj": "inputs.beta", "o_norm": "out.norm", "o_proj": "out.o"}
LOW_RANK_GATE = {"g_proj__0": "out.gate.0", "g_proj__1": "out.gate.1"}


def pack_gla(p: Named) -> Named:
    matrices = renamed(**GATED, gk_proj__0="decay_in", gk_proj__1="decay_out")
    return matrices(p) | {"gk_proj.1.bias": p["decay.bias"]}


def pack_hgrn2(p: Named) -> Named:
    matrices = renamed(q_proj="q", f_proj="f", i_proj="i", g_norm="out.norm", o_proj="out.o")
    return matrices(p) | {"bound": p["forget.bound"]}


def run_hgrn2(layer: nn.Module, p: Named, x: Tensor, **told: Any) -> Tensor:
    weights, share = dict(p), torch.tensor(LATER.index / LATER.count)
    return run_plain(layer, weights, x, lower_bound=torch.sigmoid(weights.pop("bound") + share.logit()), **told)


LAYERS = [
    Layer(
        LinearAttentionConfig(num_heads=HEADS),
        "LinearAttention",
        {"hidden_size": D_MODEL, "num_heads": HEADS, "feature_map": "elu"},
        renamed(**READOUT, norm="out.norm"),
    ),
    Layer(
        RetNetConfig(num_heads=HEADS),
        "MultiScaleRetention",
        {"hidden_size": D_MODEL, "num_heads": HEADS},
        renamed(**GATED),
    ),
    Layer(
        GLAConfig(num_heads=HEADS, gate_rank=RANK),
        "GatedLinearAttention",
        {"hidden_size": D_MODEL, "num_heads": HEADS, "gate_low_rank_dim": RANK},
        pack_gla,
    ),
    Layer(
        HGRN2Config(head_dim=WIDTH),
        "HGRN2Attention",
        {"hidden_size": D_MODEL, "expand_ratio": WIDTH, "layer_idx": 1},
        pack_hgrn2,
        run_hgrn2,
        note="fla's model makes the lower bounds of all layers from one softmax; here it is given ours",
    ),
    Layer(
        LightNetConfig(head_dim=WIDTH, gate_rank=RANK),
        "LightNetAttention",
        {"hidden_size": D_MODEL, "expand_ratio": WIDTH, "gate_low_rank_dim": RANK},
        renamed(**READOUT, **LOW_RANK_GATE, g_norm="out.norm"),
    ),
    *(
        Layer(
            DeltaNetConfig(num_heads=HEADS, head_dim=WIDTH, negative_eigenvalues=negative),
            "DeltaNet",
            {"hidden_size": D_MODEL, "num_heads": HEADS, "allow_neg_eigval": negative},
            renamed(**DELTA),
            length=64,
            note=f"negative_eigenvalues={negative}; longer rows take fla's chunk kernel, which refuses fp32",
        )
        for negative in (False, True)
    ),
    Layer(
        GatedDeltaNetConfig(num_heads=2, num_value_heads=4, head_dim=4, value_dim=8, negative_eigenvalues=True),
        "GatedDeltaNet",
        {"hidden_size": D_MODEL, "num_heads": 2, "num_v_heads": 4, "head_dim": 4, "allow_neg_eigval": True},
        renamed(**DELTA, **DECAY, a_proj="a", g_proj="out.gate.0"),
    ),
    Layer(
        KDAConfig(num_heads=HEADS, head_dim=WIDTH, negative_eigenvalues=True),
        "KimiDeltaAttention",
        {"hidden_size": D_MODEL, "num_heads": HEADS, "head_dim": WIDTH, "allow_neg_eigval": True},
        renamed(**DELTA, **DECAY, **LOW_RANK_GATE, f_proj__0="decay_in", f_proj__1="decay_out"),
        note="fla's gate has a bias, here 0; ours, as the published Kimi Linear, has none",
    ),
    *RWKV_AND_MOM,
]
