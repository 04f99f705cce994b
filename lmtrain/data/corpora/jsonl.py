"""Documents as JSON lines, as a corpus lies on disk before it is tokenized."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lmtrain.data.ingest.shards import made_durably


def write_jsonl(path: Path, documents: Iterable[dict[str, Any]]) -> tuple[int, int]:
    """Write records with at least ``text``, whole or not at all; returns their number and the UTF-8 bytes of text."""
    count = size = 0
    with made_durably(path) as file:
        for document in documents:
            file.write(json.dumps(document, ensure_ascii=False).encode() + b"\n")
            count += 1
            size += len(document["text"].encode())
    return count, size
