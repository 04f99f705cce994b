"""Attention's options and MLA: modules of transformers with the same weights, and what has no class, by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, GptOssConfig, LlamaConfig, Olmo2Config, Qwen3NextConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.olmo2 import modeling_olmo2
from transformers.models.qwen3_next import modeling_qwen3_next

from lmtrain.errors import UsageError
from lmtrain.model.mixers.attention_settings import AttentionConfig
from lmtrain.model.mixers.mla import MLAConfig
from lmtrain.model.rope import RopeScaling, rotate
from tests.model.parity import (
    LENGTH,
    Named,
    assert_normal,
    assert_peer,
    assert_recurrence,
    initial,
    perturbed,
)

D_MODEL, HEADS, KV_HEADS, WIDTH, THETA = 24, 4, 2, 8, 100.0
QKVO = {"q.": "q_proj.", "k.": "k_proj.", "v.": "v_proj.", "o.": "o_proj.", "q_norm": "q_norm", "k_norm": "k_norm"}


def renamed(parameters: Named) -> Named:
    return {
        next((new + name.removeprefix(old) for old, new in QKVO.items() if name.startswith(old)), name): value
        for name, value in parameters.items()
    }


def causal(window: int | None = None) -> Tensor:
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    seen = (distance >= 0) & (distance < (window or LENGTH))
    return torch.zeros(LENGTH, LENGTH).masked_fill(~seen, float("-inf"))[None, None]


def peer_run(module: nn.Module, embedding: nn.Module, window: int | None = None) -> Callable[[Tensor], Tensor]:
    """The peer on rows of one document, with its own rotary table."""

    def run(x: Tensor) -> Tensor:
        positions = torch.arange(LENGTH)[None]
        return module(x, position_embeddings=embedding(x, positions), attention_mask=causal(window))[0]

    return run


def settings(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": D_MODEL,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": WIDTH,
        "num_hidden_layers": 1,
        "attn_implementation": "eager",
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
        **more,
    }


def ours(**more: Any) -> AttentionConfig:
    return AttentionConfig(HEADS, num_kv_heads=KV_HEADS, head_dim=WIDTH, rope_theta=THETA, **more)


@pytest.mark.parametrize(
    ("theta", "width", "scaling", "peer"),
    [
        (5e5, 128, RopeScaling("llama3", 8.0, 8192), {"low_freq_factor": 1.0, "high_freq_factor": 4.0}),  # Llama 3.1
        (1e6, 128, RopeScaling("yarn", 4.0, 32768), {}),  # Qwen3
        (1e4, 16, RopeScaling("llama3", 3.0, 99, 2.0, 9.0), {"low_freq_factor": 2.0, "high_freq_factor": 9.0}),
        (1e4, 16, RopeScaling("yarn", 3.0, 99, 2.0, 9.0), {"beta_slow": 2.0, "beta_fast": 9.0}),
        (1e4, 16, RopeScaling("yarn", 1.5, 64, 1.0, 1.1), {"beta_slow": 1.0, "beta_fast": 1.1}),  # no pair between
    ],
)
def test_slower_rotations_are_those_of_transformers(
    theta: float, width: int, scaling: RopeScaling, peer: dict[str, float]
) -> None:
    named = {"rope_type": scaling.kind, "rope_theta": theta, "factor": scaling.factor, **peer}
    named |= {"original_max_position_embeddings": scaling.original_length}
    cfg = LlamaConfig(**settings(head_dim=width, rope_parameters=named))
    expected, amplitude = ROPE_INIT_FUNCTIONS[scaling.kind](cfg, torch.device("cpu"))
    rate = theta ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    torch.testing.assert_close(scaling.slowed(rate, theta), expected.double(), rtol=1e-5, atol=0)
    assert scaling.amplitude == pytest.approx(amplitude)


def test_slower_rotations_by_hand() -> None:
    """Pairs that turn 8, 4, 2 and 1 times in the length before: w is 1, 1, 1/3 and 0."""
    rate = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64) * 2 * math.pi / 1000
    slowed = RopeScaling("llama3", 10.0, 1000).slowed(rate, theta=16.0)
    torch.testing.assert_close(slowed / rate, torch.tensor([1, 1, 0.4, 0.1], dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: RopeScaling("llama3", 0.5, 100),
            "rope_scaling: factor and original_length: expected at least 1, got 0.5 and 100",
        ),
        (
            lambda: RopeScaling("llama3", 2.0, 100, slow=4.0),
            "rope_scaling: slow: expected between 0 and fast 4, got 4",
        ),
        (
            lambda: AttentionConfig(4, rope=False, rope_scaling=RopeScaling("yarn", 2.0, 100)),
            "attention: rope_scaling: nothing turns without rope; leave one of them out",
        ),
    ],
)
def test_rotations_that_cannot_be_slowed(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        make()
    assert str(caught.value) == says


def test_sinks_and_biases_are_those_of_gpt_oss() -> None:
    cfg = GptOssConfig(**settings(attention_bias=True, layer_types=["sliding_attention"], sliding_window=9))
    peer, table = modeling_gpt_oss.GptOssAttention(cfg, 0), modeling_gpt_oss.GptOssRotaryEmbedding(cfg)

    def packed(p: Named) -> Named:
        named = renamed(p)
        sinks = named.pop("sinks.logit")
        return {**named, "sinks": sinks}

    branch = perturbed(ours(sinks=True, bias="all", window=9), D_MODEL, torch.float32)
    assert_peer(branch, peer, peer_run(peer, table, window=9), packed, D_MODEL)


def test_the_gated_attention_of_qwen3_next() -> None:
    """A quarter of each head turns; it packs each head's query and gate. Its norms keep w - 1: here w."""
    rope = {"rope_type": "default", "rope_theta": THETA, "partial_rotary_factor": 0.25}
    cfg = Qwen3NextConfig(**settings(rope_parameters=rope))
    peer, table = modeling_qwen3_next.Qwen3NextAttention(cfg, 0), modeling_qwen3_next.Qwen3NextRotaryEmbedding(cfg)
    peer.q_norm, peer.k_norm = (modeling_olmo2.Olmo2RMSNorm(WIDTH, cfg.rms_norm_eps) for _ in range(2))

    def packed(p: Named) -> Named:
        named = renamed(p)
        by_head = [named.pop(name).view(HEADS, WIDTH, D_MODEL) for name in ("q_proj.weight", "gate.weight")]
        return {**named, "q_proj.weight": torch.cat(by_head, dim=1).flatten(0, 1)}

    branch = perturbed(ours(qk_norm=True, output_gate=True, rope_fraction=0.25), D_MODEL, torch.float32)
    assert_peer(branch, peer, peer_run(peer, table), packed, D_MODEL)


def test_norms_over_all_heads_are_those_of_olmo2() -> None:
    cfg = Olmo2Config(**settings(rms_norm_eps=1e-6))
    peer, table = modeling_olmo2.Olmo2Attention(cfg, 0), modeling_olmo2.Olmo2RotaryEmbedding(cfg)
    branch = perturbed(ours(qk_norm=True, qk_norm_over="all"), D_MODEL, torch.float32)
    assert_peer(branch, peer, peer_run(peer, table), renamed, D_MODEL)


@pytest.mark.parametrize("q_rank", [None, 10])
def test_mla_is_the_one_of_deepseek_v3(q_rank: int | None) -> None:
    ranks = {"kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
    given = settings(q_lora_rank=q_rank, num_key_value_heads=HEADS, **ranks)
    cfg = DeepseekV3Config(**{key: value for key, value in given.items() if key != "head_dim"})
    peer = modeling_deepseek_v3.DeepseekV3Attention(cfg, 0)
    table = modeling_deepseek_v3.DeepseekV3RotaryEmbedding(cfg)

    def packed(p: Named) -> Named:
        query = {"q_proj.weight": p["q.weight"]}
        if q_rank is not None:
            query = {"q_b_proj.weight": p["q.weight"], "q_a_proj.weight": p["q_down.weight"]}
            query["q_a_layernorm.weight"] = p["q_norm.weight"]
        by_head = [p["k.weight"].view(HEADS, 6, -1), p["v.weight"].view(HEADS, 5, -1)]
        return query | {
            "kv_a_proj_with_mqa.weight": torch.cat([p["latent.weight"], p["k_rope.weight"]]),
            "kv_a_layernorm.weight": p["latent_norm.weight"],
            "kv_b_proj.weight": torch.cat(by_head, dim=1).flatten(0, 1),
            "o_proj.weight": p["o.weight"],
        }

    mla = MLAConfig(HEADS, kv_rank=12, q_rank=q_rank, nope_dim=6, rope_dim=4, value_dim=5, rope_theta=THETA)
    assert_peer(perturbed(mla, D_MODEL, torch.float32), peer, peer_run(peer, table), packed, D_MODEL)


# --- what has no class: written out for one head after another ---


def by_hand(q: Tensor, k: Tensor, v: Tensor, head: int, softcap: float | None = None) -> Tensor:
    """o of one query head, from q ``[B, T, H, K]`` and the keys of its group; extra keys may stand on the left."""
    key_head = head // (q.shape[2] // k.shape[2])
    scores = q[:, :, head] @ k[:, :, key_head].mT / math.sqrt(q.shape[3])
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    extra = k.shape[1] - LENGTH
    seen = torch.cat([torch.ones(LENGTH, extra, dtype=torch.bool), torch.ones(LENGTH, LENGTH).tril().bool()], dim=1)
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v[:, :, key_head]


def rows(x: Tensor) -> Tensor:
    return torch.arange(LENGTH).expand(x.shape[0], -1)


@pytest.mark.parametrize("how", ["add", "mul"])
def test_head_embeddings_tell_heads_apart(how: str) -> None:
    def definition(p: Named, x: Tensor) -> Tensor:
        heads = {}
        for name in "qkv":
            shared, own = x @ p[f"{name}.weight"].T, p[f"{name}_heads.weight"]
            each = [shared + e if how == "add" else shared * (1 + e) for e in own]
            heads[name] = torch.stack(each, dim=2)
        q, k = (rotate(heads[name], rows(x), THETA) for name in "qk")
        return torch.cat([by_hand(q, k, heads["v"], head) for head in range(HEADS)], dim=-1) @ p["o.weight"].T

    assert_recurrence(ours(head_embedding=how), D_MODEL, definition)


def test_persistent_keys_are_seen_by_all_and_softcap_bounds_scores() -> None:
    count = 3

    def definition(p: Named, x: Tensor) -> Tensor:
        q, k, v = ((x @ p[f"{name}.weight"].T).unflatten(-1, (-1, WIDTH)) for name in "qkv")
        more = {"k": p["persistent.k"] * math.sqrt(WIDTH), "v": p["persistent.v"] * math.sqrt(count)}
        k, v = (
            torch.cat([more[name].transpose(0, 1).expand(x.shape[0], -1, -1, -1), t], dim=1)
            for name, t in (("k", k), ("v", v))
        )
        return torch.cat([by_hand(q, k, v, head, 1.5) for head in range(HEADS)], dim=-1) @ p["o.weight"].T

    assert_recurrence(ours(rope=False, persistent=count, softcap=1.5), D_MODEL, definition)


def test_initial_values() -> None:
    values = initial(AttentionConfig(64, persistent=50, sinks=True, bias="all"), 2048)
    assert_normal(values["persistent.k"], 32**-0.5)
    assert_normal(values["persistent.v"], 50**-0.5)
    assert_normal(values["o.weight"], 0.02 / 4**0.5)
    assert values["sinks.logit"].std() == pytest.approx(0.02, rel=0.5)
    assert all((values[f"{name}.bias"] == 0).all() for name in "qkvo")
