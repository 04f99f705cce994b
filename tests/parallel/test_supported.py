"""Combinations: what is refused, with what works instead; and the table says the same."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from lmtrain.errors import UsageError
from lmtrain.model.config import ModelConfig
from lmtrain.model.ffn.mlp import MLPConfig
from lmtrain.model.ffn.moe_settings import MoEConfig
from lmtrain.model.mixers.attention_settings import AttentionConfig
from lmtrain.model.mixers.lstm import LSTMConfig
from lmtrain.model.mixers.mamba2 import Mamba2Config
from lmtrain.model.mixers.mla import MLAConfig
from lmtrain.parallel.config import ClusterConfig, MeshConfig
from lmtrain.parallel.mesh import resolve
from lmtrain.parallel.supported import COMBINATIONS, Setup, check, table

BRANCHES: dict[str, Any] = {
    "ssm": Mamba2Config(d_state=8, head_dim=8, conv_width=4),
    "wide": AttentionConfig(num_heads=8, num_kv_heads=4),
    "narrow": AttentionConfig(num_heads=8, num_kv_heads=2),
    "local": AttentionConfig(num_heads=8, num_kv_heads=4, window=8),
    "latent": MLAConfig(num_heads=2, kv_rank=6, nope_dim=4, rope_dim=2, value_dim=3),
    "rnn": LSTMConfig(),
    "mlp": MLPConfig(d_ff=32),
    "moe": MoEConfig(num_experts=6, top_k=2, d_expert=8),
}


def setup(pattern: str, seq_len: int, axes: dict[str, int], run_blocks: int = 1, **cluster: Any) -> Setup:
    sizes = {"dp_shard": 1, **axes}
    world = sizes["dp_shard"] * sizes.get("sp", 1) * sizes.get("pp", 1) * sizes.get("tp", 1)
    mesh = resolve(MeshConfig(**sizes), world)
    return Setup(ModelConfig(16, BRANCHES, pattern), seq_len, ClusterConfig(**cluster), mesh, run_blocks)


def told(pattern: str, seq_len: int, axes: dict[str, int], **cluster: Any) -> str | None:
    """Why it is refused, None if it is not."""
    wanted = setup(pattern, seq_len, axes, **cluster)
    try:
        check(
            wanted.model,
            seq_len=wanted.seq_len,
            cluster=wanted.cluster,
            mesh=wanted.mesh,
            run_blocks=wanted.run_blocks,
        )
    except UsageError as refused:
        return str(refused)
    return None


@pytest.mark.parametrize(
    ("pattern", "seq_len", "axes", "cluster"),
    [
        ("ssm wide moe", 32, {}, {}),
        ("ssm narrow mlp", 32, {"dp_shard": 4, "sp": 8}, {"activation_checkpointing": True}),
        ("rnn", 32, {"dp_shard": 4}, {}),
        ("mlp", 32, {"sp": 4}, {}),  # `rnn` is named, and not used
        ("ssm", 12, {"sp": 4}, {}),  # shards of three columns, which is what a convolution looks back
        ("wide mlp", 4, {"sp": 4}, {"sp_attention": "heads"}),
        ("narrow", 32, {"sp": 4}, {"sp_attention": "gather"}),
        ("ssm mlp", 32, {"sp": 8}, {"sp_attention": "heads"}),  # no attention branch
        ("wide", 32, {"sp": 4}, {"sp_attention": "heads"}),  # `narrow` is named, and not used
        ("moe", 32, {"dp_shard": 3, "sp": 2, "ep": 6}, {}),
        ("rnn ssm local moe", 32, {"dp_shard": 2}, {"run_blocks": 4, "activation_checkpointing": True}),
        ("ssm local mlp", 32, {"sp": 4}, {"run_blocks": 4, "sp_attention": "gather"}),
        ("ssm mlp", 32, {"sp": 4}, {"run_blocks": 4, "sp_attention": "heads"}),
        ("ssm local mlp", 32, {"dp_shard": 4}, {"run_blocks": 4, "sp_attention": "heads"}),
    ],
)
def test_works(pattern: str, seq_len: int, axes: dict[str, int], cluster: dict[str, Any]) -> None:
    assert told(pattern, seq_len, axes, **cluster) is None


REFUSED: list[tuple[str, int, dict[str, int], dict[str, Any], str]] = [
    (
        "mlp",
        32,
        {"pp": 2, "dp_shard": 3},
        {},
        "mesh.pp=2: pipeline parallelism is not built yet; use mesh.pp=1 mesh.dp_shard=6",
    ),
    ("mlp", 32, {"tp": 4}, {}, "mesh.tp=4: tensor parallelism is not built yet; use mesh.tp=1 mesh.dp_shard=4"),
    (
        "wide",
        31,
        {"sp": 4},
        {},
        "mesh.sp=4: 4 ranks cannot cut data.seq_len 31 into equal parts; use data.seq_len=32, or mesh.sp=1",
    ),
    (
        "wide",
        2,
        {"sp": 4},
        {},
        "mesh.sp=4: 4 ranks cannot cut data.seq_len 2 into equal parts; use data.seq_len=4, or mesh.sp=2",
    ),
    (
        "mlp rnn",
        32,
        {"dp_shard": 3, "sp": 4},
        {},
        "mesh.sp=4: model.branches.rnn (lstm) runs token by token over whole rows; use mesh.sp=1 mesh.dp_shard=12",
    ),
    (
        "mlp ssm",
        8,
        {"sp": 4},
        {},
        "mesh.sp=4: model.branches.ssm looks back over 3 columns, but a shard of data.seq_len 8 has 2; "
        "use mesh.sp=2, or data.seq_len=12",
    ),
    (
        "wide narrow",
        32,
        {"sp": 4},
        {"sp_attention": "heads"},
        "sp_attention=heads: mesh.sp=4 does not divide the 2 key/value heads of model.branches.narrow; "
        "use sp_attention=auto (gathers keys and values there)",
    ),
    (
        "local wide",
        32,
        {},
        {"run_blocks": 4},
        "data.run_blocks=4: model.branches.wide (attention) sees its whole document, so its state would grow with the "
        "run; use model.branches.wide.window=32, or data.run_blocks=1",
    ),
    (
        "latent",
        32,
        {},
        {"run_blocks": 2},
        "data.run_blocks=2: model.branches.latent (mla) sees its whole document, so its state would grow with the "
        "run; use data.run_blocks=1",
    ),
    (
        "ssm local",
        32,
        {"sp": 4},
        {"run_blocks": 4, "sp_attention": "heads"},
        "sp_attention=heads: model.branches.local cannot carry its state there (data.run_blocks=4); "
        "use sp_attention=auto (gathers keys and values)",
    ),
    ("mlp", 32, {"dp_shard": 2, "ep": 2}, {}, "mesh.ep=2: no branch of model.pattern has experts; use mesh.ep=1"),
    (
        "moe",
        32,
        {"dp_shard": 4, "ep": 4},
        {},
        "mesh.ep=4: does not divide the 6 experts of model.branches.moe; use mesh.ep=3",
    ),
]


@pytest.mark.parametrize(("pattern", "seq_len", "axes", "cluster", "says"), REFUSED, ids=lambda value: str(value)[:30])
def test_refuses_and_says_what_works(
    pattern: str, seq_len: int, axes: dict[str, int], cluster: dict[str, Any], says: str
) -> None:
    assert told(pattern, seq_len, axes, **cluster) == says


def test_what_the_refusals_propose_is_accepted() -> None:
    assert told("mlp", 32, {"dp_shard": 6}) is None
    assert told("wide", 32, {"sp": 4}) is None
    assert told("mlp ssm", 8, {"sp": 2}) is None and told("mlp ssm", 12, {"sp": 4}) is None
    assert told("wide narrow", 32, {"sp": 4}, sp_attention="auto") is None
    assert told("ssm local", 32, {"sp": 4}, run_blocks=4, sp_attention="auto") is None


def test_every_rule_has_a_case() -> None:
    cases = [(setup(*case[:3], **case[3]), case[4]) for case in REFUSED]
    for row in COMBINATIONS:
        assert row.refusal is None or any(row.refusal(wanted) == says for wanted, says in cases), row.setting


def test_the_table_is_printed() -> None:
    done = subprocess.run([sys.executable, "-m", "lmtrain.parallel"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == table()
    lines = table().splitlines()
    assert len(lines) == 2 + len(COMBINATIONS) and all(line.count("|") == 4 for line in lines)
