"""New tokenizers from text: a byte-level BPE as Hugging Face ``tokenizers`` trains it, or sentencepiece's."""

from __future__ import annotations

import io
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from lmtrain.data.ingest.shards import made_durably
from lmtrain.data.tokenizer import EOD, Tokenizer
from lmtrain.errors import DataError, UsageError

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""Llama-3's split: digits by three, runs of blanks and of newlines kept together (good for code)."""
LINE_BYTES = 4192
"""sentencepiece passes over a longer line without a word: it is cut."""

log = logging.getLogger(__name__)


class Trainer(NamedTuple):
    """suffix: of the tokenizer's file; eod: the end-of-document token where none is named."""

    train: Callable[[Iterator[str], int, Path, str, Sequence[str]], Tokenizer]
    suffix: str
    eod: str


def to_train(name: str) -> tuple[Trainer, int] | None:
    """What ``tokenizer=KIND:N`` asks for; None: ``name`` is the path of a tokenizer. UsageError if N is no number."""
    kind, colon, size = name.partition(":")
    if not colon or kind not in TRAINERS:
        return None
    if not size.isdecimal():
        raise UsageError(f"tokenizer: expected {kind}:N with a number of ids, got {name}")
    return TRAINERS[kind], int(size)


def make_tokenizer(name: str, eod: str | None, special: Sequence[str], texts: Iterator[str], folder: Path) -> Tokenizer:
    """Train or copy the tokenizer that ``name`` says, in ``folder`` with its tokenizer_config.json; one that is there
    stays. special: tokens beside eod that a new one gets.
    """
    config = folder / "tokenizer_config.json"
    if config.exists():  # written last
        return Tokenizer.load(folder)
    wanted = to_train(name)
    if wanted is not None:
        trainer, size = wanted
        log.info("training a tokenizer of %d ids", size)
        made = trainer.train(texts, size, folder / f"tokenizer{trainer.suffix}", eod or trainer.eod, special)
        if made.vocab_size < size:
            log.warning("tokenizer=%s: the text only yields %d ids", name, made.vocab_size)
    else:
        made = Tokenizer.load(name, eod)
        shutil.copyfile(made.path, folder / f"tokenizer{'.model' if made.path.endswith('.model') else '.json'}")
    # Where Hugging Face keeps it: a later load finds the same token without being told.
    with made_durably(config) as file:
        file.write((json.dumps({"eos_token": made.eod}) + "\n").encode())
    return made


def train_bpe(
    texts: Iterable[str], vocab_size: int, path: str | Path, eod: str = EOD, special: Sequence[str] = ()
) -> Tokenizer:
    """Train a byte-level BPE of ``vocab_size`` ids (at least 257: all bytes and eod) and write it to ``path``.

    special: tokens beside eod that text never becomes.
    """
    if vocab_size < 257 + len(special):
        wanted = ", ".join([eod, *special])
        raise DataError(
            f"tokenizer=train:{vocab_size}: at least {257 + len(special)} ids are needed (256 bytes and {wanted})"
        )
    engine = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[eod, *special],
        show_progress=False,
    )
    engine.train_from_iterator(texts, trainer)
    with made_durably(Path(path)) as file:  # the engine's own save would say neither which file nor why
        file.write(engine.to_str(pretty=True).encode())
    return Tokenizer.load(path, eod)


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, path: str | Path, eod: str = "</s>", special: Sequence[str] = ()
) -> Tokenizer:
    """Train a sentencepiece BPE with byte fallback and write it to ``path``; text is not normalised.

    Not the library's defaults, which rewrite characters and drop indentation. Raises DataError with its reason.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts), model_writer=model, vocab_size=vocab_size, model_type="bpe",
            byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True, character_coverage=0.9995,
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
            unk_id=0, bos_id=-1, eos_id=1, pad_id=-1, eos_piece=eod, control_symbols=list(special),
            max_sentence_length=LINE_BYTES, minloglevel=2,
        )  # fmt: skip
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"tokenizer=train-sp:{vocab_size}: sentencepiece cannot train it: {reason}") from None
    with made_durably(Path(path)) as file:
        file.write(model.getvalue())
    return Tokenizer.load(path, eod)


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """The lines of the texts, in pieces of at most LINE_BYTES (a character has up to 4)."""
    limit = LINE_BYTES // 4
    for text in texts:
        for line in text.split("\n"):
            yield from (line[at : at + limit] for at in range(0, len(line), limit))


TRAINERS = {"train": Trainer(train_bpe, ".json", EOD), "train-sp": Trainer(train_sentencepiece, ".model", "</s>")}
"""What ``tokenizer=KIND:N`` may say."""
