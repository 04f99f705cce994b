"""The adapter says what lm-eval's own model class says of the same weights, and does not depend on batching."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import UsageError
from lmtrain.eval.adapter import LMTrainLM
from lmtrain.eval.mmlu import read_folder
from lmtrain.eval.run import QUESTIONS
from lmtrain.hub.folder import write_folder
from lmtrain.hub.llama import Llama
from lmtrain.model.context import LocalContext
from lmtrain.model.language_model import LanguageModel
from lmtrain.ops.documents import Documents
from tests.eval.conftest import HYBRID, LLAMA, Request, build

LENGTH = 48
WORDS = ("abc", "de fg", "Answer:", "x\n", "klm", "1 2", "none", "a, b", "é")


def pairs(count: int) -> list[Request]:
    """Contexts and continuations of all kinds: empty, ending in spaces, sharing a context, longer than LENGTH."""
    draw = random.Random(0)
    found = []
    for index in range(count):
        context = " ".join(draw.choices(WORDS, k=draw.randint(1, 9))) + draw.choice(["", "", " "])
        found += [Request(context, f" {letter}") for letter in "ABCD"] if index % 3 == 0 else []
        found.append(Request(draw.choice([context, context, ""]), " " + " ".join(draw.choices(WORDS, k=3))))
    return [*found, Request("abc de " * 40, " fg"), Request("Answer:", " A"), Request("Answer:", " A b c")]


@pytest.fixture(scope="module")
def llama(tokenizer: Tokenizer) -> LanguageModel:
    return build(LLAMA, tokenizer.vocab_size)


@pytest.fixture(scope="module")
def hybrid(tokenizer: Tokenizer) -> LanguageModel:
    return build(HYBRID, tokenizer.vocab_size)


@pytest.fixture(scope="module")
def hf(llama: LanguageModel, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp("hf") / "llama"
    write_folder(folder, Llama(), llama, tokenizer, LENGTH, torch.float32)
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4, max_length=LENGTH)


def adapter(model: LanguageModel, tokenizer: Tokenizer, batch_size: int = 8, max_length: int = LENGTH) -> LMTrainLM:
    return LMTrainLM(model=model, tokenizer=tokenizer, max_length=max_length, batch_size=batch_size)


def test_loglikelihoods_are_those_of_hf(llama: LanguageModel, tokenizer: Tokenizer, hf: Any) -> None:
    ours = adapter(llama, tokenizer)
    requests = pairs(40)
    mine, theirs = ours.loglikelihood(requests), hf.loglikelihood(requests)
    for request, (a, greedy_a), (b, greedy_b) in zip(requests, mine, theirs, strict=True):
        assert a == pytest.approx(b, abs=1e-4) and greedy_a == greedy_b, request.args
    values = torch.tensor([score for score, _ in mine])
    assert values.std() > 5 and ours.truncated == 1


def test_rolling_and_generation_are_those_of_hf(llama: LanguageModel, tokenizer: Tokenizer, hf: Any) -> None:
    texts = [Request("abc de fg " * n + "klm") for n in (0, 1, 7, 30)]
    ours = adapter(llama, tokenizer)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(hf.loglikelihood_rolling(texts), abs=1e-3)
    asked = [Request(" ".join(WORDS[:n]), {"until": ["b"], "max_gen_toks": 16}) for n in range(1, 7)]
    assert ours.generate_until(asked) == hf.generate_until(asked)


@pytest.mark.parametrize("kind", ["llama", "hybrid"])
def test_a_score_does_not_depend_on_the_batch(kind: str, tokenizer: Tokenizer, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(kind)
    requests = pairs(20)
    alone, together = (adapter(model, tokenizer, size).loglikelihood(requests) for size in (1, 8))
    assert [score for score, _ in alone] == pytest.approx([score for score, _ in together], abs=1e-4)
    assert [greedy for _, greedy in alone] == [greedy for _, greedy in together]
    asked = [Request(" ".join(WORDS[:n]), {"until": [], "max_gen_toks": 12}) for n in range(1, 9)]
    assert adapter(model, tokenizer, 1).generate_until(asked) == adapter(model, tokenizer, 8).generate_until(asked)


def test_options_of_one_token_share_a_row(
    hybrid: LanguageModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    original = LMTrainLM._logits
    monkeypatch.setattr(LMTrainLM, "_logits", lambda self, batch: rows.append(len(batch)) or original(self, batch))
    lm = adapter(hybrid, tokenizer)
    one = next(token for token in "ABCDabcd" if len(tokenizer.encode_batch([token])[0]) == 1)
    questions = [((f"q{n}", one), [1, 2, 3 + n], [token]) for n in range(10) for token in (5, 6, 7, 8)]
    lm._loglikelihood_tokens(questions)
    assert sum(rows) == 10


def test_generation_stops_and_equals_greedy_without_state(hybrid: LanguageModel, tokenizer: Tokenizer) -> None:
    lm = adapter(hybrid, tokenizer)
    prompts = ["abc", "de fg klm none", "x\n1 2 a, b"]
    made = lm.generate_until([Request(prompt, {"max_gen_toks": 20}) for prompt in prompts])
    for prompt, text in zip(prompts, made, strict=True):
        assert text == tokenizer.decode(greedy(hybrid, tokenizer, prompt, 20))
        stop = text[len(text) // 2 : len(text) // 2 + 2]
        (cut,) = lm.generate_until([Request(prompt, {"until": [stop, "never seen"], "max_gen_toks": 20})])
        assert cut == text[: text.index(stop)]


def greedy(model: LanguageModel, tokenizer: Tokenizer, prompt: str, count: int) -> list[int]:
    """Everything read anew for each token."""
    ids = tokenizer.encode_batch([prompt])[0].tolist()
    made: list[int] = []
    while len(made) < count:
        whole = torch.tensor([ids + made])
        logits, _ = model(whole, LocalContext(Documents.from_ids(torch.zeros_like(whole))), {})
        token = int(logits[0, -1].argmax())
        if token == tokenizer.eod_id:
            break
        made.append(token)
    return made


def test_the_end_of_the_document_ends_a_text(tokenizer: Tokenizer) -> None:
    model = build(LLAMA, tokenizer.vocab_size)
    assert model.head is not None
    model.head.weight.zero_()  # all logits equal: the first id wins, which is the end of the document
    assert tokenizer.eod_id == 0
    assert adapter(model, tokenizer).generate_until([Request("abc", {"max_gen_toks": 5})]) == [""]


def test_refusals(llama: LanguageModel, tokenizer: Tokenizer) -> None:
    lm = adapter(llama, tokenizer, max_length=4)
    with pytest.raises(UsageError, match="decodes greedily"):
        lm.generate_until([Request("a", {"do_sample": True, "temperature": 1.0})])
    with pytest.raises(UsageError, match="max_length="):
        lm.loglikelihood([Request("a", " bcdefghijklmnop")])
    with pytest.raises(UsageError, match="give checkpoint="):
        LMTrainLM()


def test_a_context_is_a_prefix_of_what_follows_it(tokenizer: Tokenizer) -> None:
    """Or the continuation's tokens would be cut out of the whole at the wrong place, without a word."""
    questions = [
        q for rows in (read_folder(Path(QUESTIONS), s) for s in ("dev", "test")) for r in rows.values() for q in r
    ]
    prompts = [(f"Question: {q.question}\nAnswer:", f" {choice}") for q in questions for choice in q.choices]
    assert len(prompts) >= 200
    for context, continuation in prompts:
        before, whole = tokenizer.encode_batch([context, context + continuation])
        assert whole[: len(before)].tolist() == before.tolist(), (context, continuation)


def test_lm_eval_knows_it_by_name(run_dir: Path) -> None:
    from lm_eval.api.registry import get_model

    lm = get_model("lmtrain").create_from_arg_string(f"checkpoint={run_dir}", {"batch_size": "auto", "device": None})
    assert isinstance(lm, LMTrainLM) and lm.max_length == 64 and lm.batch_size == 8
