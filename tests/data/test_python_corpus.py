"""The corpus every machine has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmtrain.data.corpora import python_corpus
from lmtrain.data.corpora.python_corpus import write_python_corpus
from lmtrain.errors import DataError


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_domains_ids_and_sides(tmp_path: Path) -> None:
    domains = write_python_corpus(tmp_path / "once")["domains"]
    assert set(domains) == {"code", "reference", "cheaders"}
    code, reference = rows(tmp_path / "once" / "code.jsonl"), rows(tmp_path / "once" / "reference.jsonl")
    ids = [str(row["id"]) for row in code]
    assert ids == sorted(ids) and len(ids) > 300 and "asyncio/base_events.py" in ids
    assert not any("test" in name.split("/") or "site-packages" in name.split("/") for name in ids)
    size = sum(len(str(row["text"]).encode()) for row in code)
    assert (domains["code"]["documents"], domains["code"]["bytes_of_text"]) == (len(code), size)
    assert max(len(str(row["text"]).encode()) for row in code) <= 200_000
    docstrings = [row for row in reference if row.get("train_only")]
    assert len(docstrings) > 1000 and {row["id"] for row in docstrings} <= set(ids)
    topics = [row for row in reference if not row.get("train_only")]
    assert len(topics) > 50 and all(str(row["id"]).startswith("topics/") for row in topics)


def test_same_python_same_text(tmp_path: Path) -> None:
    made = write_python_corpus(tmp_path / "a")
    assert write_python_corpus(tmp_path / "b") == made == json.loads((tmp_path / "a" / "SOURCES.json").read_text())
    assert len(made["digest"]) == 32
    for name in ("code.jsonl", "reference.jsonl", "cheaders.jsonl", "SOURCES.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_python_without_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_corpus.sysconfig, "get_path", lambda name: str(tmp_path / name))
    with pytest.raises(DataError, match="no Python sources there"):
        write_python_corpus(tmp_path / "out")
