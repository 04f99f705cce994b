"""Where documents come from, and the sentence for everything that can be wrong with them."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lmtrain.data.ingest import reading
from lmtrain.data.ingest.reading import SourceOptions, inputs_digest, read_chunks, read_documents
from lmtrain.errors import DataError

ROWS = [{"text": "one", "id": "a", "n": 1}, {"text": "zw\u00f6lf", "id": "b", "n": 2}]


def read(path: object, **options: str) -> list[tuple[str, str | None]]:
    return [(document.text, document.id) for document in read_documents(SourceOptions(str(path), **options))]


def test_plain_files_are_one_document_each(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "deep/c.py", ".hidden/x.txt", ".dot.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(f"{name}\r\n".encode())
    assert read(tmp_path) == [("a.md\r\n", "a.md"), ("b.txt\r\n", "b.txt"), ("deep/c.py\r\n", "deep/c.py")]
    assert read(tmp_path / "**" / "*.py") == [("deep/c.py\r\n", "deep/c.py")]
    assert read(tmp_path / "b.txt") == [("b.txt\r\n", "b.txt")]


def test_json_lines(tmp_path: Path, write_jsonl: Callable[..., str]) -> None:
    rows = [*ROWS, {"text": None}, {"text": "t", "train_only": True}]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    assert read(path) == [("one", "a"), ("zw\u00f6lf", "b"), ("", None), ("t", None)]
    assert [document.train_only for document in read_documents(SourceOptions(path))] == [False, False, False, True]
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(Path(path).read_bytes() + b"\n\n"))
    assert read(tmp_path / "x.jsonl.gz") == read(path)


def test_formats_of_the_datasets_library(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(str(tmp_path / "a.parquet"))
    table.to_csv(str(tmp_path / "b.csv"))
    (tmp_path / "c.json").write_text(json.dumps(ROWS), encoding="utf-8")
    (tmp_path / "d.tsv").write_text("text\tid\none\ta\nzw\u00f6lf\tb\n", encoding="utf-8")
    table.save_to_disk(str(tmp_path / "arrow"))
    (next((tmp_path / "arrow").glob("*.arrow"))).rename(tmp_path / "e.arrow")
    for name in ("a.parquet", "b.csv", "c.json", "d.tsv", "e.arrow"):
        assert read(tmp_path / name) == [("one", "a"), ("zw\u00f6lf", "b")], name
    (tmp_path / "bad.parquet").write_bytes(b"PAR1nonsense")
    with pytest.raises(DataError, match=r"bad.parquet: not readable as parquet: \w+") as error:
        read(tmp_path / "bad.parquet")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"ab\xffc", r"x.txt: byte 2 \(0xff\) is not UTF-8; .*iconv -f LATIN1"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"x.jsonl: byte 24 \(0xe9\) is not UTF-8"),
        ("x.jsonl", b'{"text": "a"}\n\n{"text": \n', r'x.jsonl:3: malformed JSON \(.*\): \{"text":'),
        (
            "x.jsonl",
            b'{"body": "a", "title": "b"}\n',
            r"present: body, title \(set sources.NAME.text_field=body\)",
        ),
        ("x.jsonl", b'{"text": ["a"]}\n', r"x.jsonl:1: field text holds list, not text"),
        ("x.jsonl", b"[1]\n", r"x.jsonl:1: expected an object with field text, found list"),
        ("x.jsonl", b'{"text": "a\\ud800b"}\n', r"x.jsonl:1: character 1 is half of a surrogate pair"),
        ("x.csv", b"body\na\n", r"x.csv, record 1: no field text; fields present: body"),
    ],
)
def test_bad_text_names_its_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_missing_id_field(tmp_path: Path, write_jsonl: Callable[..., str]) -> None:
    with pytest.raises(DataError, match=r"x.jsonl:1: no field name; .* text, id, n \(set sources.NAME.id_field\)"):
        read(write_jsonl(tmp_path / "x.jsonl", ROWS), id_field="name")
    assert read(tmp_path / "x.jsonl", id_field="n") == [("one", "1"), ("zw\u00f6lf", "2")]


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, message in [
        (tmp_path / "none", "none: no such file or folder"),
        ("data/none.jsonl", "data/none.jsonl: no such file or folder"),
        (tmp_path / "empty", "empty: no files there"),
        (tmp_path / "*.txt", "no files there"),
    ]:
        with pytest.raises(DataError, match=message.replace("*", r"\*")):
            read(path)


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'some/dataset' on the Hub\n(offline)")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"some/dataset: neither .*ConnectionError.* give a local path") as error:
        read("some/dataset")
    assert "\n" not in str(error.value)


def test_digest_sees_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x", encoding="utf-8")
    first = inputs_digest(SourceOptions(str(tmp_path)))
    (tmp_path / "a.txt").touch()
    assert inputs_digest(SourceOptions(str(tmp_path))) == first
    (tmp_path / "a.txt").write_text("y", encoding="utf-8")
    second = inputs_digest(SourceOptions(str(tmp_path)))
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert len({first, second, inputs_digest(SourceOptions(str(tmp_path)))}) == 3


def test_a_document_that_is_a_corpus_is_refused_before_it_is_read(
    tmp_path: Path, write_jsonl: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAX_DOCUMENT_BYTES", 1000)
    (tmp_path / "big.txt").write_bytes(b"x" * 1001)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail("read"))
    with pytest.raises(DataError, match=r"big.txt: a document of more than 1,000 bytes; split it"):
        read(tmp_path / "big.txt")
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "a"}, {"text": "b" * 2000}])
    with pytest.raises(DataError, match=r"x.jsonl:2: a document of more than 1,000 bytes"):
        read(path)
    (tmp_path / "sparse.txt").touch()
    os.truncate(tmp_path / "sparse.txt", 1 << 30)
    with pytest.raises(DataError, match=r"sparse.txt: a document of more than"):
        read(tmp_path / "sparse.txt")


def test_a_damaged_archive_names_itself(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(json.dumps({"text": str(i) * 50}).encode() + b"\n" for i in range(500)))
    for name, data in (
        ("cut.jsonl.gz", whole[:-20]),
        ("no.jsonl.gz", b"plain"),
        ("bad.jsonl.gz", whole[:60] + b"!!!" * 9),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=f"{name}: not readable as gzip"):
            read(tmp_path / name)


def test_chunks_and_shards_depend_on_the_text_alone(
    tmp_path: Path, write_jsonl: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "CHUNK_BYTES", 60)
    monkeypatch.setattr(reading, "CHUNKS_PER_SHARD", 2)
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "x" * size} for size in (4, 6, 30, 1, 2, 3, 4, 5)])
    chunks = list(read_chunks("a", SourceOptions(path)))
    texts = [[len(document.text) for document in chunk.documents()] for chunk in chunks]
    assert [(chunk.shard, chunk.first) for chunk in chunks] == [(0, 0), (0, 3), (1, 7)]
    assert texts == [[4, 6, 30], [1, 2, 3, 4], [5]]
