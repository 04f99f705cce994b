"""Recipes at published sizes: the parameters that the authors' own models have, to the last one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lmtrain.config.load import Settings, load
from lmtrain.model.config import ModelConfig
from lmtrain.model.language_model import LanguageModel
from lmtrain.pretrain.command import main

PUBLISHED = {
    "llama-3.2-1b": 1_235_814_400,
    "qwen3-0.6b": 596_049_920,
    "qwen3-30b-a3b": 30_532_122_624,
    "olmo2-1b": 1_484_916_736,
    "deepseek-v3": 671_026_404_352,
    "mamba-1.4b": 1_372_178_432,
    "mamba2-1.3b": 1_343_757_312,
    "rwkv4-1.5b": 1_515_106_304,
    "rwkv7-1.5b": 1_527_404_544,
    "gla-1.3b": 1_365_514_240,
    "recurrentgemma-2b": 2_682_862_080,
    "nemotron-h-8b": 8_100_852_736,
    "qwen3-next-80b-a3b": 79_674_391_296,
    "kimi-linear-48b-a3b": 49_122_675_072,
}
"""Trainable parameters of the authors' model, a tied weight once; a router's selection bias is none."""
ACTIVE = {
    "qwen3-30b-a3b": 3_353_032_704,
    "deepseek-v3": 37_552_282_624,
    "qwen3-next-80b-a3b": 3_874_929_408,
    "kimi-linear-48b-a3b": 3_484_453_248,
}
"""Those a token uses, embedding and head included."""

LINEAR_MOE, D, HEADS, LAYERS = "linear-moe-a0.3b-2b", 1024, 8, 12
E, N, H = 2 * D, 128, 2 * D // 64  # of Mamba-2: inner width, state, heads
MIXERS = {
    "linear_attention": 4 * D**2 + D // HEADS,
    "lightning": 5 * D**2 + D,
    "retnet": 5 * D**2 + D // HEADS,
    "gla": 4 * D**2 + 16 * D + 16 * D // 2 + D // 2 + D // HEADS,
    "hgrn2": 4 * D**2 + D + D,
    "rwkv6": 5 * D**2 + 6 * D + 2 * 5 * 32 * D + 2 * 64 * D + 2 * D + 2 * D,
    "mamba2": D * (2 * E + 2 * N + H) + 5 * (E + 2 * N) + 3 * H + E + E * D,
    "deltanet": 4 * D**2 + HEADS * D + 3 * 4 * D + D // HEADS,
    "gated_deltanet": 5 * D**2 + 2 * HEADS * D + 2 * HEADS + 3 * 4 * D + D // HEADS,
    "mom": 3 * D**2 + 5 * (2 * D**2 + 2 * HEADS * D) + 4 * D + 3 * 4 * D + 2 * HEADS + D // HEADS,
    "attn": 4 * D**2,
}
"""Parameters of one mixer of Linear-MoE, from the shapes of its paper's weights."""


def published(name: str) -> Settings:
    return load([f"recipe={name}"])


def count(model: ModelConfig, active: bool = False) -> int:
    assert model.vocab_size is not None
    return model.num_params(model.vocab_size, active)


def text(name: str) -> str:
    return (Path(__file__).parents[2] / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_authors_model(name: str) -> None:
    model = published(name).recipe.model
    total = PUBLISHED[name]
    assert count(model) == total
    assert count(model, active=True) == ACTIVE.get(name, total)
    assert f"# {total:,} parameters" in text(name)
    assert name not in ACTIVE or f"{ACTIVE[name]:,} of them used by a token" in text(name)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("pattern", ["12 * ({} moe)", "3 * (3 * ({} moe) attn moe)"])
def test_linear_moe_with_each_of_its_mixers(mixer: str, pattern: str) -> None:
    """The authors' counts are without the vocabulary and of a mixer with four square matrices and no norm."""
    model = load([f"recipe={LINEAR_MOE}", f"model.pattern={pattern.format(mixer)}"]).recipe.model
    mixers = [MIXERS[name] - 4 * D**2 for name in model.order() if name != "moe"]
    assert len(mixers) == LAYERS
    vocabulary = 2 * 151_936 * D
    assert count(model) == vocabulary + 2_165_072_896 + sum(mixers)
    assert count(model, active=True) == vocabulary + 315_384_832 + sum(mixers)


def test_linear_moe_names_every_mixer_and_says_its_size() -> None:
    model = published(LINEAR_MOE).recipe.model
    assert {*MIXERS, "moe"} <= set(model.branches)
    used = [count(model, active) - 2 * 151_936 * D for active in (False, True)]
    assert f"# {used[0]:,} parameters, {used[1]:,} of them used by a token" in text(LINEAR_MOE)


@pytest.mark.parametrize("name", [*PUBLISHED, LINEAR_MOE])
def test_no_setting_of_a_branch_comes_from_the_base(name: str) -> None:
    """A published model is told in one file; the base's branches of the same name would fill what it leaves out."""
    settings = published(name)
    for branch in {*settings.recipe.model.order(), *(MIXERS if name == LINEAR_MOE else ())}:
        prefix = f"model.branches.{branch}."
        origins = {Path(source).stem for key, source in settings.sources.items() if key.startswith(prefix)}
        assert origins == {name}, branch


@pytest.mark.parametrize("name", ["recurrentgemma-2b", "rwkv7-1.5b", "kimi-linear-48b-a3b"])
def test_the_built_model_has_as_many(name: str) -> None:
    model = published(name).recipe.model
    assert model.vocab_size is not None
    with torch.device("meta"):
        built = LanguageModel(model, model.vocab_size)
    assert sum(parameter.numel() for parameter in built.parameters()) == count(model)


@pytest.mark.parametrize("name", [*PUBLISHED, LINEAR_MOE])
def test_dry_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # where there is no tokenizer and no data
    recipe = published(name).recipe
    assert main([f"recipe={name}", "dry_run=true", "json=true"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["num_params"] == count(recipe.model) and facts["vocab_size"] == recipe.model.vocab_size
    assert len(facts["missing"]) == 2 and facts["peak_bytes"] > 16 * facts["num_params"]
    assert not list(tmp_path.iterdir())
