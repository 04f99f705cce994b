"""Text to token ids and back. One wrapper over HF ``tokenizers`` and sentencepiece; it never adds a special token."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from lmtrain.errors import DataError

EOD = "<|endoftext|>"
EOD_NAMES = (EOD, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
"""Tried in this order where neither the caller nor tokenizer_config.json names the end-of-document token."""
PROBE = (
    "def f(x):\n\treturn x + 1  # caf\u00e9 \u00b5 \u4e2d\u6587 "
    "\U0001f469\u200d\U0001f680\r\n\x00 1234567 \u2581 e\u0301"
)
PIECE = 1 << 20
"""Characters encoded at once: some pattern engines backtrack badly on megabytes of one kind of character."""
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""Llama-3's split: digits by three, runs of blanks and of newlines kept together (good for code)."""


class Tokenizer(ABC):
    """``vocab_size``: largest id + 1. ``eod_id``: the token a store appends to a document, never made from text.

    ``fingerprint``: sha256 of what decides the ids (not of the file's bytes): model, normaliser, added tokens, eod and
    the ids of a probe; truncation and padding settings are left out, they change by use.
    """

    path: str
    eod: str
    eod_id: int
    vocab_size: int
    fingerprint: str

    @staticmethod
    def load(path: str | Path, eod: str | None = None) -> Tokenizer:
        """A tokenizer.json or sentencepiece .model. ``eod``: the text of its end-of-document token; by default
        ``eos_token`` of a tokenizer_config.json beside it, else the first of ``EOD_NAMES`` it knows.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "tokenizer.json" if (path / "tokenizer.json").exists() else path / "tokenizer.model"
        if not path.is_file():
            raise DataError(
                f"{path}: no such tokenizer; train one with the data: "
                "python launch/prepare.py out=data/x tokenizer=train:8192 sources.NAME.path=YOUR_TEXT"
            )
        kind = SentencePieceTokenizer if path.suffix == ".model" else HFTokenizer
        return kind(path, eod or _configured_eod(path))

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """int32 ids of each text; text that spells a special token stays text."""
        pieces = [text[at : at + PIECE] for text in texts for at in range(0, max(len(text), 1), PIECE)]
        encoded = iter(self._encode(pieces))
        out = []
        for text in texts:
            parts = [np.asarray(next(encoded), dtype=np.int32) for _ in range(0, max(len(text), 1), PIECE)]
            out.append(parts[0] if len(parts) == 1 else np.concatenate(parts))
        return out

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; special tokens appear as their text."""

    @abstractmethod
    def _encode(self, texts: list[str]) -> list[list[int]]: ...

    def _finish(self, path: Path, content: Any) -> None:
        """Set what every kind has; refuse a tokenizer that makes its eod from text."""
        self.path = str(path)
        if self.eod_id in self._encode([f"a{self.eod}b"])[0]:
            raise DataError(f"{path}: text that spells {self.eod!r} becomes the end-of-document id {self.eod_id}")
        parts = [content, self.eod_id, self._encode([PROBE])[0]]
        canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"))
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()

    def _find_eod(self, path: Path, eod: str | None, known: dict[str, int] | Any) -> None:
        names = [eod] if eod else list(EOD_NAMES)
        found = [name for name in names if name in known]
        if not found:
            raise DataError(f"{path}: no end-of-document token {' or '.join(names)}; name one of its tokens with eod=")
        self.eod = found[0]
        self.eod_id = known[found[0]]


class HFTokenizer(Tokenizer):
    """A tokenizer.json of Hugging Face ``tokenizers``."""

    def __init__(self, path: Path, eod: str | None) -> None:
        try:
            spec = json.loads(path.read_text(encoding="utf-8"))
            engine = tokenizers.Tokenizer.from_str(json.dumps(spec))
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None
        except Exception as error:  # the Rust side raises plain Exception
            raise DataError(f"{path}: not a tokenizer.json: {_first_line(error)}") from None
        self._find_eod(path, eod, engine.get_vocab(with_added_tokens=True))
        for token in spec.get("added_tokens", []):
            if token["content"] == self.eod:
                token["special"] = True  # only special tokens can be kept from being made of text
        self.engine = tokenizers.Tokenizer.from_str(json.dumps(spec))
        self.engine.no_truncation()
        self.engine.no_padding()
        self.engine.encode_special_tokens = True
        self.vocab_size = max(self.engine.get_vocab(with_added_tokens=True).values()) + 1
        content = json.loads(self.engine.to_str())
        self._finish(path, _without_defaults({k: v for k, v in content.items() if k not in ("truncation", "padding")}))

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.engine.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        return str(self.engine.decode([int(i) for i in ids], skip_special_tokens=False))


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece ``.model``. U+2581 in text decodes to a space: lossy by construction of that library."""

    def __init__(self, path: Path, eod: str | None) -> None:
        import sentencepiece

        try:
            self.engine = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except Exception as error:
            raise DataError(f"{path}: not a sentencepiece model: {_first_line(error)}") from None
        self.vocab_size = self.engine.get_piece_size()
        if eod is None and self.engine.eos_id() >= 0:
            eod = self.engine.id_to_piece(self.engine.eos_id())
        self._find_eod(path, eod, {self.engine.id_to_piece(i): i for i in range(self.vocab_size)})
        self._finish(path, hashlib.sha256(self.engine.serialized_model_proto()).hexdigest())

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [list(ids) for ids in self.engine.encode(texts, add_bos=False, add_eos=False)]

    def decode(self, ids: Iterable[int]) -> str:
        parts: list[str] = []
        run: list[int] = []
        for i in ids:  # control pieces decode to nothing; write eod as its text, as the other kind does
            if int(i) == self.eod_id:
                parts += [self.engine.decode(run), self.eod]
                run = []
            else:
                run.append(int(i))
        return "".join([*parts, self.engine.decode(run)])


def train_bpe(texts: Iterable[str], vocab_size: int, path: str | Path, eod: str = EOD) -> Tokenizer:
    """Train a byte-level BPE of ``vocab_size`` ids (at least 257: all bytes and eod) and write it to ``path``."""
    if vocab_size < 257:
        raise DataError(f"tokenizer=train:{vocab_size}: at least 257 ids are needed (256 bytes and {eod})")
    engine = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[eod],
        show_progress=False,
    )
    engine.train_from_iterator(texts, trainer)
    engine.save(str(path))
    return Tokenizer.load(path, eod)


def _configured_eod(path: Path) -> str | None:
    """``eos_token`` of the tokenizer_config.json beside ``path``, where Hugging Face keeps it."""
    config = path.parent / "tokenizer_config.json"
    if not config.is_file():
        return None
    try:
        eos = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{config}: not readable: {_first_line(error)}") from None
    return eos.get("content") if isinstance(eos, dict) else eos


def _without_defaults(value: Any) -> Any:
    """Without null and false entries: a later library that adds an option, switched off, keeps the fingerprint."""
    if isinstance(value, dict):
        return {k: _without_defaults(v) for k, v in value.items() if v is not None and v is not False}
    if isinstance(value, list):
        return [_without_defaults(v) for v in value]
    return value


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
