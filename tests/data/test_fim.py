"""Fill-in-the-middle: nothing is lost, the document and the seed alone decide."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmtrain.data.ingest.fim import NAMES, FimTokens, rearranged
from lmtrain.data.ingest.ingest import PrepareConfig, prepare
from lmtrain.data.ingest.reading import SourceOptions
from lmtrain.data.store.manifest import Manifest
from lmtrain.data.store.store import Store
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import DataError

MARKS = FimTokens(1, 2, 3)


@given(st.text(), st.binary(min_size=16, max_size=16), st.integers(0, 5))
def test_prefix_middle_and_suffix_make_up_the_text(text: str, digest: bytes, seed: int) -> None:
    parts = rearranged(text, digest, 1.0, seed, MARKS)
    assert parts is not None and parts == rearranged(text, digest, 1.0, seed, MARKS)
    assert rearranged(text, digest, 0.0, seed, MARKS) is None
    if parts[1] == MARKS.suffix:  # suffix first
        _, _, suffix, middle_mark, prefix, middle = parts
    else:
        _, prefix, suffix_mark, suffix, middle_mark, middle = parts
        assert suffix_mark == MARKS.suffix
    assert parts[0] == MARKS.prefix and middle_mark == MARKS.middle
    assert f"{prefix}{middle}{suffix}" == text


def test_shares_are_as_asked() -> None:
    digests = [i.to_bytes(16, "little") for i in range(2000)]
    made = [rearranged("some text", digest, 0.3, 0, MARKS) for digest in digests]
    chosen = [parts for parts in made if parts is not None]
    assert 500 < len(chosen) < 700
    assert 0.4 < sum(parts[1] == MARKS.suffix for parts in chosen) / len(chosen) < 0.6
    assert made != [rearranged("some text", digest, 0.3, 1, MARKS) for digest in digests]


def test_documents_are_written_rearranged(
    tmp_path: Path, write_jsonl: Callable[..., str], make_text: Callable[[int, int], str], prepared: Path
) -> None:
    texts = [make_text(i, 60) for i in range(40)]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    cfg = PrepareConfig(str(tmp_path / "out"), "train:330", {"a": SourceOptions(path, fim_rate=0.5)}, heldout=0.1)
    prepare(cfg)
    tokenizer = Tokenizer.load(tmp_path / "out" / "tokenizer.json")
    marks = FimTokens.of(tokenizer)
    store = Store(tmp_path / "out" / "a" / "train")
    documents = [store.document(i).tolist() for i in range(store.num_documents)]
    changed = [tokens for tokens in documents if marks.prefix in tokens]
    count = next(row["documents"] for row in Manifest.read(tmp_path / "out" / "a").pipeline if row["step"] == "fim")
    assert len(changed) == count and 8 <= count <= 28
    for tokens in changed:
        at = {mark: tokens.index(mark) for mark in marks}
        assert tokens[-1] == tokenizer.eod_id and sum(token in marks for token in tokens) == 3
        suffix = tokenizer.decode(tokens[at[marks.suffix] + 1 : at[marks.middle]])
        prefix = tokenizer.decode(tokens[1 : at[marks.suffix]])
        assert prefix + tokenizer.decode(tokens[at[marks.middle] + 1 : -1]) + suffix in texts
    heldout = Store(tmp_path / "out" / "a" / "heldout")
    assert heldout.num_documents and not np.isin(heldout.tokens(0, heldout.num_tokens), marks).any()
    with pytest.raises(DataError, match=r"fim_rate: it lacks the tokens <\|fim_prefix\|>, .*train:N makes"):
        other = str(prepared / "tokenizer.json")
        prepare(dataclasses.replace(cfg, out=str(tmp_path / "b"), tokenizer=other))


def test_a_document_is_rearranged_alike_wherever_it_stands(
    tmp_path: Path, write_jsonl: Callable[..., str], make_text: Callable[[int, int], str]
) -> None:
    texts = [make_text(i, 60) for i in range(40)]
    made = []
    for name, order in (("a", texts), ("b", ["", make_text(99, 5), *reversed(texts)])):
        path = write_jsonl(tmp_path / f"{name}.jsonl", [{"text": text} for text in order])
        tokenizer = "train:330" if not made else str(tmp_path / "out-a" / "tokenizer.json")
        cfg = PrepareConfig(str(tmp_path / f"out-{name}"), tokenizer, {"s": SourceOptions(path, fim_rate=0.5)}, 0.0)
        prepare(cfg)
        store = Store(tmp_path / f"out-{name}" / "s" / "train")
        made.append({tuple(store.document(i).tolist()) for i in range(store.num_documents)})
    assert len(made[0]) == 40 and made[0] < made[1]


def test_marks_that_text_can_spell_are_refused(tmp_path: Path, prepared: Path) -> None:
    import tokenizers

    engine = tokenizers.Tokenizer.from_file(str(prepared / "tokenizer.json"))
    engine.add_tokens(list(NAMES[0]))
    engine.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"fim_rate: text that spells .*becomes that token"):
        FimTokens.of(Tokenizer.load(tmp_path / "tokenizer.json"))
