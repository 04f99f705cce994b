"""A source that only rank 0 can import, as where a module was installed on one machine of several."""

from __future__ import annotations

import os

from lmtrain.data.blocks.function import document_function

if os.environ.get("RANK", "0") != "0":
    raise ImportError("not on this machine")


@document_function
def numbers(seed: int, index: int) -> list[int]:
    return [index % 7, 1, 2]
