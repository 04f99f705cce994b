"""What a card says that its class gets wrong, it gets wrong: each sentence goes when transformers mends its cause."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lmtrain.hub.card import card
from lmtrain.hub.folder import write_folder
from lmtrain.hub.match import require
from lmtrain.hub.recurrent_gemma import embedding_scale
from lmtrain.model.context import LocalContext
from lmtrain.model.language_model import LanguageModel
from lmtrain.ops.documents import Documents
from tests.hub.models import MODELS, VOCAB, build, config, random_tokens, tokenizer

PROMPT, LENGTH = 7, 12
Run = Callable[[Any, Tensor], Tensor]


def chunks(model: Any, tokens: Tensor) -> Tensor:
    """Logits of the tokens behind the prompt, given to its cache at once."""
    first = model(tokens[:, :PROMPT], use_cache=True)
    cache = "cache_params" if hasattr(first, "cache_params") else "past_key_values"
    return model(tokens[:, PROMPT:], use_cache=True, **{cache: first[cache]}).logits


def two_rows(model: Any, tokens: Tensor) -> Tensor:
    """Logits of the last token, behind the cache of those before it, of two rows."""
    rows = tokens.repeat(2, 1)
    first = model(rows[:, :-1], use_cache=True)
    return model(rows[:, -1:], state=first.state, use_cache=True).logits[:1, -1:]


def padded(model: Any, tokens: Tensor) -> Tensor:
    """Logits of tokens on whose left stand three that the mask says are none."""
    wide = torch.cat([torch.full((1, 3), 5), tokens], dim=1)
    mask = (torch.arange(wide.shape[1]) >= 3).long()[None]
    return model(wide, attention_mask=mask, use_cache=False).logits[:, 3:]


WRONG: list[tuple[str, Run]] = [
    ("Mamba", chunks),
    ("FalconMamba", chunks),
    ("Rwkv", two_rows),
    ("Rwkv", padded),
    ("RecurrentGemma", padded),
    ("MiniMax", chunks),
]
RIGHT: list[tuple[str, Run]] = [
    ("Mamba2", chunks),
    ("NemotronH", chunks),
    ("Qwen3Next", chunks),
    ("KimiLinear", chunks),
    ("FalconH1", chunks),
    ("GraniteMoeHybrid", chunks),
    ("MiniMax tied", chunks),  # softmax attention stands first
    ("Mamba", padded),
    ("MiniMax", padded),
    ("Llama", padded),
]


@torch.no_grad()
def difference(folder: Path, name: str, run: Run) -> float:
    """Largest of the last logits of ``run``, over the standard deviation, from those of one pass; inf if it fails."""
    from transformers import AutoModelForCausalLM

    ours = build(config(name))
    write_folder(folder / "export", require(ours.cfg), ours, tokenizer(folder), 128, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder / "export").eval()
    tokens = random_tokens(1, LENGTH, seed=5)
    expected = model(tokens, use_cache=False).logits
    try:
        got = run(model, tokens)
    except RuntimeError:
        return float("inf")
    return float((got - expected[:, -got.shape[1] :]).abs().max() / expected.std())


@pytest.mark.parametrize(("name", "run"), WRONG)
def test_limits_are_real(tmp_path: Path, name: str, run: Run) -> None:
    assert difference(tmp_path, name, run) > 1e-3


@pytest.mark.parametrize(("name", "run"), RIGHT)
def test_others_have_no_such_limit(tmp_path: Path, name: str, run: Run) -> None:
    assert difference(tmp_path, name, run) < 1e-4


WITHOUT_ATTENTION = [name for name in MODELS if "without attention" in name]


@torch.no_grad()
@pytest.mark.parametrize("name", WITHOUT_ATTENTION)
def test_classes_whose_cache_needs_an_attention_layer(tmp_path: Path, name: str) -> None:
    """Why ``use_cache`` is false in their exports: a forward with the cache fails, one without is fine."""
    from transformers import AutoModelForCausalLM

    ours = build(config(name))
    write_folder(tmp_path / "export", require(ours.cfg), ours, tokenizer(tmp_path), 128, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    tokens = random_tokens(1, LENGTH, seed=5)
    assert model(tokens, use_cache=False).logits.isfinite().all()
    with pytest.raises(ValueError, match="get_seq_length"):
        model(tokens[:, LENGTH - 1 :], past_key_values=model(tokens[:, :-1], use_cache=True).get("past_key_values"))


@torch.no_grad()
def test_recurrent_gemma_rounds_the_scale_of_its_embedding(tmp_path: Path) -> None:
    """To bfloat16, where d_model is no square: ours has to be rounded too, or it computes another model."""
    from transformers import AutoModelForCausalLM

    d_model, tokens = 80, random_tokens(2, LENGTH, seed=5)
    ours = build(dataclasses.replace(config("RecurrentGemma", d_model), embedding_scale=embedding_scale(d_model)))
    write_folder(tmp_path / "export", require(ours.cfg), ours, tokenizer(tmp_path), 128, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()(tokens, use_cache=False).logits
    exact = LanguageModel(dataclasses.replace(ours.cfg, embedding_scale=d_model**0.5), VOCAB)
    exact.load_state_dict(ours.state_dict())
    ctx = LocalContext(Documents.from_ids(torch.zeros(2, LENGTH, dtype=torch.int32)))
    rounded, other = (float((model(tokens, ctx, {})[0] - theirs).abs().max() / theirs.std()) for model in (ours, exact))
    assert rounded < 1e-4 < other


@torch.no_grad()
def test_rwkv_saved_again_after_a_forward_is_the_same(tmp_path: Path) -> None:
    """By default its weights are divided in place from the seventh layer on, at the first forward in eval mode."""
    from transformers import AutoModelForCausalLM

    ours = build(dataclasses.replace(config("Rwkv"), pattern="8 * (time channel)"))
    write_folder(tmp_path / "export", require(ours.cfg), ours, tokenizer(tmp_path), 128, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(random_tokens(1, LENGTH, seed=5), use_cache=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_every_limit_is_shown_and_told() -> None:
    parity = dict.fromkeys(("max_logit_diff", "logit_std", "perturbed_max_logit_diff", "perturbed_logit_std"), 1.0)
    counts = dict.fromkeys(("num_params", "num_active_params", "step", "tokens", "seq_len", "vocab_size"), 1)
    facts = {"name": "x", "lmtrain": "0", "transformers": "5", "dtype": "float32", "sources": {}, **counts}
    facts |= {"tokenizer": {"vocab_size": 1, "eod": "x"}, "parity": {**parity, "cached_equals_uncached": True}}
    limited = {name for name, _ in WRONG}
    for name in MODELS:
        cls = require(config(name))
        assert (cls.name in limited) == bool(cls.limits) == ("- Limits of " in card(cls, config(name), facts))
        assert cls.limits in card(cls, config(name), facts)
