"""Held-out documents of sources that other calls of prepare made: nobody may train on them in the same run."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.ingest.filters.words import Hashes, Runs, runs_of, words_of
from lmtrain.data.ingest.overlap import SHINGLE, heldout_text, wholes
from lmtrain.data.store.apart import heldout_digest
from lmtrain.data.store.locate import Located, locate, prepared_folders
from lmtrain.data.store.manifest import Manifest

log = logging.getLogger(__name__)

BATCH = 1000
"""Documents decoded and compared at once."""


class Elsewhere(NamedTuple):
    """digests: uint64 ``[documents, 2]``, of the normalised texts, by source name. shingles, wholes: of the held-out
    text as it is kept, as in ``HeldoutText.of``; of those sources whose tokenizer is at hand."""

    digests: dict[str, NDArray[np.uint64]]
    shingles: Runs
    wholes: Hashes


def prepared_among(paths: str) -> tuple[str, list[Path]]:
    """What is no prepared folder of a comma-separated list of paths, and the prepared folders."""
    parts = [part for part in paths.split(",") if part]
    found = {part: prepared_folders(part) for part in parts}
    return ",".join(part for part in parts if not found[part]), [path for part in parts for path in found[part]]


def folders_elsewhere(given: Sequence[Path], out: Path, own: Sequence[str], tokenizer: str) -> list[Path]:
    """The prepared folders ``given``, those in ``out`` but for the sources ``own``, and those beside the tokenizer."""
    replaced = {(out / name).resolve() for name in own}
    beside = Path(tokenizer).parent if Path(tokenizer).is_file() else out
    found = [path.resolve() for path in (*given, *prepared_folders(out), *prepared_folders(beside))]
    return [path for path in dict.fromkeys(found) if path not in replaced and Manifest.read(path).heldout.hashes]


def names_of(folders: Sequence[Path]) -> list[dict[str, str]]:
    """What a manifest keeps of them: name and digest of the held-out documents."""
    manifests = [Manifest.read(folder) for folder in folders]
    return [{"source": manifest.source, "heldout": heldout_digest(manifest)} for manifest in manifests]


def read_elsewhere(folders: Sequence[Path]) -> Elsewhere:
    """The held-out documents of prepared folders. Raises DataError if one is damaged."""
    digests: dict[str, NDArray[np.uint64]] = {}
    hashes, counts, own = [np.empty(0, dtype=np.uint64)], [np.zeros(1, dtype=np.int64)], [np.empty(0, dtype=np.uint64)]
    for folder in folders:
        for located in locate(folder):
            assert located.manifest is not None
            data = bytes.fromhex("".join(located.manifest.heldout.hashes))
            digests[located.path] = np.frombuffer(data, dtype=">u8").reshape(-1, 2).astype(np.uint64)
            for texts in _texts(located):
                words = words_of(texts)
                runs = runs_of(words, SHINGLE)
                hashes.append(runs.hashes)
                counts.append(np.diff(runs.starts))
                own.append(wholes(words))
    return Elsewhere(digests, Runs(np.concatenate(hashes), np.cumsum(np.concatenate(counts))), np.concatenate(own))


def _texts(located: Located) -> Iterator[list[str]]:
    tokenizer, store = located.tokenizer, located.stores["heldout"]
    if tokenizer is None:
        log.warning(
            "%s: its tokenizer is not beside it, so only documents equal to its held-out ones are left out, "
            "not those that nearly equal one, or hold one", located.path,
        )  # fmt: skip
        return
    for first in range(0, store.num_documents, BATCH):
        numbers = range(first, min(first + BATCH, store.num_documents))
        yield [heldout_text(tokenizer.decode(store.document(j)).removesuffix(tokenizer.eod)) for j in numbers]
