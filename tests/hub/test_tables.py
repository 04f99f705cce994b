"""Every table, there and back, bit for bit; and the files the tensors travel in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lmtrain.errors import DataError
from lmtrain.hub.match import require
from lmtrain.hub.table import LESS_ONE, to_disk, to_ours
from lmtrain.hub.weights import INDEX, read_weights, write_weights
from tests.hub.models import MODELS, VOCAB, build, config, shapes


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shard_bytes", [10**9, 40_000], ids=["one file", "shards"])
def test_round_trip_is_exact(name: str, shard_bytes: int, tmp_path: Path) -> None:
    model = build(config(name))
    ours = dict(model.state_dict())
    for key, tensor in ours.items():
        if key.endswith("router_bias") and model.get_submodule(key.rpartition(".")[0]).cfg.balance != "bias":
            tensor.zero_()  # does not take part in the choice: written as zeros, or not at all
    rules = require(model.cfg).rules(model.cfg)
    write_weights(tmp_path, rules, ours, torch.float32, shard_bytes)
    assert (tmp_path / INDEX).exists() == (shard_bytes < 10**9)
    back = to_ours(rules, read_weights(tmp_path), shapes(model))
    assert back.keys() == ours.keys()
    for key, tensor in ours.items():
        assert torch.equal(back[key], tensor), key


def test_shards_are_small_complete_and_indexed(tmp_path: Path) -> None:
    model = build(config("NemotronH moe"))
    rules = require(model.cfg).rules(model.cfg)
    records = write_weights(tmp_path, rules, dict(model.state_dict()), torch.float32, 60_000)
    index = json.loads((tmp_path / INDEX).read_text(encoding="utf-8"))
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    largest = max(sum(t.numel() * 4 for _, t in to_disk([rule], model.state_dict())) for rule in rules)
    for shard in shards:
        held = load_file(tmp_path / shard)
        assert {name for name, file in index["weight_map"].items() if file == shard} == held.keys()
        assert sum(t.numel() * 4 for t in held.values()) <= max(60_000, largest)
        assert records[shard].bytes == (tmp_path / shard).stat().st_size
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in read_weights(tmp_path).values())


def test_bfloat16_keeps_decays_and_routers_in_fp32(tmp_path: Path) -> None:
    model = build(config("NemotronH moe"))
    write_weights(tmp_path, require(model.cfg).rules(model.cfg), dict(model.state_dict()), torch.bfloat16)
    disk = read_weights(tmp_path)
    kept = {name.rpartition("mixer.")[2] for name, tensor in disk.items() if tensor.dtype == torch.float32}
    assert kept == {"A_log", "dt_bias", "D", "gate.weight", "gate.e_score_correction_bias"}
    assert torch.equal(disk["backbone.layers.0.mixer.A_log"], model.state_dict()["blocks.0.branch.decay.A_log"])


def test_decays_on_disk_are_those_the_class_makes() -> None:
    """MiniMax reads them from there, other programs from the configuration."""
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    cfg = config("MiniMax")
    cls = require(cfg)
    theirs = MiniMaxConfig(**cls.config(cfg, VOCAB, 128))
    disk = dict(to_disk([rule for rule in cls.rules(cfg) if not rule.ours], {}))
    for layer in (0, 2):
        for name, made in MiniMaxLightningAttention(theirs, layer).named_buffers():
            torch.testing.assert_close(disk.pop(f"model.layers.{layer}.self_attn.{name}"), made, msg=name)
    assert not disk


def test_a_norm_kept_as_w_less_one_comes_back() -> None:
    """Bit for bit from 1/2 on; a smaller weight to what the class computes with, which then comes back bit for bit."""
    large, small = torch.linspace(0.5, 9, 10**5), torch.linspace(-9, 0.5, 10**5)

    def there_and_back(w: torch.Tensor) -> torch.Tensor:
        return LESS_ONE.to_ours(LESS_ONE.to_disk([w]), [w.shape])[0]

    assert torch.equal(there_and_back(large), large)
    once = there_and_back(small)
    assert ((once - small).abs() <= 2**-24 * (1 + small.abs())).all()
    assert torch.equal(there_and_back(once), once)


def test_import_is_strict() -> None:
    model = build(config("Llama"))
    rules = require(model.cfg).rules(model.cfg)
    disk = dict(to_disk(rules, model.state_dict()))
    with pytest.raises(DataError, match=r"model\.norm\.weight: not on disk"):
        to_ours(rules, {k: v for k, v in disk.items() if k != "model.norm.weight"}, shapes(model))
    with pytest.raises(DataError, match="extra: not used by the table"):
        to_ours(rules, disk | {"extra": disk["model.norm.weight"]}, shapes(model))
    with pytest.raises(DataError, match=r"missing\.weight: not filled by the table"):
        to_ours(rules, disk, shapes(model) | {"missing.weight": (1,)})


def test_tied_copies_that_differ_are_refused() -> None:
    model = build(config("NemotronH tied"))
    rules = require(model.cfg).rules(model.cfg)
    disk = dict(to_disk(rules, model.state_dict()))
    with pytest.raises(DataError, match="the recipe ties them"):
        to_ours(rules, disk | {"lm_head.weight": disk["lm_head.weight"] + 1}, shapes(model))
