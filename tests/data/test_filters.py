"""Filters: what each leaves out, why, with an example in filters.jsonl; and that nothing but the text decides."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.data.ingest import reading
from lmtrain.data.ingest.filters import decontaminate, exact, minhash, words
from lmtrain.data.ingest.filters.exact import text_digest
from lmtrain.data.ingest.filters.quality import RULES, broken_rule
from lmtrain.data.ingest.filters.words import Known, runs_of, words_of
from lmtrain.data.ingest.ingest import PrepareConfig, prepare
from lmtrain.data.ingest.reading import SourceOptions
from lmtrain.data.store.manifest import Manifest
from lmtrain.errors import DataError

Text = Callable[[int, int], str]
Write = Callable[..., str]
TEXTS = st.lists(
    st.text(st.characters(codec="utf-8") | st.sampled_from("ab _-,\n\u4e2d\u0130"), max_size=40), max_size=6
)


def plain_words(text: str) -> list[str]:
    text = unicodedata.normalize("NFC", text).lower()
    alone = "".join(map(chr, itertools.chain(*(range(a, b + 1) for a, b in words.WITHOUT_SPACES))))
    marked = "".join(c if unicodedata.category(c)[0] in "LNM" or c == "_" or re.match(r"\w", c) else " " for c in text)
    return re.findall(f"[{alone}]|[^{alone} ]+", marked)


def test_a_character_is_a_word_where_no_blanks_are() -> None:
    counts = {
        "你好\uff0c世界 abc": 5, "ab你cd": 3, "こん カナ": 4, "กี่กา": 5, "Cafe\u0301 au": 2, "हिन्दी भाषा": 2,
        "русский язык": 2, "한국어 말": 2,
    }  # fmt: skip
    assert {text: int(words_of([text]).starts[1]) for text in counts} == counts


@given(TEXTS, st.integers(1, 4), st.sampled_from([4, 7, 1 << 20]))
@settings(max_examples=150, deadline=None)
def test_runs_are_those_of_the_words_of_each_text(texts: list[str], length: int, at_once: int) -> None:
    """Equal hashes exactly where the runs are equal, whatever is hashed together."""
    before = words.MAX_LENGTH
    words.MAX_LENGTH = max(at_once, max((len(unicodedata.normalize("NFC", text).lower()) for text in texts), default=0))
    try:
        runs = runs_of(words_of(texts), length)
    finally:
        words.MAX_LENGTH = before
    own = [plain_words(text) for text in texts]
    expected = [tuple(text[i : i + length]) for text in own for i in range(len(text) - length + 1)]
    assert np.diff(runs.starts).tolist() == [max(len(text) - length + 1, 0) for text in own]
    assert (
        len(set(runs.hashes.tolist()))
        == len(set(expected))
        == len(set(zip(runs.hashes.tolist(), expected, strict=True)))
    )


@given(st.sets(st.integers(0, 2**64 - 1), max_size=50), st.lists(st.integers(0, 2**64 - 1), max_size=50))
@settings(max_examples=60, deadline=None)
def test_known_finds_what_is_there(known: set[int], others: list[int]) -> None:
    hashes = np.array(sorted(known), dtype=np.uint64)
    own = np.array([*others, *list(known)[:10]], dtype=np.uint64)
    which, where = Known(hashes).places(own)
    assert which.tolist() == [i for i, value in enumerate(own.tolist()) if value in known]
    assert (hashes[where] == own[which]).all()


def test_exact_duplicates_ignore_case_space_and_composition() -> None:
    assert text_digest("Caf\u00e9  au\nlait ") == text_digest("CAFE\u0301 au lait") != text_digest("cafe au lait")


def test_minhash_matches_as_its_formula_says(make_text: Text) -> None:
    rng, pairs, matched = np.random.default_rng(0), 60, {0.95: 0, 0.3: 0}
    for similarity in matched:
        for _ in range(pairs):
            own = rng.integers(0, 2**63, 400).astype(np.uint64)
            other = own.copy()
            changed = round(400 * (1 - similarity) / (1 + similarity))  # Jaccard of two sets of 400 with so many apart
            other[:changed] = rng.integers(0, 2**63, changed)
            keys = np.stack([minhash.band_keys(own), minhash.band_keys(other)])
            matched[similarity] += int(minhash.earlier_match(keys)[1] == 0)
    assert matched[0.95] == pairs and matched[0.3] <= 1
    assert minhash.earlier_match(np.zeros((2, 14), dtype=np.uint64)).tolist() == [0, 1]  # too short to compare


def test_of_a_chain_of_near_duplicates_the_first_stays() -> None:
    keys = np.arange(4 * minhash.BANDS, dtype=np.uint64).reshape(4, -1) + 1
    keys[1, 3], keys[2, 5] = keys[0, 3], keys[1, 5]
    assert minhash.earlier_match(keys).tolist() == [0, 0, 1, 3]


PROSE = (
    "The house stood at the end of a long road that few people took, and those who did had reason to be there. It was "
    "built of grey stone with a slate roof, and in winter the wind came down from the hills and found every gap in its "
    "old windows. Nobody had lived in it for years when Anna bought it from a distant cousin of the last owner."
)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (PROSE, None),
        ("too few words", "words"),
        ("a b c d e " * 12, "word_length"),
        (PROSE + " # # # # # # # # #", "symbols"),
        ("\n".join(f"- {line}" for line in re.split(r"[,.] ", PROSE)), "bullets"),
        ("\n".join(f"{line} ..." for line in (PROSE[:160], PROSE[160:])), "ellipses"),
        (PROSE + " 1234 5678 9012" * 8, "letters"),
        (" ".join(f"word{i}x" for i in range(60)), "stop_words"),
        ("\n".join([PROSE, *["The same line again"] * 3]), "duplicate_lines"),
        (PROSE + " and then" * 30, "top_2_gram"),
        (PROSE + " " + PROSE, "duplicate_5_gram"),
    ],
)
def test_prose_is_told_from_the_rest(text: str, rule: str | None) -> None:
    assert broken_rule(text) == rule and (rule is None or rule in RULES)


def test_evaluations_are_read_as_they_lie(tmp_path: Path, make_text: Text) -> None:
    question, long = make_text(1, 12).strip(), make_text(2, 30).strip()
    (tmp_path / "mmlu" / "test").mkdir(parents=True)
    (tmp_path / "mmlu" / "test" / "x_test.csv").write_text(f'"{question}",one,two,three,four,B\n', encoding="utf-8")
    (tmp_path / "e.jsonl").write_text(json.dumps({"q": {"text": [long, "short"]}}) + "\n", encoding="utf-8")
    (tmp_path / "e.txt").write_text(make_text(3, 20), encoding="utf-8")
    found = decontaminate.read_evaluations(f"{tmp_path}/mmlu,{tmp_path}/e.jsonl,{tmp_path}/e.txt")
    assert [Path(file).name for file in found.files] == ["x_test.csv", "e.jsonl", "e.txt"]

    def hits(text: str) -> list[str]:
        return [
            Path(found.file_of_text(i)).name for i in found.found(runs_of(words_of([text]), decontaminate.RUN).hashes)
        ]

    assert hits(f"Before. {question.upper()}, One, two!") == ["x_test.csv"] and hits(question) == []
    assert hits("x " + " ".join(long.split()[5:18])) == ["e.jsonl"] and hits(" ".join(long.split()[5:17])) == []
    (tmp_path / "bad.jsonl").write_text("{\n", encoding="utf-8")
    for path, message in (
        ("bad.jsonl", "bad.jsonl:1: malformed JSON"),
        ("none", "none: no .csv, .jsonl, .parquet, .txt files"),
    ):
        with pytest.raises(DataError, match=message):
            decontaminate.read_evaluations(str(tmp_path / path))


def test_parquet_is_read_and_what_is_not_read_is_refused(tmp_path: Path, make_text: Text) -> None:
    question = make_text(1, 20)
    pyarrow.parquet.write_table(pyarrow.table({"question": [question], "answer": [1]}), tmp_path / "x.parquet")
    (tmp_path / "e.txt").write_text(make_text(3, 20), encoding="utf-8")
    (tmp_path / "README.md").write_text("about", encoding="utf-8")
    found = decontaminate.read_evaluations(str(tmp_path))
    hits = found.found(runs_of(words_of([f"x {question}"]), decontaminate.RUN).hashes)
    assert [Path(found.file_of_text(i)).name for i in hits] == ["x.parquet"]
    (tmp_path / "y.jsonl.gz").write_bytes(b"")
    for path in (tmp_path, tmp_path / "README.md"):
        with pytest.raises(DataError, match=r"only .csv, .jsonl, .parquet, .txt are read; convert it"):
            decontaminate.read_evaluations(str(path))


@pytest.mark.parametrize("workers", [1, 2])
def test_every_filter_reports_what_it_left_out(
    workers: int, tmp_path: Path, prepared: Path, write_jsonl: Write, make_text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "CHUNK_BYTES", 3000)
    monkeypatch.setattr(reading, "CHUNKS_PER_SHARD", 2)
    base = [make_text(i, 100) for i in range(20)]
    changed = base[4].split()
    changed[50] = "other"
    exam = make_text(77, 30)
    (tmp_path / "exam.txt").write_text(exam, encoding="utf-8")
    rows = [*base, " ".join(changed), base[3].upper(), "intro " + exam, ""]
    a = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in rows])
    b = write_jsonl(
        tmp_path / "b.jsonl", [{"text": " ".join([*base[7].split()[:-1], "end"])}, {"text": PROSE}, {"text": "x"}]
    )
    sources = {"a": SourceOptions(a, near_duplicates=True), "b": SourceOptions(b, near_duplicates=True, quality=True)}
    out, tokenizer = tmp_path / "out", tmp_path / "tokenizer.json"  # away from what is held out beside it
    shutil.copy(prepared / "tokenizer.json", tokenizer)
    shutil.copy(prepared / "tokenizer_config.json", tmp_path)
    cfg = PrepareConfig(
        str(out), str(tokenizer), sources, heldout=0.0, workers=workers, decontaminate=str(tmp_path / "exam.txt")
    )
    prepare(cfg)
    steps = {name: {row["step"]: row for row in Manifest.read(out / name).pipeline} for name in "ab"}
    removed = {name: {key: row["removed"] for key, row in steps[name].items() if row.get("removed")} for name in "ab"}
    assert removed["a"] == {"empty": 1, "duplicate": 1, "contaminated": 1, "near_duplicate": 1}
    assert removed["b"] == {"quality_stop_words": 1, "quality_words": 1}
    assert steps["a"]["evaluations"]["found"] == {str(tmp_path / "exam.txt"): 1}
    examples = [json.loads(line) for line in (out / "a" / "filters.jsonl").read_text(encoding="utf-8").splitlines()]
    shown = {row["reason"]: row for row in examples}
    assert shown["near_duplicate"]["because"] == "document 4 of a" and shown["near_duplicate"]["document"] == 20
    assert shown["contaminated"]["because"].endswith("exam.txt") and shown["contaminated"]["text"].startswith("intro")
    assert shown["duplicate"]["where"] == f"{a}:22"


@settings(max_examples=300, deadline=None)
@given(
    st.text(st.sampled_from(" \n\t\u00a0\u2003aAe\u0301\u0327\u03a3\u03c3\u0130\u1100\u1161\u11a8."), max_size=60),
    st.integers(2, 9),
)
def test_a_long_text_has_the_digest_of_its_definition(text: str, piece: int) -> None:
    plain = " ".join(unicodedata.normalize("NFC", text).lower().split())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "PIECE", piece)
        assert exact.text_digest(text) == xxhash.xxh3_128_digest(plain.encode())
