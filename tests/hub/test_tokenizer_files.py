"""AutoTokenizer of an export makes the ids of training."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import processors

from lmtrain.data.tokenizer import HFTokenizer, Tokenizer
from lmtrain.errors import UsageError
from lmtrain.hub.tokenizer_files import tokenizer_files
from tests.hub.models import tokenizer

AWKWARD = [
    "",
    " ",
    "  two  spaces ",
    "\n\n\tindented\r\n",
    " don't won't 12345 3.14",
    "caf\u00e9 cafe\u0301 \ufb01ne",
    "\u4e2d\u6587\u5b57\u7b26 \ud55c\uad6d\uc5b4",
    "\U0001f469\u200d\U0001f680\U0001f3fd",
    "\u2581\u2581 \x00 \x7f",
    "def f(x):\n    return x\n",
    "a" * 300,
    "<s> </s> [PAD] <|im_start|>",
]


def exported(known: Tokenizer, folder: Path, model_type: str) -> object:
    from transformers import AutoTokenizer

    folder.mkdir()
    for name, text in tokenizer_files(known, 128).items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mamba2", "nemotron_h"])
def test_ids_and_text_are_equal(tmp_path: Path, model_type: str) -> None:
    known = tokenizer(tmp_path)
    theirs = exported(known, tmp_path / "export", model_type)
    for text, ids in zip(AWKWARD, known.encode_batch(AWKWARD), strict=True):
        assert theirs(text).input_ids == ids.tolist(), text  # type: ignore[operator]
        assert theirs.decode(ids) == known.decode(ids) == text  # type: ignore[attr-defined]


def test_special_tokens(tmp_path: Path) -> None:
    known = tokenizer(tmp_path)
    theirs = exported(known, tmp_path / "export", "llama")
    assert theirs.eos_token_id == theirs.pad_token_id == known.eod_id  # type: ignore[attr-defined]
    assert theirs.bos_token_id is None  # type: ignore[attr-defined]
    assert len(theirs) == known.vocab_size  # type: ignore[arg-type]
    assert theirs(f"a{known.eod}").input_ids[-1] == known.eod_id  # type: ignore[operator]
    assert theirs.model_max_length == 128  # type: ignore[attr-defined]


def test_tokens_that_a_post_processor_would_add_are_left_out(tmp_path: Path) -> None:
    known = tokenizer(tmp_path)
    assert isinstance(known, HFTokenizer)
    template = processors.TemplateProcessing(
        single=f"{known.eod} $A", pair=f"{known.eod} $A $B", special_tokens=[(known.eod, known.eod_id)]
    )
    known.engine.post_processor = template
    known.engine.save(str(tmp_path / "tokenizer.json"))
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    theirs = exported(again, tmp_path / "export", "llama")
    assert theirs("def f").input_ids == again.encode_batch(["def f"])[0].tolist()  # type: ignore[operator]


def test_sentencepiece_is_refused(tmp_path: Path) -> None:
    lines = [f"some words and more of them {number}" for number in range(200)]
    with open(tmp_path / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=file, vocab_size=60, hard_vocab_limit=False, minloglevel=2
        )
    assert isinstance(file, io.BufferedWriter)
    with pytest.raises(UsageError, match=r"tokenizer\.model: a sentencepiece model cannot be exported"):
        tokenizer_files(Tokenizer.load(tmp_path / "tokenizer.model"), 128)
