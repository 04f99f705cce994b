"""Numbers of things in sentences."""

from __future__ import annotations


def counted(count: int, thing: str) -> str:
    """``1 document``, ``2,000 documents``: for a ``thing`` whose plural ends in s."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"
