"""MLPs and mixtures of experts: modules of transformers with the same weights, and what routing owes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DeepseekV3Config, GptOssConfig, Qwen3NextConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextSparseMoeBlock

from lmtrain.errors import UsageError
from lmtrain.model.branch import Branch
from lmtrain.model.ffn.mlp import MLPConfig
from lmtrain.model.ffn.moe_settings import MoEConfig
from lmtrain.model.ffn.router import route
from tests.model.parity import Named, assert_peer, assert_recurrence, perturbed

D_MODEL, EXPERTS, WIDTH = 24, 8, 10


def branch_of(cfg: Any) -> Branch:
    """Not moved by a balancing loss, and with a selection bias away from 0."""
    branch = perturbed(cfg, D_MODEL, torch.float32)
    branch.get_buffer("router_bias").copy_(torch.linspace(-0.2, 0.2, EXPERTS).roll(3))
    return branch


def shared_as(p: Named, prefix: str) -> Named:
    return {f"{prefix}.{name}_proj.weight": p[f"shared.{name}.weight"] for name in ("gate", "up", "down")}


def fused(p: Named) -> Named:
    gate_up = torch.cat([p["experts.gate"].mT, p["experts.up"].mT], dim=1)
    return {"experts.gate_up_proj": gate_up, "experts.down_proj": p["experts.down"].mT}


def test_the_experts_of_gpt_oss() -> None:
    """Biases everywhere, softmax after the choice (here before it, and normalised), gate and up interleaved."""
    given = {"num_local_experts": EXPERTS, "num_experts_per_tok": 3, "intermediate_size": WIDTH}
    peer = GptOssMLP(GptOssConfig(hidden_size=D_MODEL, num_hidden_layers=1, **given))

    def packed(p: Named) -> Named:
        def together(suffix: str) -> Tensor:
            return torch.stack([p[f"experts.gate{suffix}"], p[f"experts.up{suffix}"]], dim=-1).flatten(-2)

        return {
            "router.weight": p["router.weight"],
            "router.bias": p["router.bias"],
            "experts.gate_up_proj": together(""),
            "experts.gate_up_proj_bias": together("_bias"),
            "experts.down_proj": p["experts.down"],
            "experts.down_proj_bias": p["experts.down_bias"],
        }

    cfg = MoEConfig(EXPERTS, 3, WIDTH, bias=True, activation="swiglu_clamped", balance="none")
    assert_peer(branch_of(cfg), peer, lambda x: peer(x)[0], packed, D_MODEL)


def test_the_experts_of_deepseek_v3() -> None:
    """Sigmoid scores, a selection bias, the best groups alone, a factor, shared experts."""
    given = {"n_routed_experts": EXPERTS, "num_local_experts": EXPERTS, "num_experts_per_tok": 3}
    given |= {"n_group": 4, "topk_group": 2, "moe_intermediate_size": WIDTH, "n_shared_experts": 2}
    peer_cfg = DeepseekV3Config(
        hidden_size=D_MODEL, num_hidden_layers=1, routed_scaling_factor=2.5, norm_topk_prob=True, **given
    )
    peer_cfg._experts_implementation = "eager"
    peer = DeepseekV3MoE(peer_cfg)

    def packed(p: Named) -> Named:
        bias = {"gate.e_score_correction_bias": p["router_bias"]} if "router_bias" in p else {}
        return {"gate.weight": p["router.weight"], **bias, **fused(p), **shared_as(p, "shared_experts")}

    cfg = MoEConfig(
        EXPERTS, 3, WIDTH, num_shared=2, router="sigmoid", scale=2.5, num_groups=4, top_groups=2, balance="bias"
    )
    assert_peer(branch_of(cfg), peer, peer, packed, D_MODEL)


def test_the_experts_of_qwen3_next() -> None:
    """A gate on the shared expert."""
    given = {"num_experts": EXPERTS, "num_experts_per_tok": 3, "moe_intermediate_size": WIDTH}
    peer_cfg = Qwen3NextConfig(
        hidden_size=D_MODEL, num_hidden_layers=1, norm_topk_prob=True, shared_expert_intermediate_size=12, **given
    )
    peer_cfg._experts_implementation = "eager"
    peer = Qwen3NextSparseMoeBlock(peer_cfg)

    def packed(p: Named) -> Named:
        gates = {"gate.weight": p["router.weight"], "shared_expert_gate.weight": p["shared_gate.weight"]}
        return {**gates, **fused(p), **shared_as(p, "shared_expert")}

    cfg = MoEConfig(EXPERTS, 3, WIDTH, num_shared=1, d_shared=12, shared_gate=True, balance="none")
    assert_peer(branch_of(cfg), peer, peer, packed, D_MODEL)


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu", "relu2"])
def test_mlp_is_its_formula(activation: str) -> None:
    def definition(p: Named, x: Tensor) -> Tensor:
        up = x @ p["up.weight"].T + p["up.bias"]
        gate = x @ p["gate.weight"].T + p["gate.bias"] if "gate.weight" in p else up
        hidden = {
            "swiglu": F.silu(gate) * up,
            "geglu": 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up,
            "gelu": 0.5 * up * (1 + torch.erf(up / 2**0.5)),
            "relu2": up.clamp(min=0) ** 2,
        }[activation]
        return hidden @ p["down.weight"].T + p["down.bias"]

    assert_recurrence(MLPConfig(WIDTH, activation=activation, bias=True), D_MODEL, definition)


def test_groups_bound_the_choice_and_ties_take_the_lower_index() -> None:
    cfg = MoEConfig(6, 3, 4, num_groups=3, top_groups=2)
    logits = torch.tensor([[1.0, 1.0, 3.0, -9.0, -3.0, 1.5], [0.0] * 6])
    weights, chosen, scores = route(cfg, logits, torch.zeros(6))
    # groups are worth e + e, e^3 and e^1.5 (with next to nothing): expert 5 beats 0 and 1, but stands in the third
    assert chosen.tolist() == [[2, 0, 1], [0, 1, 2]]
    assert torch.equal(scores.gather(-1, chosen) / scores.gather(-1, chosen).sum(-1, keepdim=True), weights)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"router": "expert_choice"}, "moe: router expert_choice: experts that choose among all tokens of a row see"),
        ({"num_groups": 3}, "moe: num_groups 3 does not divide num_experts 8"),
        ({"num_groups": 4, "top_groups": 5}, "moe: top_groups: expected at most num_groups 4, got 5"),
        ({"num_groups": 4}, "moe: top_k: 1 groups hold 2 experts, got 3"),
        ({"shared_gate": True}, "moe: shared_gate: there are no shared experts; set num_shared"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        MoEConfig(EXPERTS, 3, WIDTH, **settings)
    assert str(caught.value).startswith(says)
