"""Sources that come during a run: enough for a block, and the content that the schedule names."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lmtrain.data.catalog import Catalog, open_added
from lmtrain.data.config import DataConfig
from lmtrain.data.order.schedule import AddedSource, Event
from lmtrain.data.sources import content_digest
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
    assert open_added(cfg, "more", added).num_blocks > 0
    shutil.rmtree(folder)
    shutil.copytree(prepared / "docs", folder)
    with pytest.raises(DataError, match=r"more: the content differs from that of source more in the schedule"):
        open_added(cfg, "more", added)
