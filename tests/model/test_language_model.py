"""The model as a whole: what it checks when built, its state dict, recompute, tied embeddings."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch

from lmtrain.model.context import LocalContext
from lmtrain.model.decode import decode, prefill, sample
from lmtrain.model.ffn.mlp import MLP
from lmtrain.model.language_model import LanguageModel
from tests.model.row_checks import VARIANTS, build, distinct_tokens, documents

VOCAB = 128


@pytest.mark.parametrize("wrong", ["omitted", "invented"])
def test_param_info_must_name_exactly_the_parameters(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    cfg, true = build("mlp_swiglu", VOCAB).cfg, MLP.param_info

    def answer(branch: MLP) -> dict[str, object]:
        info = dict(true(branch))
        if wrong == "omitted":
            del info["down.weight"]
        else:
            info["down.bias"] = info["down.weight"]
        return info

    monkeypatch.setattr(MLP, "param_info", answer)
    name = {"omitted": "down.weight", "invented": "down.bias"}[wrong]
    with pytest.raises(ValueError) as caught:
        LanguageModel(cfg, VOCAB)
    named = ", ".join(f"blocks.{index}.branch.{name}" for index in range(2))
    assert str(caught.value) == f"param_info does not name exactly the parameters: {named}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict_round_trip(variant: str) -> None:
    model, docs = build(variant, VOCAB), documents()
    expected, _ = model(distinct_tokens(docs), LocalContext(docs), {})
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    other = LanguageModel(model.cfg, VOCAB).double()
    other.initialise(seed=7)
    other.load_state_dict(torch.load(saved, weights_only=True), strict=True)
    found, _ = other(distinct_tokens(docs), LocalContext(docs), {})
    assert torch.equal(found, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_recompute_changes_no_bit(variant: str) -> None:
    docs, grads = documents(), []
    for recompute in (False, True):
        model = build(variant, VOCAB)
        for block in model.stack:
            block.recompute = recompute
        logits, _ = model(distinct_tokens(docs), LocalContext(docs), {})
        logits.square().sum().backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in grads[0].items():
        assert grad is not None and torch.equal(grad, grads[1][name]), name


def test_tied_embeddings_are_one_parameter() -> None:
    tied = LanguageModel(replace(build("mlp_gelu", VOCAB).cfg, tie_embeddings=True), VOCAB)
    tied.initialise(0)
    assert "head.weight" not in dict(tied.named_parameters())
    docs = documents()
    logits, _ = tied(distinct_tokens(docs), LocalContext(docs), {})
    assert logits.shape == (*docs.shape, VOCAB)


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_from_the_initial_state(variant: str) -> None:
    """What ``init_state`` gives is what stands left of a first token: nothing."""
    model, prompt = build(variant, VOCAB), [3, 1, 4]
    with torch.no_grad():
        logits, state = decode(model, torch.tensor([prompt]), model.init_state(1, "cpu"))
        fresh = documents([()], [0])
        ids = replace(fresh, ids=fresh.ids[:, : len(prompt)])
        expected, _ = model(torch.tensor([prompt]), LocalContext(ids), {})
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    assert state["length"].tolist() == [len(prompt)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", [1, 2])
def test_a_row_that_starts_anew_forgets_its_state(variant: str, length: int) -> None:
    """Decoding with ``length`` 0 in one row: what its state held is not seen, whatever the other row carries."""
    model = build(variant, VOCAB)
    row = torch.tensor([[3, 1, 4, 1, 5]]).repeat(2, 1)
    with torch.no_grad():
        _, state = prefill(model, row, torch.tensor([5, 5]))
        state["length"][0] = 0
        found, after = decode(model, row[:, :length], state)
        expected, _ = decode(model, row[:1, :length], model.init_state(1, "cpu"))
    torch.testing.assert_close(found[:1], expected, rtol=1e-12, atol=1e-12)
    assert after["length"].tolist() == [length, 5 + length]


def test_sampling_repeats_itself_and_follows_the_most_likely() -> None:
    model = build("hybrid", VOCAB)

    def take(count: int, temperature: float, seed: int) -> list[int]:
        def step(tokens: torch.Tensor, state: dict) -> tuple[torch.Tensor, dict]:  # type: ignore[type-arg]
            with torch.no_grad():
                return decode(model, tokens, state)

        drawn = sample(step, model.init_state(1, "cpu"), [3, 1, 4], temperature=temperature, seed=seed)
        return [token for token, _ in zip(drawn, range(count), strict=False)]

    assert take(6, 1.0, 0) == take(6, 1.0, 0) != take(6, 1.0, 1)
    greedy = take(4, 0.0, 0)
    docs = documents([()], [0])
    row = torch.tensor([[3, 1, 4, *greedy]])
    logits, _ = model(row, LocalContext(replace(docs, ids=docs.ids[:, : row.shape[1]])), {})
    assert logits[0, 2:-1].argmax(-1).tolist() == greedy
