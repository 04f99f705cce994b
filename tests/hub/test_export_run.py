"""From a run that was really trained to a folder that transformers loads; what is refused, and what is left then."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import xxhash
import yaml

from lmtrain import cli
from lmtrain.errors import DataError, UsageError
from lmtrain.export import export
from lmtrain.hub import export as hub_export
from lmtrain.hub import nemotron_h
from lmtrain.hub.table import Rule
from lmtrain.hub.weights import read_weights
from lmtrain.trained import load_model
from tests.small_run import damage, train, words

NEMOTRON = ("model.branches.attn.rope=false", "model.branches.mlp.activation=relu2")
SHORT = ("train.steps=3", "train.schedule.warmup_tokens=256", "train.schedule.decay_tokens=256", "checkpoint.every=2")


@pytest.fixture(scope="module")
def trained(small_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three steps, with checkpoints of steps 2 and 3; read only."""
    run = tmp_path_factory.mktemp("run") / "tiny"
    outcome = train(words(small_recipe, run, *NEMOTRON, *SHORT))
    assert outcome.code == 0, outcome.err
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(trained, tmp_path / "tiny"))


def verb(*argv: str) -> int:
    """``lmtrain export ...`` in this process; its exit code."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", *argv])
    return int(ended.value.code or 0)


def test_the_newest_checkpoint_is_loaded(run: Path) -> None:
    trained = load_model(run)
    assert (trained.step, trained.checkpoint.name) == (3, "step-00000003")
    assert trained.tokens and not any(p.requires_grad for p in trained.model.parameters())
    older = load_model(run, step=2)
    assert older.step == 2 and load_model(older.checkpoint).step == 2
    assert not torch.equal(older.model.embed.weight, trained.model.embed.weight)
    damage(trained.checkpoint)
    assert load_model(run).step == 2


def test_what_cannot_be_loaded_says_why(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither the folder of a run"):
        load_model(tmp_path)
    with pytest.raises(DataError, match="there is no checkpoint of step 7; there are 2, 3"):
        load_model(run, step=7)
    other = tmp_path / "tokenizer.json"
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    spec = json.loads(Path(recipe["data"]["tokenizer"]).read_text(encoding="utf-8"))
    spec["normalizer"] = {"type": "Lowercase"}
    other.write_text(json.dumps(spec), encoding="utf-8")
    recipe["data"]["tokenizer"] = str(other)
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    with pytest.raises(DataError, match="not the tokenizer that"):
        load_model(run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(DataError, match="there is no checkpoint in"):
        load_model(run)


def test_a_relative_tokenizer_is_found_from_where_the_run_began(run: Path) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    began = json.loads((run / "environment.json").read_text(encoding="utf-8"))["directory"]
    recipe["data"]["tokenizer"] = os.path.relpath(recipe["data"]["tokenizer"], began)
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    home = os.getcwd()
    os.chdir(run)
    try:
        assert load_model(run).step == 3
        recipe["data"]["tokenizer"] = "nowhere/tokenizer.json"
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        with pytest.raises(DataError, match=r"nowhere/tokenizer\.json: no such tokenizer; .*recipe\.yaml names it"):
            load_model(run)
    finally:
        os.chdir(home)


def test_the_command_makes_a_proven_export_once(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb(str(run), "prompt=a b=c") == 0
    told = capsys.readouterr().out
    assert "transformers alone continues: 'a b=c" in told
    out = run / "export"
    assert f"{out}: NemotronHForCausalLM of transformers, step 3" in told
    assert "largest difference of a logit: " in told and "generation with the cache equals that without" in told
    assert f'AutoModelForCausalLM.from_pretrained("{out}")' in told
    names = "README.md config.json generation_config.json lmtrain_export.json model.safetensors recipe.yaml"
    assert sorted(path.name for path in out.iterdir()) == [*names.split(), "tokenizer.json", "tokenizer_config.json"]
    facts = json.loads((out / "lmtrain_export.json").read_text(encoding="utf-8"))
    assert facts["parity"]["max_logit_diff"] < 1e-4 * facts["parity"]["logit_std"]
    assert facts["parity"]["perturbed_max_logit_diff"] < 1e-4 * facts["parity"]["perturbed_logit_std"]
    assert (facts["step"], facts["class"], facts["dtype"]) == (3, "NemotronHForCausalLM", "float32")
    assert facts["texts"][0].startswith("a b=c") and facts["parity"]["probe"] == [2, 133]
    assert facts["sources"] == {"prose": 0.7, "lists": 0.3}
    for name, entry in facts["files"].items():
        content = (out / name).read_bytes()
        assert (len(content), xxhash.xxh3_128_hexdigest(content)) == (entry["bytes"], entry["xxh3_128"]), name
    assert (out / "recipe.yaml").read_bytes() == (run / "recipe.yaml").read_bytes()
    front = yaml.safe_load((out / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert front["library_name"] == "transformers" and "nemotron_h" in front["tags"]
    assert verb(str(run)) == 64
    assert "an export is there; choose another out=, or replace it with overwrite=true" in capsys.readouterr().err
    assert not list(run.glob(".*.partial"))


def test_overwrite_replaces_an_export_and_nothing_else(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match="exists and is not an export of lmtrain"):
        export(run, out, overwrite=True)
    assert (out / "thesis.txt").exists()
    (out / "lmtrain_export.json").write_text("{}", encoding="utf-8")  # as if it were one
    result = export(run, out, step=2, dtype="bfloat16", overwrite=True, prompts=["a", "b c"], new_tokens=5)
    assert not (out / "thesis.txt").exists()
    assert result.step == 2 and result.path == out and result.cached_equals_uncached
    assert result.rounding_logit_diff > 0 and result.max_logit_diff < 1e-4 * result.logit_std
    assert [text[:1] for text in result.texts] == ["a", "b"]
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "bfloat16" and config["pad_token_id"] is None
    assert read_weights(out)["lm_head.weight"].dtype == torch.bfloat16
    assert "Rounding the weights to bfloat16" in (out / "README.md").read_text(encoding="utf-8")


def test_a_wrong_table_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swap = {"mixer.A_log": "mixer.dt_bias", "mixer.dt_bias": "mixer.A_log"}  # the same shapes
    mixer = [Rule(r.ours, (swap.get(r.disk[0], r.disk[0]),), r.transform, r.keep_fp32) for r in nemotron_h.MIXER]
    monkeypatch.setattr(nemotron_h, "MIXER", mixer)
    with pytest.raises(DataError, match="is not the model that was trained: NemotronH: logits differ by"):
        export(run, tmp_path / "deep" / "out")
    assert not list((tmp_path / "deep").iterdir())


def test_refusals_come_before_any_work(
    run: Path, small_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub_export, "run_transformers", lambda *args: pytest.fail("must not come so far"))
    assert verb(str(run), "dtype=float16") == 64
    assert "dtype: expected float32 or bfloat16, got float16" in capsys.readouterr().err
    assert verb(str(run), "stepp=2") == 64
    assert "stepp: unknown key; did you mean step?" in capsys.readouterr().err
    assert verb(str(run), "step=2.5") == 64
    assert verb(str(run), "overwrite=yes") == 64
    assert verb(str(run), "more") == 64
    assert verb(str(run), "prompt=") == 64
    assert verb(str(tmp_path / "nothing")) == 65
    capsys.readouterr()
    assert verb() == 0
    assert "python launch/export.py RUN" in capsys.readouterr().out
    recipe = (run / "recipe.yaml").read_text(encoding="utf-8")
    (run / "recipe.yaml").write_text(recipe.replace("rope: false", "rope: true"), encoding="utf-8")
    assert verb(str(run)) == 64
    assert (
        "no transformers class computes exactly this model. NemotronH: attention.rope is true"
        in capsys.readouterr().err
    )
    assert not (run / "export").exists()
