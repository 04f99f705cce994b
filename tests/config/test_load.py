"""Recipes and command lines that load, and what they become."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import lmtrain
from lmtrain.config import files
from lmtrain.config.files import names
from lmtrain.config.load import load
from lmtrain.config.render import render
from lmtrain.model.ffn.mlp import MLPConfig
from lmtrain.model.mixers.attention_settings import AttentionConfig

Write = Callable[[str, str], str]
FIXTURES = Path(__file__).parent / "fixtures"


@pytest.mark.parametrize("cluster", names("cluster"))
@pytest.mark.parametrize("recipe", names("recipe"))
def test_every_shipped_recipe_loads(recipe: str, cluster: str) -> None:
    settings = load([f"recipe={recipe}", f"cluster={cluster}"])
    assert settings.recipe.run.dir == f"runs/{recipe}"


def test_every_line_of_a_shipped_file_is_commented() -> None:
    root = Path(__file__).parents[2] / "recipes"
    for path in [*root.glob("*.yaml"), *(root / "cluster").glob("*.yaml")]:
        bare = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip() and "#" not in line]
        assert bare == [], path


def test_recipes_are_found_in_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lmtrain" / "recipes" / "cluster").mkdir(parents=True)
    (tmp_path / "lmtrain" / "recipes" / "own.yaml").write_text("", encoding="utf-8")
    monkeypatch.setattr(lmtrain, "__path__", [str(tmp_path / "lmtrain")])
    assert files.names("recipe") == ["own"]
    assert files.folder("cluster") == tmp_path / "lmtrain" / "recipes" / "cluster"


@pytest.mark.parametrize("text", ["100e9", "100_000_000_000", "100000000000", "1e11"])
def test_integers_may_have_an_exponent(write: Write, text: str) -> None:
    on_the_line = load(["recipe=small.yaml", "train.steps=null", f"train.tokens={text}"]).recipe.train
    write("child.yaml", f"base: small.yaml\ntrain: {{steps: null, tokens: {text}}}")
    in_the_file = load(["recipe=child.yaml"]).recipe.train
    assert on_the_line == in_the_file
    assert on_the_line.tokens == 100_000_000_000
    assert type(on_the_line.tokens) is int


def test_null_forgets_what_the_recipe_names(write: Write) -> None:
    """Words hold in their order: first no source, then one."""
    data = load(["recipe=small.yaml", "data.sources=null", "data.sources.other.path=x"]).recipe.data
    assert list(data.sources) == ["other"]


def test_float_keys_take_integers(write: Write) -> None:
    rate = load(["recipe=small.yaml", "train.lr=1"]).recipe.train.lr
    assert (rate, type(rate)) == (1.0, float)


def test_command_line_wins_over_file_and_file_over_base(write: Write) -> None:
    write("child.yaml", "base: small.yaml\nseed: 2\ntrain: {lr: 2e-3, log_every: 5}\n")
    settings = load(["recipe=child.yaml", "train.lr=3e-3", "train.lr=4e-3"])
    train = settings.recipe.train
    assert (train.lr, train.log_every, train.steps, settings.recipe.seed) == (4e-3, 5, 10, 2)
    assert settings.sources["train.lr"] == "command line"
    assert settings.sources["train.log_every"] == "child.yaml"
    assert settings.sources["train.steps"] == "small.yaml"
    assert "train.z_loss" not in settings.sources


def test_keys_of_recipe_cluster_and_launch_share_the_command_line(write: Write) -> None:
    settings = load(
        ["recipe=small.yaml", "cluster=laptop", "seed=3", "mesh.sp=2", "dtype=bfloat16", "resume=true", "dry_run=true"]
    )
    assert settings.recipe.seed == 3
    assert (settings.cluster.mesh.sp, settings.cluster.dtype, settings.cluster.fsdp_units) == (2, "bfloat16", "root")
    assert (settings.launch.resume, settings.launch.dry_run) == ("true", True)
    assert settings.resolved["cluster"]["mesh"]["sp"] == 2
    assert settings.resolved["recipe"]["model"]["branches"]["ssm"]["head_dim"] == 32


def test_launch_values_are_taken_as_written(write: Write) -> None:
    settings = load(["recipe=small.yaml", "resume=runs/1e3", "init_from=null"])
    assert (settings.launch.resume, settings.launch.init_from) == ("runs/1e3", None)


def test_bases_chain_and_are_found_beside_the_file_or_by_name(write: Write, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write("deep/middle.yaml", "base: ../small.yaml\nseed: 5\n")
    write("top.yaml", "base: deep/middle.yaml\n")
    write("named.yaml", "base: tiny\nseed: 6\n")
    assert load(["recipe=top.yaml"]).recipe.seed == 5
    named = load(["recipe=named.yaml"]).recipe
    assert (named.seed, named.model) == (6, load(["recipe=tiny"]).recipe.model)


def test_a_branch_of_another_kind_inherits_nothing(write: Write) -> None:
    write("child.yaml", "base: small.yaml\nmodel: {branches: {attn: {kind: mlp, d_ff: 32}, mlp: {d_ff: 64}}}")
    branches = load(["recipe=child.yaml", "model.branches.ssm={kind: attention, num_heads: 2}"]).recipe.model.branches
    assert branches["attn"] == MLPConfig(d_ff=32)
    assert branches["mlp"] == MLPConfig(d_ff=64)
    assert branches["ssm"] == AttentionConfig(num_heads=2)


def test_interpolation(write: Write) -> None:
    write("child.yaml", "base: small.yaml\ntrain: {schedule: {warmup_tokens: '${train.batch_tokens}'}}")
    assert load(["recipe=child.yaml", "train.batch_tokens=2048"]).recipe.train.schedule.warmup_tokens == 2048
    assert load(["recipe=small.yaml", "eval.every=${train.steps}"]).recipe.eval.every == 10


@pytest.mark.parametrize("extra", [[], ["run.dir=runs/\u00e9\U0001f680 ${x}".replace("${", "\\${")], ["train.lr=1e-7"]])
def test_the_written_recipe_loads_to_an_equal_one(write: Write, extra: list[str]) -> None:
    recipe = load(["recipe=demo", *extra]).recipe
    text = render(recipe)
    write("recipe.yaml", text)
    assert load(["recipe=recipe.yaml"]).recipe == recipe
    assert "seq_len: 256  # Tokens in a row." in text


def test_format_1_keeps_loading() -> None:
    recipe = load([f"recipe={FIXTURES / 'recipe-v1.yaml'}"]).recipe
    assert recipe.train.tokens == 100_000
    assert recipe.train.optimizer.betas == (0.9, 0.95)
    assert recipe.model.order() == ["ssm", "mlp", "ssm", "mlp", "attn", "mlp"]
    assert recipe.model.branches["attn"] == AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=32, rope=False)
    assert (recipe.seed, recipe.run.dir, recipe.data.sources["reference"].weight) == (7, "runs/first", 0.2)


def test_loading_imports_no_heavy_library(tmp_path: Path) -> None:
    program = (
        "import sys; from lmtrain.config.load import load; load(['recipe=demo']);"
        "print([m for m in ('transformers', 'datasets', 'deepspeed', 'wandb', 'lm_eval') if m in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
