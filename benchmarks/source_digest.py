"""The code that a number depends on, as one digest that is recorded beside it."""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def digest(*patterns: str) -> str:
    """sha256, hex, over the names and bytes of all files below the root that match, folders of folders included."""
    found = hashlib.sha256()
    for pattern in patterns:
        folder, _, name = pattern.rpartition("/")
        for path in sorted(path for path in (ROOT / folder).rglob(name) if path.is_file() and path.suffix != ".pyc"):
            found.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()
