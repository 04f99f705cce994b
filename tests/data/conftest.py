"""What the data tests share: a tiny prepared corpus of three sources, and its settings."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from lmtrain.data.config import DataConfig, SourceConfig
from lmtrain.data.ingest.ingest import PrepareConfig, prepare
from lmtrain.data.ingest.reading import SourceOptions

WORDS = [f"{a}{b}" for a in "bcdfghjklm" for b in ("ala", "elo", "iru", "omi", "ush")]


def text(seed: int, words: int) -> str:
    """Reproducible prose-like text."""
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(words)) + "\n"


def jsonl(path: Path, documents: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def text_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of three jsonl sources with ids; document lengths from one word to several thousand."""
    root = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    sizes = {"code": 60, "docs": 40, "rare": 12}
    return {
        name: jsonl(
            root / f"{name}.jsonl",
            [{"id": f"{name}/{i}", "text": text(1000 * n + i, rng.choice([1, 30, 200, 900]))} for i in range(count)],
        )
        for n, (name, count) in enumerate(sizes.items())
    }


@pytest.fixture(scope="session")
def prepared(text_files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three sources, prepared with a trained tokenizer. Read-only."""
    out = tmp_path_factory.mktemp("prepared") / "out"
    sources = {name: SourceOptions(path) for name, path in text_files.items()}
    prepare(PrepareConfig(out=str(out), tokenizer="train:320", heldout=0.2, sources=sources))
    return out


@pytest.fixture(scope="session")
def data_config(prepared: Path) -> Callable[..., DataConfig]:
    """``data_config(weights={...}, seq_len=64, ...)``."""

    def build(weights: dict[str, float] | None = None, **changes: object) -> DataConfig:
        weights = weights or {"code": 0.6, "docs": 0.3, "rare": 0.1}
        sources = {name: SourceConfig(str(prepared / name), weight) for name, weight in weights.items()}
        settings = {"tokenizer": str(prepared / "tokenizer.json"), "seq_len": 64, "max_epochs": 1e9, **changes}
        return DataConfig(sources=sources, **settings)  # type: ignore[arg-type]

    return build


@pytest.fixture
def write_jsonl() -> Callable[[Path, list[dict[str, object]]], str]:
    return jsonl


@pytest.fixture
def make_text() -> Callable[[int, int], str]:
    return text
