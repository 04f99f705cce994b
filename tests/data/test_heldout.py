"""Held-out batches: every token a target once for any number of ranks, and the bytes they stand for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lmtrain.data.batch import IGNORE
from lmtrain.data.catalog import Catalog, added_source
from lmtrain.data.config import DataConfig, SourceConfig
from lmtrain.data.heldout import Heldout
from lmtrain.data.order.schedule import Event
from lmtrain.data.store.manifest import Manifest
from lmtrain.data.store.store import Store
from lmtrain.data.tokenizer import Tokenizer

Config = Callable[..., DataConfig]


@pytest.mark.parametrize(("ranks", "rows"), [(1, 1), (1, 7), (2, 3), (3, 4), (8, 2)])
def test_every_token_is_a_target_once(prepared: Path, data_config: Config, ranks: int, rows: int) -> None:
    heldout = Heldout(data_config())
    for number, name in enumerate(heldout.source_names):
        store = Store(prepared / name / "heldout")
        targets: Counter[int] = Counter()
        lengths = set()
        for rank in range(ranks):
            batches = list(heldout.batches(name, rows, rank, ranks))
            lengths.add(len(batches))
            for batch in batches:
                assert batch.tokens.shape == (rows, 64) and (batch.docs.before == 0).all()
                assert (batch.source == number).all()
                for row, block in enumerate(batch.block.tolist()):
                    columns = np.flatnonzero(batch.labels[row].numpy() != IGNORE)
                    assert block >= 0 or not columns.size
                    for column in columns:
                        position = block * 64 + int(column) + 1
                        targets[position] += 1
                        assert int(batch.labels[row, column]) == store.tokens(position, 1)[0]
        assert len(lengths) == 1
        firsts = set(store.document_starts[:-1].tolist())
        assert targets == Counter({p: 1 for p in range(store.num_tokens) if p not in firsts})
        assert heldout.num_tokens[name] == store.num_tokens and heldout.num_unpredicted[name] == len(firsts)


def test_padding_is_another_document(data_config: Config) -> None:
    heldout = Heldout(data_config())
    name = next(name for name in heldout.source_names if (heldout.num_tokens[name] - 1) % 64)
    last = list(heldout.batches(name, 1))[-1]
    real = (heldout.num_tokens[name] - 1) % 64
    ids = last.docs.ids[0]
    assert (last.labels[0, real:] == IGNORE).all() and (ids[real + 1 :] > ids[real]).all()


def test_bytes_of_text(prepared: Path, data_config: Config) -> None:
    tokenizer = Tokenizer.load(prepared / "tokenizer.json")
    heldout = Heldout(data_config())
    assert heldout.vocab_size == tokenizer.vocab_size and heldout.source_names
    for name in heldout.source_names:
        store, manifest = Store(prepared / name / "heldout"), Manifest.read(prepared / name)
        documents = [tokenizer.decode(store.document(j)[:-1]) for j in range(store.num_documents)]
        assert manifest.heldout.bytes == [len(text.encode()) for text in documents]
        assert heldout.bytes_of_text[name] == manifest.bytes_of_text["heldout"] == sum(manifest.heldout.bytes)


@pytest.mark.parametrize("max_tokens", [1, 63, 64, 65, 500, 10**9])
def test_only_the_first_tokens(prepared: Path, data_config: Config, max_tokens: int) -> None:
    tokenizer = Tokenizer.load(prepared / "tokenizer.json")
    heldout = Heldout(data_config(), max_tokens)
    for name in heldout.source_names:
        store = Store(prepared / name / "heldout")
        used = heldout.num_tokens[name]
        assert used == min(max_tokens, store.num_tokens)
        ids = [i for i in store.tokens(0, used).tolist() if i != tokenizer.eod_id]
        assert heldout.bytes_of_text[name] == len(tokenizer.decode(ids).encode())
        targets = sum(batch.num_targets for batch in heldout.batches(name, 2))
        assert targets == used - heldout.num_unpredicted[name]


def test_what_comes_during_a_run_is_scored_beside_the_total(
    prepared: Path, data_config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = data_config({"code": 1.0, "docs": 1.0})
    catalog = Catalog(cfg, Tokenizer.load(cfg.tokenizer), 0)
    heldout, whole = Heldout(cfg, 500), Heldout(data_config(), 500)
    heldout.follow(catalog)
    assert heldout.source_names == ["code", "docs"]
    places = {"odd": "lmtrain.eval.probes.parity:parity", "rare": str(prepared / "rare")}
    for name, where in places.items():
        added = added_source(name, where, {} if name == "rare" else {"bits": 9})
        catalog.add([Event(5, "user", "", sources={name: added})])
    for _ in range(2):
        heldout.follow(catalog)
    assert heldout.source_names == ["code", "docs", "rare"]
    assert [record.message for record in caplog.records] == [
        "source odd has no held-out documents: its loss on unseen text is not measured"
    ]
    for part in ("num_tokens", "num_unpredicted", "bytes_of_text"):
        assert getattr(heldout, part) == getattr(whole, part)
    ours, theirs = list(heldout.batches("rare", 3)), list(whole.batches("rare", 3))
    assert all((a.tokens == b.tokens).all() for a, b in zip(ours, theirs, strict=True))
    assert {int(id) for batch in ours for id in batch.source.unique()} == {list(catalog.blocks).index("rare")} == {3}
    nats = {"code": 70.0, "docs": 80.0, "rare": 90.0}
    values = heldout.bits_per_byte(nats)
    assert values["heldout_bpb"] == Heldout(cfg, 500).bits_per_byte(nats)["heldout_bpb"]
    assert values["heldout_bpb.rare"] == whole.bits_per_byte(nats)["heldout_bpb.rare"]


def test_a_total_of_what_came_where_nothing_else_is_held_out(prepared: Path, data_config: Config) -> None:
    made = SourceConfig(synthetic="lmtrain.eval.probes.parity:parity", arguments={"bits": 9})
    cfg = replace(data_config(), sources={"odd": made})
    catalog, heldout = Catalog(cfg, Tokenizer.load(cfg.tokenizer), 0), Heldout(cfg)
    assert not heldout.source_names
    catalog.add([Event(5, "user", "", sources={"rare": added_source("rare", str(prepared / "rare"), {})})])
    heldout.follow(catalog)
    values = heldout.bits_per_byte({"rare": 90.0})
    assert values["heldout_bpb"] == values["heldout_bpb.rare"] > 0
