"""The dry run: its keys, counts equal to the built model's, and a memory estimate near what autograd keeps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lmtrain.data.config import DataConfig, SourceConfig
from lmtrain.errors import UsageError
from lmtrain.model.config import ModelConfig
from lmtrain.model.context import LocalContext
from lmtrain.model.ffn.mlp import MLPConfig
from lmtrain.model.language_model import LanguageModel
from lmtrain.model.mixers.attention_settings import AttentionConfig
from lmtrain.model.mixers.mamba2 import Mamba2Config
from lmtrain.ops.documents import Documents
from lmtrain.parallel.config import ClusterConfig, MeshConfig
from lmtrain.plan.dry_run import embedding_rows, rows_per_pass, summary
from lmtrain.plan.memory import estimate
from lmtrain.plan.text import count, size, text
from lmtrain.train.config import TrainConfig

BRANCHES = {
    "ssm": Mamba2Config(head_dim=32, d_state=32),
    "attn": AttentionConfig(num_heads=4, num_kv_heads=2, rope=False),
    "mlp": MLPConfig(d_ff=512, activation="relu2"),
}
MODEL = ModelConfig(d_model=128, branches=BRANCHES, pattern="2 * (ssm mlp) attn mlp")
DATA = DataConfig("no/tokenizer.json", 256, {"code": SourceConfig("no/code")})
TRAIN = TrainConfig(batch_tokens=2048, lr=1e-3, tokens=10_000)
CPU = ClusterConfig(device="cpu", dtype="float32")
ONE = MeshConfig(dp_shard=1)


def test_keys_and_values() -> None:
    plan = summary(MODEL, DATA, TRAIN, CPU, world_size=2, tokenizer_size=2000)
    assert set(plan) == {
        *("format_version", "num_params", "num_active_params", "flops_per_token", "peak_bytes", "mesh"),
        *("tokens_per_step", "steps", "vocab_size", "microbatch", "memory", "branches", "missing", "warnings"),
    }
    assert (plan["tokens_per_step"], plan["steps"], plan["vocab_size"]) == (2048, 5, 2048)
    assert plan["mesh"] == {"pp": 1, "dp_replicate": 1, "dp_shard": 2, "sp": 1, "tp": 1, "ep": 1}
    assert plan["peak_bytes"] == sum(plan["memory"].values())
    assert [(row["name"], row["kind"], row["count"]) for row in plan["branches"]] == [
        ("ssm", "mamba2", 2),
        ("mlp", "mlp", 3),
        ("attn", "attention", 1),
    ]
    assert ["tokenizer" in plan["missing"][0], "code" in plan["missing"][1]] == [True, True]
    assert json.loads(json.dumps(plan)) == plan
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("tie", [False, True])
def test_counts_equal_the_built_model(tie: bool) -> None:
    model = ModelConfig(d_model=128, branches=BRANCHES, pattern="2 * (ssm mlp) attn mlp", tie_embeddings=tie)
    plan = summary(model, DATA, TRAIN, CPU, world_size=1, tokenizer_size=2048)
    with torch.device("meta"):
        built = LanguageModel(model, plan["vocab_size"])
    assert plan["num_params"] == sum(parameter.numel() for parameter in built.parameters())
    for row in plan["branches"]:
        block = next(block for block in built.blocks if block.branch.cfg == BRANCHES[row["name"]])
        assert row["num_params"] == sum(parameter.numel() for parameter in block.branch.parameters())


def test_without_a_vocabulary_the_summary_says_so() -> None:
    plan = summary(MODEL, DATA, TRAIN, CPU, world_size=1, tokenizer_size=None)
    assert [plan[key] for key in ("num_params", "num_active_params", "flops_per_token", "peak_bytes")] == [None] * 4
    assert plan["steps"] == 5
    assert "need the vocabulary" in text(plan)


def test_text_says_what_the_dictionary_holds() -> None:
    plan = summary(MODEL, DATA, TRAIN, CPU, world_size=4, tokenizer_size=2048)
    words = text(plan)
    for part in (count(plan["num_params"]), size(plan["peak_bytes"]), "5 steps x 2,048", "dp_shard 4", "no/tokenizer"):
        assert part in words


def test_what_cannot_run_is_refused() -> None:
    three = ClusterConfig(mesh=MeshConfig(sp=3))
    with pytest.raises(UsageError, match=r"mesh\.sp=3: 3 ranks cannot cut data\.seq_len 256"):
        summary(MODEL, DATA, TRAIN, three, world_size=3, tokenizer_size=None)


def test_embedding_rows() -> None:
    assert embedding_rows(MODEL, 2049) == 2176
    assert embedding_rows(ModelConfig(8, vocab_size=100), None) == 100
    with pytest.raises(UsageError, match="less than the tokenizer's 101"):
        embedding_rows(ModelConfig(8, vocab_size=100), 101)


@pytest.mark.parametrize(
    ("tokens", "ranks", "microbatch", "rows"), [(2048, 1, None, 8), (2048, 2, None, 4), (2560 * 2, 2, None, 5)]
)
def test_rows_per_pass(tokens: int, ranks: int, microbatch: int | None, rows: int) -> None:
    train = TrainConfig(batch_tokens=tokens, lr=1)
    assert rows_per_pass(DATA, train, ClusterConfig(microbatch=microbatch), MeshConfig(dp_shard=ranks)) == rows


def test_rows_that_do_not_divide() -> None:
    with pytest.raises(UsageError, match=r"microbatch: 3 rows .* possible: 1, 2, 4, 8"):
        rows_per_pass(DATA, TRAIN, ClusterConfig(microbatch=3), ONE)
    with pytest.raises(UsageError, match=r"train.batch_tokens: 2048 do not divide over 3 .* nearest: 2304"):
        rows_per_pass(DATA, TRAIN, CPU, MeshConfig(dp_shard=3))


def kept_bytes(model: ModelConfig, recompute: bool) -> int:
    """Bytes autograd keeps of two rows of 256 tokens, parameters aside."""
    built = LanguageModel(model, 128)
    built.initialise(0)
    for block in built.blocks:
        block.recompute = recompute
    own = {parameter.untyped_storage().data_ptr() for parameter in built.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.zeros(2, 256, dtype=torch.int32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        built(tokens, LocalContext(Documents.from_ids(tokens)), {})
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", sorted(BRANCHES))
def test_estimated_activations_grow_as_what_autograd_keeps(name: str, recompute: bool) -> None:
    """Four more branches of a kind, within a factor of 1.5 (recomputed ones keep their input alone: within 1.01)."""
    few, many = (ModelConfig(d_model=128, branches=BRANCHES, pattern=f"{n} * {name}") for n in (1, 5))
    cluster = ClusterConfig(activation_checkpointing=recompute)
    estimated = [
        estimate(model, 128, 256, mesh=ONE, cluster=cluster, microbatch=2, dtype=torch.float32).activations
        for model in (few, many)
    ]
    ratio = (estimated[1] - estimated[0]) / (kept_bytes(many, recompute) - kept_bytes(few, recompute))
    bound = 1.01 if recompute else 1.5
    assert 1 / bound <= ratio <= bound, ratio


def test_memory_shrinks_with_shards_and_units() -> None:
    def parts(mesh: MeshConfig, **cluster: object):
        settings = ClusterConfig(**cluster)  # type: ignore[arg-type]
        return estimate(MODEL, 2048, 256, mesh=mesh, cluster=settings, microbatch=2, dtype=torch.bfloat16)

    one, four = parts(ONE), parts(MeshConfig(dp_shard=2, sp=2))
    assert 4 * four.optimizer == pytest.approx(one.optimizer, rel=1e-3)
    assert 2 * four.activations == one.activations and four.logits <= one.logits  # of a chunk, not of the row
    assert parts(ONE, fsdp_units="root").gathered > one.gathered
    assert parts(ONE, activation_checkpointing=True).activations < one.activations / 2


def test_carried_state_is_of_all_rows_of_a_step() -> None:
    model = ModelConfig(d_model=128, branches=BRANCHES, pattern="2 * (ssm mlp)")
    carried = []
    for run_blocks in (1, 4):
        plan = summary(model, replace(DATA, run_blocks=run_blocks), TRAIN, CPU, world_size=2, tokenizer_size=2048)
        carried.append(plan["memory"]["carried"])
    assert carried == [0, 2 * 4 * BRANCHES["ssm"].state_bytes(128, 1, 256)]  # two branches, 2048 / 256 / 2 rows
    longer = replace(BRANCHES["attn"], window=900)  # than a row: filled by the fourth
    model = ModelConfig(d_model=128, branches={"attn": longer}, pattern="attn")
    plan = summary(model, replace(DATA, run_blocks=4), TRAIN, CPU, world_size=2, tokenizer_size=2048)
    assert plan["memory"]["carried"] == 4 * 2 * 899 * 2 * 32 * 4  # rows, keys and values, columns, heads, fp32


def test_plan_does_not_import_config() -> None:
    for path in (Path(__file__).parents[2] / "lmtrain" / "plan").glob("*.py"):
        assert "lmtrain.config" not in path.read_text(encoding="utf-8")
