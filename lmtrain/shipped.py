"""Folders that travel with the package: inside it in a wheel, beside it in a checkout or an editable install."""

from __future__ import annotations

from pathlib import Path

import lmtrain


def folder(name: str) -> Path:
    """``recipes`` or ``launch``. Raises FileNotFoundError if the installation lost it."""
    package = Path(__file__).resolve().parent
    candidates = [*(Path(entry) / name for entry in lmtrain.__path__), package.parent / name]
    for candidate in candidates:
        if candidate.is_dir() and any(candidate.iterdir()):
            return candidate
    raise FileNotFoundError(f"lmtrain: its folder {name} is not installed; looked at {', '.join(map(str, candidates))}")
