"""A ``.bin/.idx`` pair of very many documents that takes no room: what a huge store costs to open, without one."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lmtrain.data.store.index import DTYPES, HEADER, MAGIC


def write_sparse_store(prefix: str | Path, *, documents: int, filled: int, length: int) -> None:
    """The last ``filled`` documents hold ``length`` tokens each, 1 to ``length - 1`` and a 0; all others are empty.

    Their entries are holes in a sparse file, read as zeros: as lengths and offsets they are right. The document array
    is written at its ends only: a reader that checks all of it must refuse the pair.
    """
    sizes = np.full(filled, length)
    with open(f"{prefix}.idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, documents, documents + 1))
        empty = documents - filled
        file.seek(HEADER.size + 4 * empty)
        file.write(sizes.astype("<i4").tobytes())
        file.seek(HEADER.size + 4 * documents + 8 * empty)
        file.write(((np.cumsum(sizes) - sizes) * DTYPES[8].itemsize).astype("<i8").tobytes())
        file.seek(HEADER.size + 12 * documents + 8 * empty)
        file.write(np.arange(empty, documents + 1, dtype="<i8").tobytes())
    document = np.append(np.arange(1, length), 0).astype(DTYPES[8])
    Path(f"{prefix}.bin").write_bytes(np.tile(document, filled).tobytes())
