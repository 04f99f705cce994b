"""Documents as JSON lines, as a corpus lies on disk before it is tokenized."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

from lmtrain.data.ingest.shards import made_durably
from lmtrain.data.store.manifest import file_digest

log = logging.getLogger(__name__)
SOURCES = "SOURCES.json"
FORMAT_VERSION = 1


def write_corpus(
    out: Path, domains: Iterable[tuple[str, Iterable[dict[str, Any]]]], made_from: dict[str, Any]
) -> dict[str, Any]:
    """Write ``out/DOMAIN.jsonl`` for every domain and ``out/SOURCES.json``; returns the content of the latter.

    That is ``format_version``, ``digest`` (of all text, wherever ``out`` is), ``domains`` and ``made_from``.
    """
    written = {name: _domain(out / f"{name}.jsonl", documents) for name, documents in domains}
    digest = xxhash.xxh3_128_hexdigest(json.dumps(written, sort_keys=True).encode())
    sources = {"format_version": FORMAT_VERSION, "digest": digest, "domains": written, **made_from}
    with made_durably(out / SOURCES) as file:
        file.write((json.dumps(sources, indent=1) + "\n").encode())
    return sources


def _domain(path: Path, documents: Iterable[dict[str, Any]]) -> dict[str, Any]:
    count, size = write_jsonl(path, documents)
    log.info("%s: %d documents, %.1f MB", path.stem, count, size / 1e6)
    return {"documents": count, "bytes_of_text": size, "xxh3_128": file_digest(path)}


def write_jsonl(path: Path, documents: Iterable[dict[str, Any]]) -> tuple[int, int]:
    """Write records with at least ``text``, whole or not at all; returns their number and the UTF-8 bytes of text."""
    count = size = 0
    with made_durably(path) as file:
        for document in documents:
            file.write(json.dumps(document, ensure_ascii=False).encode() + b"\n")
            count += 1
            size += len(document["text"].encode())
    return count, size
