"""Transformers alone computes what lmtrain computes: logits, gradients, generation; and a wrong table is caught."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lmtrain.errors import DataError
from lmtrain.hub import verify
from lmtrain.hub.export import make_check, round_weights
from lmtrain.hub.folder import write_folder
from lmtrain.hub.llama import ATTENTION, Llama
from lmtrain.hub.match import CLASSES, require
from lmtrain.hub.table import HubClass, Rule, to_disk
from lmtrain.hub.verify import Check, Loaded, logits_of, probe_tokens, run_transformers
from lmtrain.model.config import ModelConfig
from lmtrain.model.context import LocalContext
from lmtrain.ops.documents import Documents
from tests.hub.models import MODELS, build, config, random_tokens, tokenizer

SCRIPT = Path(verify.__file__).with_name("verify_export.py")
BF16 = ("Llama", "NemotronH moe", "Qwen3Next", "MiniMax")


def written(folder: Path, name: str, cls: HubClass | None = None, dtype: torch.dtype = torch.float32) -> Check:
    """An export of the tiny model ``name``, ready to be verified."""
    model = build(config(name))
    cls = cls or require(model.cfg)
    round_weights(cls, model, dtype)
    shard_bytes = 100_000 if name == "NemotronH" else 10**9
    known = tokenizer(folder)
    place = folder / f"{name}-{cls.name}-{dtype!s}-{len(list(folder.iterdir()))}".replace(" ", "_")
    write_folder(place, cls, model, known, 128, dtype, shard_bytes)
    return make_check(place, cls, model, known, probe_tokens(model), ["def f(x):"], 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Mapping[str, Loaded]:
    """Every model, verified in one process without lmtrain."""
    checks = {name: written(folder, name) for name in MODELS}
    checks |= {f"{name} bf16": written(folder, name, dtype=torch.bfloat16) for name in BF16}
    return dict(zip(checks, run_transformers(list(checks.values()), folder), strict=True))


@pytest.mark.parametrize("name", [*MODELS, *(f"{name} bf16" for name in BF16)])
def test_logits_are_equal(loaded: Mapping[str, Loaded], name: str) -> None:
    one = loaded[name]
    print(f"{name}: largest difference {one.max_logit_diff:.1e}, standard deviation {one.logit_std:.3f}")
    assert one.max_logit_diff < 1e-4 * one.logit_std
    assert one.logit_std > 0.1
    assert one.compared > 0.5
    assert one.texts[0].startswith("def f(x):") and len(one.texts[0]) > len("def f(x):")


@pytest.mark.parametrize("name", MODELS)
def test_cached_generation_where_the_class_can(loaded: Mapping[str, Loaded], name: str) -> None:
    assert loaded[name].cached is (None if "without attention" in name else True)


def test_every_class_has_a_model() -> None:
    assert {name.split()[0] for name in MODELS} == {cls.name for cls in CLASSES}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_equal(loaded: Mapping[str, Loaded], folder: Path, name: str) -> None:
    """Of every parameter: theirs, by the names on disk, go back through our table as autograd leads them."""
    from transformers import AutoModelForCausalLM

    model = build(config(name)).requires_grad_(True)
    (place,) = [path for path in folder.glob(f"{name}-*float32-*".replace(" ", "_")) if path.is_dir()]
    theirs = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    tokens = random_tokens(2, 49, seed=3)
    ctx = LocalContext(Documents.from_ids(torch.zeros(2, 48, dtype=torch.int32)))
    ctx.loss_scale = 0.0  # no balancing losses, which transformers adds to a loss of its own
    for logits in (model(tokens[:, :-1], ctx, {})[0], theirs(tokens[:, :-1], use_cache=False).logits):
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    disk = dict(to_disk(require(model.cfg).rules(model.cfg), model.state_dict(keep_vars=True)))
    found = by_disk_name(theirs, disk)
    learned = [key for key, tensor in disk.items() if tensor.requires_grad]
    ours = dict(model.named_parameters())
    back = torch.autograd.grad([disk[key] for key in learned], list(ours.values()), [found[key] for key in learned])
    for (key, parameter), grad in zip(ours.items(), back, strict=True):
        assert parameter.grad is not None, key
        largest = float(parameter.grad.abs().max())
        assert largest > 0, key
        assert float((grad - parameter.grad).abs().max()) < 1e-4 * largest, key


def by_disk_name(theirs: Any, disk: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a model of transformers, each of which must have a name in ``disk``, as what it was loaded from."""
    from transformers.core_model_loading import revert_weight_conversion

    found = revert_weight_conversion(theirs, {key: one.grad for key, one in theirs.named_parameters()})
    # what it calls block_sparse_moe in layers without experts is called mlp on disk, and it reads either (KimiLinear)
    named = {key if key in disk else key.replace(".block_sparse_moe.", ".mlp."): grad for key, grad in found.items()}
    assert named.keys() <= disk.keys()
    return named


def renamed(names: Mapping[str, str]) -> list[Rule]:
    """Llama's attention table with other names on disk."""
    return [Rule(rule.ours, (names.get(rule.disk[0], rule.disk[0]),)) for rule in ATTENTION]


K, V, Q = (f"self_attn.{name}_proj.weight" for name in "kvq")


class Swapped(Llama):
    """Keys and values under each other's names: the same shapes, another model."""

    attention: ClassVar[list[Rule]] = renamed({K: V, V: K})


class Misnamed(Llama):
    """A name the class does not know: it loads, with a random tensor in its place."""

    attention: ClassVar[list[Rule]] = renamed({Q: "self_attn.query.weight"})


class Extra(Llama):
    """A key in config.json that the class does not have."""

    def config(self, cfg: ModelConfig, vocab_size: int, seq_len: int) -> dict[str, Any]:
        return super().config(cfg, vocab_size, seq_len) | {"hiden_size": 64, "rope_parameters": None, "rope_theta": 5e4}


def test_wrong_tables_and_configs_are_caught(folder: Path) -> None:
    checks = [written(folder, "Llama", cls()) for cls in (Swapped, Misnamed, Extra)]
    with pytest.raises(DataError, match="what transformers loads is not the model that was trained"):
        run_transformers(checks, folder)
    swapped, misnamed, extra = (check.problems for check in checks)
    assert len(swapped) == 1 and swapped[0].startswith("logits differ by ")
    assert "missing keys: model.layers.0.self_attn.q_proj.weight, model.layers.1.self_attn.q_proj.weight" in misnamed
    assert any(one.startswith("unexpected keys: model.layers.0.self_attn.query.weight") for one in misnamed)
    assert "config.json: keys the class does not have: hiden_size" in extra
    assert any(one.startswith("logits differ by ") for one in extra)  # another rotary base


def test_the_script_lets_nothing_of_lmtrain_in(tmp_path: Path) -> None:
    lines = (
        "import sys, runpy; m = runpy.run_path(sys.argv[1]); sys.meta_path.insert(0, m['Blocker']()); import lmtrain"
    )
    command = [sys.executable, "-P", "-c", lines, str(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr.strip().endswith("ModuleNotFoundError: lmtrain is blocked here")


def test_rows_are_compared_up_to_a_near_tie_of_the_router() -> None:
    model = build(config("NemotronH moe"))
    tokens = probe_tokens(model)
    _, comparable = logits_of(model, tokens)
    assert comparable.float().mean() > 0.5
    router = model.get_submodule("blocks.1.branch.router")
    router.weight.zero_()
    model.get_buffer("blocks.1.branch.router_bias").zero_()
    assert not logits_of(model, tokens)[1].any()  # all scores are tied
