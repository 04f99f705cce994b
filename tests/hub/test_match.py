"""A class is chosen only when it can say every setting; near misses are refused with the reason."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from lmtrain.errors import UsageError
from lmtrain.hub.match import CLASSES, match, require
from lmtrain.hub.table import KNOWN, HubClass
from lmtrain.model.block import Multipliers
from lmtrain.model.branch import BRANCHES as KINDS
from lmtrain.model.config import ModelConfig
from tests.hub.models import BRANCHES, MODELS, VOCAB, config

NEAR_MISSES: list[tuple[str, str, dict[str, Any], dict[str, dict[str, Any]], str, str]] = [
    ("RoPE", "ssm relu2 nope", {}, {"nope": {"rope": True}}, "NemotronH", "attention.rope is true"),
    ("no RoPE", "attn mlp", {}, {"attn": {"rope": False, "head_dim": 12}}, "Llama", "attention.rope is false"),
    ("window", "ssm relu2 nope", {}, {"nope": {"window": 16}}, "NemotronH", "attention.window is 16"),
    ("SwiGLU", "ssm mlp nope", {}, {}, "NemotronH", "mlp.activation is swiglu, it has relu2"),
    ("GELU", "attn mlp", {}, {"mlp": {"activation": "gelu"}}, "Llama", "mlp.activation is gelu, it has swiglu"),
    ("softmax", "nope moe", {}, {"moe": {"router": "softmax"}}, "NemotronH", "moe.router is softmax, it has sigmoid"),
    ("gated", "nope moe", {}, {"moe": {"activation": "swiglu"}}, "NemotronH", "moe.activation is swiglu, it has relu2"),
    (
        "two eps",
        "2 * ssm",
        {},
        {"ssm": {"norm_eps": 1e-6}},
        "Mamba2",
        "mamba2.norm_eps is 1e-06 and model.norm_eps 1e-05",
    ),
    ("qk eps", "normed mlp", {}, {}, "Qwen3", "model.norm_eps is 1e-05, its query and key norms share 1e-06"),
    ("qk partly", "normed mlp attn mlp", {"norm_eps": 1e-6}, {}, "Qwen3", "attention.qk_norm is false"),
    (
        "two windows",
        "normed mlp normed_local mlp",
        {"norm_eps": 1e-6},
        {"normed": {"window": 8}},
        "Qwen3",
        "windows of 8, 20",
    ),
    ("mixed window", "attn mlp local mlp", {}, {}, "Mistral", "attention.window differs between layers (None, 20)"),
    ("no ffn", "2 * attn", {}, {}, "Llama", "the order is not (attention mlp) repeated"),
    ("two mlps", "attn mlp mlp attn", {}, {}, "Llama", "the order is not (attention mlp) repeated"),
    ("hybrid", "local mlp ssm mlp", {}, {}, "Mistral", "no mamba2"),
    (
        "widths",
        "ssm relu2 wide",
        {},
        {"wide": {"kind": "mlp", "d_ff": 96}},
        "NemotronH",
        "mlp.d_ff differs between layers",
    ),
    *(
        (what, pattern, {"norm_eps": 1e-6}, changes, "Qwen3Next", reason)
        for what, pattern, changes, reason in [
            ("two eps", "delta mlp", {"delta": {"norm_eps": 1e-5}}, "gated_deltanet.norm_eps is 1e-05 and"),
            ("no gate", "delta mlp gated mlp", {"gated": {"output_gate": False}}, "attention.output_gate is false"),
            ("negative", "delta mlp", {"delta": {"negative_eigenvalues": True}}, "gated_deltanet.negative_eigenvalues"),
            ("open shared", "delta gated_moe", {"gated_moe": {"shared_gate": False}}, "moe.shared_gate is false"),
            ("biased", "delta gated_moe", {"gated_moe": {"balance": "bias"}}, "moe.balance is bias, its router"),
            ("reversed", "mlp delta", {}, "the order is not (gated_deltanet or attention) then (mlp or moe)"),
        ]
    ),
    ("dense last", "latent grouped latent mlp", {}, {}, "DeepseekV3", "mlp stands after moe"),
    ("NoPE", "latent mlp nope_latent mlp", {}, {}, "DeepseekV3", "mla.rope is false, it has true"),
    ("shared", "latent grouped", {}, {"grouped": {"d_shared": 20}}, "DeepseekV3", "are 40 wide together"),
    ("two shared", "latent grouped latent sigmoid_moe", {}, {}, "DeepseekV3", "moe.num_shared differs between layers"),
    ("groups of one", "latent grouped", {}, {"grouped": {"num_groups": 8, "top_groups": 4}}, "DeepseekV3", "needs two"),
    ("turning", "kda mlp latent mlp", {}, {}, "KimiLinear", "mla.rope is true, it has false"),
    ("no sinks", "sinks oss_moe", {}, {"sinks": {"sinks": False}}, "GptOss", "attention.sinks is false"),
    ("windows", "sinks oss_moe sinks_local oss_moe", {}, {"sinks": {"window": 9}}, "GptOss", "windows of 9, 20"),
    ("wide heads", "ssm + nope mlp", {}, {"nope": {"rope": True}}, "FalconH1", "attention.head_dim is 24, it has"),
    ("skip", "ssm + attn mlp", {"multipliers": {"mlp": Multipliers(skip=0.5)}}, {}, "FalconH1", "mlp.skip is 0.5"),
    ("partly moe", "ssm mlp even_nope shared_moe", {}, {}, "GraniteMoeHybrid", "both mlp and moe"),
    ("normed partly", "mamba normed_mamba", {}, {}, "FalconMamba", "mamba.selection_norm differs between layers"),
    (
        "two factors",
        "lightning soft other soft",
        {"norm_place": "through", "multipliers": {"lightning": Multipliers(skip=0.5)}},
        {"other": {}},
        "MiniMax",
        "multipliers differ between branches of kind linear_attention, it has one pair",
    ),
    ("one factor", "ssm mlp", {"multipliers": {"ssm": Multipliers(output=0.5)}}, {}, "GraniteMoeHybrid", "differ"),
]


def _config(pattern: str, model: dict[str, Any], changes: dict[str, dict[str, Any]]) -> ModelConfig:
    branches = BRANCHES | {"wide": BRANCHES["relu2"], "other": BRANCHES["lightning"]}
    used = {name: branches[name] for name in pattern.replace("*", " ").split() if name in branches}
    used |= {name: dataclasses.replace(branches[name], **change) for name, change in changes.items()}
    return ModelConfig(d_model=64, branches=used, pattern=pattern, vocab_size=VOCAB, **model)


@pytest.mark.parametrize("name", MODELS)
def test_expressible_models_find_their_class(name: str) -> None:
    assert require(config(name)).name == name.split()[0]


def test_no_window_and_uneven_heads_go_to_mistral() -> None:
    cfg = _config("attn mlp", {}, {"attn": {"num_heads": 6, "num_kv_heads": 3}})
    assert require(cfg).name == "Mistral"


@pytest.mark.parametrize(
    ("name", "branch"),
    [("Mamba", "mamba"), ("Mamba2", "ssm"), ("NemotronH", "ssm"), ("FalconH1", "ssm"), ("GraniteMoeHybrid", "ssm")],
)
def test_initial_values_do_not_matter_to_a_class(name: str, branch: str) -> None:
    cfg = config(name)
    started = dataclasses.replace(cfg.branches[branch], mimetic_length=32)
    assert require(dataclasses.replace(cfg, branches=cfg.branches | {branch: started})).name == name


def test_dense_nope_stack_goes_to_nemotron() -> None:
    assert require(_config("nope relu2 nope relu2", {}, {})).name == "NemotronH"


@pytest.mark.parametrize(
    ("what", "pattern", "model", "changes", "cls", "reason"), NEAR_MISSES, ids=lambda v: str(v)[:12]
)
def test_near_misses_are_refused(
    what: str, pattern: str, model: dict[str, Any], changes: dict[str, dict[str, Any]], cls: str, reason: str
) -> None:
    reasons = match(_config(pattern, model, changes))
    assert not isinstance(reasons, HubClass)
    assert any(reason in one for one in reasons[cls]), reasons
    assert all(reasons.values())


def test_the_refusal_tells_every_class_nearest_first() -> None:
    with pytest.raises(UsageError) as raised:
        require(_config("ssm relu2 nope", {}, {"nope": {"rope": True}}))
    told = str(raised.value)
    assert told.startswith("no transformers class computes exactly this model. NemotronH: attention.rope is true; ")
    assert all(f"{name}: " in told for name in ("Llama", "Mistral", "Qwen3", "Mamba2")), told


def test_what_the_tables_know_exists() -> None:
    for known in (KNOWN, *(cls.knows for cls in CLASSES)):
        for kind, words in known.items():
            settings = ModelConfig if kind == "model" else KINDS[kind].Config
            assert set(words.split()) <= {field.name for field in dataclasses.fields(settings)}, kind


def test_branches_side_by_side_refuse_every_class() -> None:
    reasons = match(_config("attn + mlp", {}, {}))
    assert isinstance(reasons, dict)
    others = {each.name for each in CLASSES if not each.side_by_side}
    assert all("attn + mlp stand side by side" in reasons[name] for name in others)


def test_a_setting_no_table_knows_refuses_every_class() -> None:
    cfg = _config("attn mlp", {}, {})
    assert isinstance(match(cfg), HubClass)
    capped = dataclasses.replace(BRANCHES["attn"], softcap=30.0)
    reasons = match(dataclasses.replace(cfg, branches=cfg.branches | {"attn": capped}))
    assert isinstance(reasons, dict)
    assert all("attention.softcap is 30.0, which its table does not know" in why for why in reasons.values())
