"""Sources that come during a run: enough for a block, and the content that the schedule names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from lmtrain.data.blocks.function import document_function
from lmtrain.data.blocks.synthetic import NUM_BLOCKS
from lmtrain.data.catalog import Arrival, Catalog, added_source
from lmtrain.data.config import DataConfig
from lmtrain.data.order.schedule import AddedSource, Event
from lmtrain.data.sources import content_digest
from lmtrain.data.store.manifest import file_entries
from lmtrain.data.store.store import StoreWriter
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import DataError


def test_an_added_source_needs_a_block_even_without_a_share(
    data_config: Callable[..., DataConfig], tmp_path: Path
) -> None:
    cfg = data_config()
    tokenizer = Tokenizer.load(cfg.tokenizer)
    with StoreWriter(tmp_path / "tiny", tokenizer.vocab_size) as writer:
        writer.add(np.arange(30))
    added = AddedSource(str(tmp_path / "tiny"), content_digest(str(tmp_path / "tiny")))
    catalog = Catalog(cfg, tokenizer, 0)
    with pytest.raises(DataError, match=r"data.sources.tiny: has less than one block, which needs 65 tokens"):
        catalog.add([Event(9, "user", "", sources={"tiny": added})])
    assert list(catalog.blocks) == ["code", "docs", "rare"] and not catalog.added


def test_other_content_is_refused_where_it_is_read(
    data_config: Callable[..., DataConfig], prepared: Path, tmp_path: Path
) -> None:
    cfg, folder = data_config(), tmp_path / "more"
    shutil.copytree(prepared / "code", folder)
    added = AddedSource(str(folder), content_digest(str(folder)))
    arrival = Arrival("more", added, 0)
    assert arrival.blocks(cfg).num_blocks > 0
    shutil.rmtree(folder)
    shutil.copytree(prepared / "docs", folder)
    with pytest.raises(DataError, match=r"more: the content differs from that of source more in the schedule"):
        arrival.blocks(cfg)


def test_the_digest_of_a_prepared_source_covers_its_tokens(
    data_config: Callable[..., DataConfig], prepared: Path, tmp_path: Path
) -> None:
    """Through the checksums in its manifest: other tokens have another manifest, or are refused when they are read."""
    cfg, folder = data_config(), tmp_path / "more"
    shutil.copytree(prepared / "code", folder)
    added = added_source("more", str(folder), {})
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert {entry["path"] for entry in manifest["files"]} >= {"train.bin", "train.idx", "heldout.bin", "heldout.idx"}
    data = bytearray((folder / "train.bin").read_bytes())
    data[100] ^= 1
    (folder / "train.bin").write_bytes(data)
    with pytest.raises(DataError, match=r"train\.bin"):
        Arrival("more", added, 0).blocks(cfg).block(0)
    entries = [*file_entries(folder, "train"), *file_entries(folder, "heldout")]
    manifest["files"] = [asdict(entry) for entry in entries]
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(DataError, match="the content differs from that of source more"):
        Arrival("more", added, 0).blocks(cfg)


CHANGE = {"by": 0, "calls": 0}


@document_function
def changing(seed: int, index: int) -> list[int]:
    return [index % 50, 1 + CHANGE["by"]]


@document_function
def impure(seed: int, index: int) -> list[int]:
    CHANGE["calls"] += 1
    return [1, CHANGE["calls"] % 100]


def test_a_function_is_held_to_what_it_made(
    data_config: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = data_config()
    catalog = Catalog(cfg, Tokenizer.load(cfg.tokenizer), 7)
    added = added_source("made", f"{__name__}:changing", {})
    event = Event(9, "user", "", sources={"made": added})
    assert catalog.add([event]) == {"made": NUM_BLOCKS} and "made" not in catalog.stored
    arrival = catalog.added["made"]
    assert arrival.blocks(cfg) == catalog.blocks["made"] and arrival.seed == 7
    monkeypatch.setitem(CHANGE, "by", 1)
    with pytest.raises(DataError, match=r"changing\(\): makes other documents than those of source made"):
        arrival.blocks(cfg)
    other = added_source("impure", f"{__name__}:impure", {})
    with pytest.raises(DataError, match="not a pure function of its seed and index cannot be a source"):
        catalog.check([Event(9, "user", "", sources={"impure": other})])
    monkeypatch.setitem(CHANGE, "by", 10**6)
    large = added_source("large", f"{__name__}:changing", {})
    with pytest.raises(DataError, match="document 0: token id 1000001 is outside the vocabulary of 320"):
        catalog.check([Event(9, "user", "", sources={"large": large})])
