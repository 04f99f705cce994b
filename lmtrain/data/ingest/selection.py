"""Which documents are trained on, which are held out, which are left out, and why: a function of the survey."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.ingest.elsewhere import Elsewhere
from lmtrain.data.ingest.filters.decontaminate import Evaluations
from lmtrain.data.ingest.filters.minhash import earlier_match
from lmtrain.data.ingest.filters.quality import RULES
from lmtrain.data.ingest.filters.words import Runs
from lmtrain.data.ingest.overlap import HeldoutText
from lmtrain.data.ingest.survey import Facts

RULE = "xxh3-64 of the id (else of the normalised text) below share * 2^64; first 50 kB of a document"
TRAIN, HELDOUT, EMPTY, DUPLICATE, CONTAMINATED, NEAR_DUPLICATE, TRAIN_ONLY, HELDOUT_ELSEWHERE, QUALITY = range(9)
VERDICTS = (
    "train", "heldout", "empty", "duplicate", "contaminated", "near_duplicate", "train_only_of_heldout",
    "heldout_elsewhere", *(f"quality_{rule}" for rule in RULES),
)  # fmt: skip
"""What may be decided about a document; the numbers above, the rules of quality from QUALITY on."""


class Ids(NamedTuple):
    """How many ids of documents are held out, of how many."""

    ids: int
    of: int


@dataclass(frozen=True)
class Selection:
    """Of one source. verdicts: uint8 ``[documents]``. digests: uint64 ``[documents, 2]``, of the normalised texts.
    because: of a near-duplicate, a contaminated document and one held out elsewhere, by number, what it was left out
    for. found: evaluation file -> its texts that were found. train_bytes: UTF-8 bytes on the training side. ids: of
    those documents on either side that have one.
    """

    verdicts: NDArray[np.uint8]
    digests: NDArray[np.uint64]
    because: dict[int, str]
    found: dict[str, int]
    train_bytes: int
    ids: Ids

    @property
    def hashes(self) -> list[str]:
        """Of the held-out documents, hex, in order."""
        chosen = self.digests[self.verdicts == HELDOUT]
        return [digest.tobytes().hex() for digest in chosen.astype(">u8")]

    @property
    def removed(self) -> dict[str, int]:
        """Documents left out, by verdict; those that occur, in order."""
        counts = Counter(self.verdicts.tolist())
        return {name: counts[i] for i, name in enumerate(VERDICTS) if i not in (TRAIN, HELDOUT) and counts[i]}


def select(
    facts: Mapping[str, Facts], evaluations: Evaluations, elsewhere: Elsewhere
) -> tuple[dict[str, Selection], HeldoutText]:
    """Decide on every document of every source; and the held-out text, of these sources and elsewhere.

    Of documents equal after normalisation the first stays, over all sources; of near-duplicates, the first over the
    sources that look for them. Memory: about 100 B per document, with near-duplicates 400.
    """
    rows = np.concatenate([part.rows for part in facts.values()])
    verdicts = np.full(len(rows), TRAIN, dtype=np.uint8)
    _, first, group = np.unique(rows["digest"], axis=0, return_index=True, return_inverse=True)
    verdicts[first[group.ravel()] < np.arange(len(rows))] = DUPLICATE
    verdicts[rows["empty"]] = EMPTY
    known = dict(_held_out_elsewhere(rows, elsewhere))
    verdicts[list(known)] = HELDOUT_ELSEWHERE

    def decide(where: NDArray[np.bool_], verdict: int | NDArray[np.int8]) -> None:
        undecided = where & (verdicts == TRAIN)
        verdicts[undecided] = verdict if isinstance(verdict, int) else verdict[undecided]

    decide(rows["rule"] >= 0, QUALITY + rows["rule"])
    decide(rows["evaluation"] >= 0, CONTAMINATED)
    earlier = _near_duplicates(facts, verdicts)
    decide(earlier < np.arange(len(rows)), NEAR_DUPLICATE)
    decide(rows["chosen"] & rows["train_only"], TRAIN_ONLY)
    decide(rows["chosen"], HELDOUT)

    starts = np.cumsum([0, *(len(part.rows) for part in facts.values())])
    selections = {}
    shingles, counts, wholes = [elsewhere.shingles.hashes], [np.diff(elsewhere.shingles.starts)], [elsewhere.wholes]
    for (name, part), start in zip(facts.items(), starts[:-1], strict=True):
        own = verdicts[start : start + len(part.rows)]
        because = {}
        for i in np.flatnonzero(own == CONTAMINATED):
            because[int(i)] = evaluations.file_of_text(int(part.rows["evaluation"][i]))
        for i in np.flatnonzero(own == NEAR_DUPLICATE):
            source = int(np.searchsorted(starts, earlier[start + i], side="right")) - 1
            because[int(i)] = f"document {earlier[start + i] - starts[source]} of {list(facts)[source]}"
        for i in np.flatnonzero(own == HELDOUT_ELSEWHERE):
            because[int(i)] = known[int(start + i)]
        selections[name] = Selection(
            own, part.rows["digest"], because, evaluations.by_file(part.evaluations),
            int(part.rows["bytes"][own == TRAIN].sum()), _ids(part.rows["id"], own),
        )  # fmt: skip
        shingles.append(part.shingles[np.repeat(own == HELDOUT, part.rows["shingles"])])
        counts.append(part.rows["shingles"][own == HELDOUT])
        wholes.append(part.rows["whole"][own == HELDOUT])
    runs = Runs(np.concatenate(shingles), np.cumsum(np.concatenate([np.zeros(1, dtype=np.int64), *counts])))
    return selections, HeldoutText.of(runs, np.concatenate(wholes))


def _held_out_elsewhere(rows: NDArray[np.void], elsewhere: Elsewhere) -> Iterator[tuple[int, str]]:
    """Number and source of every document that is, but for case and white space, held out there."""
    for name, digests in elsewhere.digests.items():
        there = set(map(tuple, digests.tolist()))
        for i in np.flatnonzero(np.isin(rows["digest"][:, 0], digests[:, 0])).tolist():
            if tuple(rows["digest"][i].tolist()) in there:
                yield i, f"held out in {name}"


def _ids(ids: NDArray[np.uint64], verdicts: NDArray[np.uint8]) -> Ids:
    heldout, kept = (int(np.count_nonzero(np.unique(ids[side]))) for side in (verdicts == HELDOUT, verdicts <= HELDOUT))
    return Ids(heldout, kept)


def _near_duplicates(facts: Mapping[str, Facts], verdicts: NDArray[np.uint8]) -> NDArray[np.int64]:
    """int64 ``[documents]``: the first document like each one, among those that nothing else left out."""
    earlier = np.arange(len(verdicts))
    looked = np.repeat([part.bands.size > 0 for part in facts.values()], [len(part.rows) for part in facts.values()])
    places = np.flatnonzero(looked & (verdicts == TRAIN))
    bands = [part.bands for part in facts.values() if part.bands.size]
    if places.size:
        keys = np.concatenate(bands)[np.searchsorted(np.flatnonzero(looked), places)]
        earlier[places] = places[earlier_match(keys)]
    return earlier
