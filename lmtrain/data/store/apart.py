"""Sources of one run that were prepared in different calls: may held-out text of one be trained on in another?

Within a call it may not. Across calls this cannot be computed from the stores' manifests: hashes of training documents
are not kept. A manifest says what its call was told to keep out, and nothing is known of the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache

import xxhash

from lmtrain.data.store.manifest import Manifest

log = logging.getLogger(__name__)

STEP = "kept_apart"


def heldout_digest(manifest: Manifest) -> str:
    """xxh3-128, hex, of the hashes of the held-out documents, in any order."""
    return xxhash.xxh3_128_hexdigest("\n".join(sorted(manifest.heldout.hashes)).encode())


def kept_out(manifest: Manifest) -> list[dict[str, str]]:
    """``source`` and ``heldout`` digest of those whose held-out documents this source was compared with."""
    return [row for step in manifest.pipeline if step.get("step") == STEP for row in step["sources"]]


def may_be_trained_on(manifests: Mapping[str, Manifest]) -> list[tuple[str, str]]:
    """Pairs of names (held out in, trained on in): sources of different calls, the second of which was not compared
    with the first one's held-out documents."""
    digests = {name: heldout_digest(manifest) for name, manifest in manifests.items() if manifest.heldout.hashes}
    known = {name: {row["heldout"] for row in kept_out(manifest)} for name, manifest in manifests.items()}
    return [
        (a, b)
        for a, digest in digests.items()
        for b, manifest in manifests.items()
        if manifest.inputs != manifests[a].inputs and digest not in known[b] and digests.get(b) != digest
    ]


def warn_of_sources_apart(manifests: Mapping[str, Manifest]) -> None:
    """Say, once per process, which held-out text nobody kept out of which source."""
    pairs = may_be_trained_on(manifests)
    if pairs:
        _warn(", ".join(f"{a}'s in {b}" for a, b in pairs[:4]) + (f" and {len(pairs) - 4} more" if pairs[4:] else ""))


@cache
def _warn(pairs: str) -> None:
    log.warning(
        "data.sources: prepared in different calls, so held-out text of one may be trained on in another, unseen (%s); "
        "prepare them in one call, or the later one with decontaminate=FOLDER_OF_THE_EARLIER", pairs,
    )  # fmt: skip
