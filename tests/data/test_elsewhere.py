"""What one call of prepare held out is not trained on by way of another call, of a merge, or unseen in a run."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lmtrain.data.config import DataConfig, SourceConfig
from lmtrain.data.ingest.ingest import PrepareConfig, prepare
from lmtrain.data.ingest.reading import SourceOptions
from lmtrain.data.sources import check_sources, open_sources
from lmtrain.data.store import apart
from lmtrain.data.store.apart import kept_out, may_be_trained_on
from lmtrain.data.store.manifest import Manifest
from lmtrain.data.store.merge import merge
from lmtrain.data.store.store import Store
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import DataError

Write = Callable[..., str]
Text = Callable[[int, int], str]


@pytest.fixture
def two(tmp_path: Path, prepared: Path, write_jsonl: Write, make_text: Text) -> Callable[..., PrepareConfig]:
    """``two(folder, near, tokenizer)``: settings of b, whose text is a's under other ids, which b holds out of nothing.

    a is prepared, in ``tmp_path/first``. near: what becomes of each text.
    """
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "alone").mkdir(exist_ok=True)
        shutil.copy(prepared / name, tmp_path / "alone")
    documents = [make_text(i, 60) for i in range(40)]
    a = write_jsonl(tmp_path / "a.jsonl", [{"id": f"a{i}", "text": text} for i, text in enumerate(documents)])
    alone = str(tmp_path / "alone" / "tokenizer.json")
    prepare(PrepareConfig(str(tmp_path / "first"), alone, {"a": SourceOptions(a)}, heldout=0.25))
    shutil.copy(alone, tmp_path / "first")

    def build(folder: str, near: Callable[[str], str] = str, tokenizer: str = "first") -> PrepareConfig:
        rows = [{"id": f"b{i}", "text": near(text)} for i, text in enumerate(documents)]
        b = write_jsonl(tmp_path / "b.jsonl", rows)
        path = str(tmp_path / tokenizer / "tokenizer.json")
        return PrepareConfig(str(tmp_path / folder), path, {"b": SourceOptions(b)}, heldout=0.0)

    return build


def texts(folder: Path, split: str) -> set[str]:
    tokenizer = Tokenizer.load(folder.parent / "tokenizer.json")
    store = Store(folder / split)
    return {tokenizer.decode(store.document(j)).removesuffix(tokenizer.eod) for j in range(store.num_documents)}


@pytest.mark.parametrize("way", ["same folder", "its tokenizer", "named"])
def test_held_out_once_is_trained_on_never(way: str, tmp_path: Path, two: Callable[..., PrepareConfig]) -> None:
    cfg = two("first" if way == "same folder" else "second", tokenizer="alone" if way == "named" else "first")
    if way == "named":
        cfg = dataclasses.replace(cfg, decontaminate=str(tmp_path / "first"))
    made = prepare(cfg)[0]["b"]
    held = texts(tmp_path / "first" / "a", "heldout")
    kept = texts(Path(cfg.out) / "b", "train")
    assert len(held) > 4 and kept == texts(tmp_path / "first" / "a", "train")
    steps = {step["step"]: step for step in made.pipeline}
    assert steps["heldout_elsewhere"]["removed"] == len(held) and [row["source"] for row in kept_out(made)] == ["a"]
    assert prepare(cfg) == ({"b": made}, False)


def test_nor_what_nearly_equals_it(tmp_path: Path, two: Callable[..., PrepareConfig]) -> None:
    cfg = two("second", near=lambda text: "An introduction! " + text.replace(" ", ", ").upper() + " The end." * 40)
    made = prepare(dataclasses.replace(cfg, workers=2))[0]["b"]
    removed = {step["step"]: step["removed"] for step in made.pipeline if step.get("removed")}
    held = len(texts(tmp_path / "first" / "a", "heldout"))
    assert removed == {"near_duplicate_of_heldout": held}
    again = dataclasses.replace(cfg, out=str(tmp_path / "third"))
    prepare(again)
    assert (tmp_path / "third/b/train.bin").read_bytes() == (tmp_path / "second/b/train.bin").read_bytes()


def test_what_came_later_does_not_make_a_source_another(tmp_path: Path, two: Callable[..., PrepareConfig]) -> None:
    cfg = two("second", tokenizer="alone")
    first, made = prepare(cfg)
    other = dataclasses.replace(cfg, sources={"c": cfg.sources["b"]}, heldout=0.5)
    prepare(dataclasses.replace(other, tokenizer=str(tmp_path / "second" / "tokenizer.json")))
    assert made and prepare(cfg) == (first, False)


def test_text_elsewhere_has_the_same_digest(tmp_path: Path, two: Callable[..., PrepareConfig]) -> None:
    cfg = two("second", tokenizer="alone")
    shutil.copytree(tmp_path / "alone", tmp_path / "moved")
    moved = shutil.copy(tmp_path / "b.jsonl", tmp_path / "moved" / "b.jsonl")
    prepare(cfg)
    assert prepare(dataclasses.replace(cfg, sources={"b": SourceOptions(str(moved))}))[1] is False


def test_merge_refuses_what_another_input_holds_out(tmp_path: Path, two: Callable[..., PrepareConfig]) -> None:
    prepare(two("second", tokenizer="alone"))
    paths = [str(tmp_path / "first" / "a"), str(tmp_path / "second" / "b")]
    with pytest.raises(DataError, match=r"second/b: trains on \d+ documents held out in another input .* in .*first/a"):
        merge(str(tmp_path / "all"), paths)
    assert not list(tmp_path.glob("all*"))
    prepare(dataclasses.replace(two("third"), sources={"b": SourceOptions(str(tmp_path / "b.jsonl"))}))
    merge(str(tmp_path / "all"), [paths[0], str(tmp_path / "third" / "b")])
    assert not texts_of(tmp_path / "all", "train") & texts_of(tmp_path / "all", "heldout")


def texts_of(folder: Path, split: str) -> set[bytes]:
    store = Store(folder / split)
    return {store.document(j).tobytes() for j in range(store.num_documents)}


def test_a_run_says_what_nobody_compared(
    tmp_path: Path, two: Callable[..., PrepareConfig], caplog: pytest.LogCaptureFixture
) -> None:
    prepare(two("second", tokenizer="alone"))
    folders = {"a": tmp_path / "first" / "a", "b": tmp_path / "second" / "b"}
    assert may_be_trained_on({name: Manifest.read(path) for name, path in folders.items()}) == [("a", "b")]
    tokenizer = str(tmp_path / "alone" / "tokenizer.json")
    cfg = DataConfig(
        sources={n: SourceConfig(str(p), 1.0) for n, p in folders.items()}, tokenizer=tokenizer, seq_len=32
    )
    for look in (lambda: check_sources(cfg), lambda: open_sources(cfg, Tokenizer.load(tokenizer))):
        caplog.clear()
        apart._warn.cache_clear()
        with caplog.at_level(logging.WARNING):
            look()
        assert "prepared in different calls" in caplog.text and "a's in b" in caplog.text
    prepare(two("third"))
    folders["b"] = tmp_path / "third" / "b"
    assert may_be_trained_on({name: Manifest.read(path) for name, path in folders.items()}) == []
