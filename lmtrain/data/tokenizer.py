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

from lmtrain.data.tiktoken_engine import NotSupported, TiktokenEngine, byte_of_character
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

    def accelerate(self, sample: Sequence[str] | None = None) -> str | None:
        """Encode with a faster engine from now on. sample: texts on which its ids are first shown to be the same.

        Returns why not, as a clause; None: it is on.
        """
        return "there is no faster engine for its kind"

    @abstractmethod
    def token_id(self, token: str) -> int | None:
        """The id of a token by its text; None if there is no such token."""

    @abstractmethod
    def byte_tokens(self) -> NDArray[np.bool_]:
        """bool ``[vocab_size]``: the tokens that stand for a part of a character: what a tokenizer falls back to."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; special tokens appear as their text."""

    @abstractmethod
    def _encode(self, texts: list[str]) -> Sequence[Sequence[int] | NDArray[np.integer]]: ...

    def _finish(self, path: Path, content: Any) -> None:
        """Set what every kind has; refuse a tokenizer that makes its eod from text."""
        self.path = str(path)
        if self.eod_id in self._encode([f"a{self.eod}b"])[0]:
            raise DataError(f"{path}: text that spells {self.eod!r} becomes the end-of-document id {self.eod_id}")
        parts = [content, self.eod_id, list(self._encode([PROBE])[0])]
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
            if token["content"] == self.eod and not token["special"]:
                token["special"] = True  # only special tokens can be kept from being made of text
                engine = tokenizers.Tokenizer.from_str(json.dumps(spec))
        self._spec = spec
        self._fast: TiktokenEngine | None = None
        self.engine = engine
        self.engine.no_truncation()
        self.engine.no_padding()
        self.engine.encode_special_tokens = True
        self.vocab_size = max(self.engine.get_vocab(with_added_tokens=True).values()) + 1
        content = json.loads(self.engine.to_str())
        self._finish(path, _without_defaults({k: v for k, v in content.items() if k not in ("truncation", "padding")}))

    def accelerate(self, sample: Sequence[str] | None = None) -> str | None:
        try:
            fast = TiktokenEngine(self._spec)
        except NotSupported as reason:
            return str(reason)
        for text, ids in zip(sample or [], self._encode(list(sample or [])), strict=True):
            other = fast.encode(text)
            if other is not None and not np.array_equal(other, ids):
                return f"tiktoken gives other ids for {text[:60]!r}"
        self._fast = fast
        return None

    def _encode(self, texts: list[str]) -> Sequence[Sequence[int] | NDArray[np.integer]]:
        if self._fast is None:
            return [encoding.ids for encoding in self.engine.encode_batch_fast(texts, add_special_tokens=False)]
        return [
            self.engine.encode(text, add_special_tokens=False).ids if ids is None else ids
            for text, ids in zip(texts, map(self._fast.encode, texts), strict=True)
        ]

    def token_id(self, token: str) -> int | None:
        return self.engine.token_to_id(token)

    def byte_tokens(self) -> NDArray[np.bool_]:
        found = np.zeros(self.vocab_size, dtype=np.bool_)
        special = {token["content"] for token in self._spec.get("added_tokens", [])}
        known = byte_of_character()
        bytelevel = '"ByteLevel"' in json.dumps(self._spec.get("pre_tokenizer"))
        for token, number in self.engine.get_vocab(with_added_tokens=False).items():
            if token in special:
                continue
            if bytelevel:
                found[number] = not _whole_characters(bytes(known.get(character, 0) for character in token))
            else:
                found[number] = len(token) == 6 and token.startswith("<0x")
        return found

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

    def token_id(self, token: str) -> int | None:
        number = self.engine.piece_to_id(token)
        return number if self.engine.id_to_piece(number) == token else None

    def byte_tokens(self) -> NDArray[np.bool_]:
        return np.array([self.engine.is_byte(i) for i in range(self.vocab_size)])

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


def _whole_characters(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _without_defaults(value: Any) -> Any:
    """Without null and false entries: a later library that adds an option, switched off, keeps the fingerprint."""
    if isinstance(value, dict):
        return {k: _without_defaults(v) for k, v in value.items() if v is not None and v is not False}
    if isinstance(value, list):
        return [_without_defaults(v) for v in value]
    return value


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
