"""Tokenizers: text comes back, special tokens are never made of text, fingerprints say what matters and no more."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers

from lmtrain.data.ingest.tokenizer_training import train_bpe, train_sentencepiece
from lmtrain.data.tokenizer import EOD, PIECE, Tokenizer
from lmtrain.errors import DataError

ADVERSARIAL = [
    "",
    " ",
    "\r\n\ttabs\tand  two spaces  \n\n\n",
    "no\u00a0break, \u200bzero width, \u2581 lower block",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 e\u0301 \u0301 \u0627\u0644 \u4e2d\u6587",
    "nul \x00 and \x7f and \ufffd and \ufeff",
    f"a{EOD}b <s></s><unk>",
    "x" * 5000 + " " * 5000,
]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    return train_bpe(["def f(x):\n    return x + 1\n", "the quick brown fox " * 20], 320, path)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("spm")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps", "over the lazy dog"] * 20),
        model_prefix=str(folder / "m"), vocab_size=300, model_type="bpe", byte_fallback=True, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
        unk_id=0, bos_id=-1, eos_id=1, pad_id=-1,
    )  # fmt: skip
    return Tokenizer.load(folder / "m.model")


def test_text_comes_back(bpe: Tokenizer) -> None:
    for text, ids in zip(ADVERSARIAL, bpe.encode_batch(ADVERSARIAL), strict=True):
        assert ids.dtype == np.int32 and bpe.decode(ids) == text
        assert bpe.eod_id not in ids and (len(ids) == 0 or ids.max() < bpe.vocab_size)


def test_sentencepiece(pieces: Tokenizer) -> None:
    texts = [text for text in ADVERSARIAL if "\u2581" not in text and "\x00" not in text]
    for text, ids in zip(texts, pieces.encode_batch(texts), strict=True):
        assert pieces.decode(ids) == text and pieces.eod_id not in ids
    assert pieces.eod == "</s>" and pieces.eod_id == 1 and pieces.vocab_size == 300
    assert pieces.decode([*pieces.encode_batch(["fox"])[0], 1]) == "fox</s>"
    assert pieces.fingerprint == Tokenizer.load(pieces.path).fingerprint


def test_long_text_is_cut_into_pieces(bpe: Tokenizer) -> None:
    text = "fox " * (PIECE // 2)
    assert bpe.decode(bpe.encode_batch([text, "x"])[0]) == text


def test_special_tokens_stay_text_even_if_the_file_calls_them_ordinary(bpe: Tokenizer, tmp_path: Path) -> None:
    spec = json.loads(Path(bpe.path).read_text(encoding="utf-8"))
    spec["added_tokens"][0]["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    ids = Tokenizer.load(tmp_path / "tokenizer.json").encode_batch([f"a{EOD}b"])[0]
    assert bpe.eod_id not in ids


def test_post_processor_adds_nothing(bpe: Tokenizer, tmp_path: Path) -> None:
    engine = tokenizers.Tokenizer.from_file(bpe.path)
    engine.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{EOD} $A", special_tokens=[(EOD, bpe.eod_id)]
    )
    engine.save(str(tmp_path / "tokenizer.json"))
    ids = Tokenizer.load(tmp_path / "tokenizer.json").encode_batch(["fox"])[0]
    assert np.array_equal(ids, bpe.encode_batch(["fox"])[0])


def test_fingerprint_ignores_form_and_sees_content(bpe: Tokenizer, tmp_path: Path) -> None:
    engine = tokenizers.Tokenizer.from_file(bpe.path)
    engine.enable_truncation(5)
    engine.enable_padding()
    engine.save(str(tmp_path / "tokenizer.json"), pretty=False)
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == bpe.fingerprint and len(again.encode_batch(["a b c d e f g h"])[0]) > 5
    spec = json.loads(Path(bpe.path).read_text(encoding="utf-8"))
    spec["model"]["merges"].pop()
    (tmp_path / "other.json").write_text(json.dumps(spec), encoding="utf-8")
    assert Tokenizer.load(tmp_path / "other.json").fingerprint != bpe.fingerprint
    engine.add_special_tokens(["<end>"])
    engine.save(str(tmp_path / "two.json"))
    two = [Tokenizer.load(tmp_path / "two.json", eod).fingerprint for eod in (EOD, "<end>")]
    assert two[0] != two[1]


def test_tokenizer_config_names_the_end(bpe: Tokenizer, tmp_path: Path) -> None:
    engine = tokenizers.Tokenizer.from_file(bpe.path)
    engine.add_special_tokens(["<end>"])
    engine.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).eod == EOD
    for eos in ("<end>", {"content": "<end>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}), encoding="utf-8")
        assert Tokenizer.load(tmp_path).eod_id == bpe.vocab_size


def test_what_cannot_be_loaded_says_so_in_one_line(bpe: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{]", encoding="utf-8")
    (tmp_path / "empty.json").write_text("{}", encoding="utf-8")
    (tmp_path / "broken.model").write_bytes(b"nonsense")
    for path, eod, message in [
        (tmp_path / "none.json", None, r"none.json: no such tokenizer; train one .* launch/prepare.py"),
        (tmp_path / "broken.json", None, r"broken.json: not a tokenizer.json"),
        (tmp_path / "empty.json", None, r"empty.json: not a tokenizer.json"),
        (tmp_path / "broken.model", None, r"broken.model: not a sentencepiece model"),
        (Path(bpe.path), "<nope>", r"no end-of-document token <nope>; name one of its tokens with eod="),
    ]:
        with pytest.raises(DataError, match=message) as error:
            Tokenizer.load(path, eod)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="at least 257"):
        train_bpe(["x"], 100, tmp_path / "small.json")


def test_the_faster_engine_gives_the_same_ids(bpe: Tokenizer) -> None:
    pytest.importorskip("tiktoken")
    fast = Tokenizer.load(bpe.path)
    texts = [*ADVERSARIAL, "a\n" + " " * 30_000 + "b", "x" * 100 + "\u00a0" * 30_000, f"<|special|> {EOD} caf\u00e9"]
    assert fast.accelerate(texts) is None and fast.fingerprint == bpe.fingerprint
    for text, ids, own in zip(texts, bpe.encode_batch(texts), fast.encode_batch(texts), strict=True):
        assert own.dtype == np.int32 and np.array_equal(ids, own) and fast.decode(own) == text


def test_an_engine_that_differs_is_not_used(bpe: Tokenizer, tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    spec = json.loads(Path(bpe.path).read_text(encoding="utf-8"))
    vocab = {token: number for token, number in spec["model"]["vocab"].items() if len(token) == 1 or token == EOD}
    spec["model"] |= {"vocab": vocab | {"bc": 257, "ab": 258}, "merges": [["a", "b"], ["b", "c"]]}
    (tmp_path / "swapped.json").write_text(json.dumps(spec), encoding="utf-8")
    swapped = Tokenizer.load(tmp_path / "swapped.json")
    # merges say ab first, ids, which tiktoken takes for ranks, bc
    assert swapped.accelerate(["ab bc", "x abc"]) == "tiktoken gives other ids for 'x abc'"
    assert swapped.encode_batch(["abc"])[0].tolist() == [258, vocab["c"]]
    assert swapped.accelerate() is None and swapped.encode_batch(["abc"])[0].tolist() == [vocab["a"], 257]
    spec["normalizer"] = {"type": "NFC"}
    (tmp_path / "nfc.json").write_text(json.dumps(spec), encoding="utf-8")
    assert Tokenizer.load(tmp_path / "nfc.json").accelerate() == "it has a normalizer"


def test_without_tiktoken_the_reason_is_said(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert Tokenizer.load(bpe.path).accelerate() == "tiktoken is not installed"


def test_sentencepiece_is_trained_to_lose_nothing(tmp_path: Path) -> None:
    text = "def f(x):\n    return  x  # two  blanks\n" * 20 + "the quick brown fox jumps " * 20
    made = train_sentencepiece([text, "y" * 20_000], 330, tmp_path / "tokenizer.model", special=["<|fim_prefix|>"])
    texts = [text for text in ADVERSARIAL if "\u2581" not in text and "\x00" not in text] + ["\ufb01 \uff21"]
    for wanted, ids in zip(texts, made.encode_batch(texts), strict=True):
        assert made.decode(ids) == wanted and made.token_id("<|fim_prefix|>") not in ids
    assert made.vocab_size == 330 and made.eod == "</s>" and made.token_id("nothing") is None
    assert made.byte_tokens().sum() == 256
    again = train_sentencepiece([text, "y" * 20_000], 330, tmp_path / "again.model", special=["<|fim_prefix|>"])
    assert again.fingerprint == made.fingerprint
    with pytest.raises(DataError, match=r"tokenizer=train-sp:100000: sentencepiece cannot train it: .*too high"):
        train_sentencepiece([text], 100_000, tmp_path / "big.model")


def test_parts_of_characters_are_counted_as_byte_tokens(bpe: Tokenizer) -> None:
    parts = bpe.byte_tokens()
    (ids,) = bpe.encode_batch(["abc \u4e2d"])
    assert parts[ids].tolist() == [False] * (len(ids) - 3) + [True] * 3 and not parts[bpe.eod_id]
