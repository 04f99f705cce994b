"""Packed blocks: every token once, every target once, nothing shared between documents, and the plan kept on disk."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.data.batch import Batch, make_batch
from lmtrain.data.blocks import pack_plan
from lmtrain.data.blocks.best_fit import best_fit, cut
from lmtrain.data.blocks.pack_plan import PackPlan, write_plan
from lmtrain.data.blocks.packing import BestFitBlocks, UnpackedBlocks, plan_digests
from lmtrain.data.config import DataConfig, SourceConfig
from lmtrain.data.loader import Loader
from lmtrain.data.order.schedule import ScheduleLog
from lmtrain.data.store.store import Store, StoreWriter
from lmtrain.errors import DataError
from lmtrain.ops.cross_entropy import IGNORE


def store_of(prefix: Path, lengths: list[int]) -> Store:
    """Token t of the store is t: where a token of a block comes from is seen on it."""
    with StoreWriter(prefix, max(sum(lengths), 1)) as writer:
        writer.extend(np.arange(sum(lengths)), np.array(lengths, dtype=np.int64))
    return Store(prefix)


def one_by_one(sizes: list[int], capacity: int) -> list[int]:
    """Room left in each bin, sorted: best fit decreasing as it is defined."""
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append(min(fitting, default=capacity) - size)
    return sorted(rooms)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 30).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=60))))
def test_best_fit_is_best_fit(case: tuple[int, list[int]]) -> None:
    capacity, sizes = case
    bins = best_fit(np.array(sizes, dtype=np.int32), capacity)
    load = np.bincount(bins, weights=sizes, minlength=0) if sizes else np.zeros(0)
    assert sorted((capacity - load).astype(int).tolist()) == one_by_one(sizes, capacity)
    assert (load > 0).all()


def test_a_worked_case(tmp_path: Path) -> None:
    """L = 4, five columns: 7 tokens are cut into 5 + 3 that share a token; 4 and 1, 3 and 2 fill the others."""
    store = store_of(tmp_path / "x", [3, 7, 0, 1, 2, 4])
    assert [part.tolist() for part in cut(store, 4)] == [[0, 3, 7, 10, 11, 13], [3, 5, 3, 1, 2, 4]]
    header = write_plan(store, 4)
    assert (header.num_blocks, header.num_pieces, header.num_padding) == (4, 6, 2)
    blocks = BestFitBlocks(store, 4)
    assert [blocks.block(p).tokens.tolist() for p in range(4)] == [
        [3, 4, 5, 6, 7], [13, 14, 15, 16, 10], [0, 1, 2, 11, 12], [7, 8, 9, 0, 0],
    ]  # fmt: skip
    assert blocks.block(0).real is None and blocks.block(1).ids.tolist() == [0, 0, 0, 0, 1]
    last = blocks.block(3)
    assert last.ids.tolist() == [0, 0, 0, 1, 1] and last.real is not None
    assert last.real.tolist() == [True, True, True, False, False]
    assert "token 2 of document 5" in str(blocks.out_of_range(1, 2, 9))
    assert "token 5 of document 1" in str(blocks.out_of_range(3, 1, 9))
    unpacked = UnpackedBlocks(store, 4)
    assert unpacked.num_blocks == 6 and unpacked.block(2).tokens.tolist() == [7, 8, 9, 0, 0]
    assert "token 0 of document 3" in str(unpacked.out_of_range(3, 0, 9))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 8), st.integers(0, 90)), max_size=30), st.integers(1, 20))
def test_every_token_and_every_target_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], length: int
) -> None:
    store = store_of(tmp_path_factory.mktemp("pack") / "x", lengths)
    document = np.repeat(np.arange(len(lengths)), lengths)
    offset = np.arange(store.num_tokens) - store.document_starts[document]
    # A cut is in both pieces: the last target of one, the first input of the next.
    shared = (offset > 0) & (offset % length == 0) & (offset < np.array(lengths, dtype=int)[document] - 1)
    write_plan(store, length)
    for kind in (BestFitBlocks, UnpackedBlocks):
        blocks = pickle.loads(pickle.dumps(kind(store, length)))
        inputs, targets, read = (np.zeros(store.num_tokens, dtype=int) for _ in range(3))
        for p in range(blocks.num_blocks):
            block = blocks.block(p)
            assert block.tokens.shape == block.ids.shape == (length + 1,) and block.tokens.dtype == np.int32
            real = np.ones(length + 1, dtype=bool) if block.real is None else block.real
            used = int(real.sum())
            assert used > 0 and real[:used].all() and not block.tokens[used:].any()
            assert (
                (np.diff(block.ids) >= 0).all() and block.ids[0] == 0 and not (block.ids[used:] == block.ids[0]).any()
            )
            tokens, ids = block.tokens[:used], block.ids[:used]
            for number in range(int(ids[-1]) + 1):  # a piece is a run of one document
                piece = tokens[ids == number]
                assert (np.diff(piece) == 1).all() and len(set(document[piece])) == 1
                read[piece] += 1
            padding = None if block.real is None else torch.from_numpy(~real)[None]
            source = torch.zeros(1, length, dtype=torch.int32)
            row = torch.from_numpy(block.tokens)[None], torch.from_numpy(block.ids)[None]
            batch = make_batch(*row, source=source, block=torch.tensor([p]), padding=padding)
            kept = (batch.labels != IGNORE)[0].numpy()
            assert not kept[used:].any()
            assert (batch.labels[0].numpy()[kept] == batch.tokens[0].numpy()[kept] + 1).all()
            np.add.at(targets, batch.labels[0].numpy()[kept], 1)
            np.add.at(inputs, batch.tokens[0].numpy()[kept], 1)
        assert (targets == (offset > 0)).all()
        assert (inputs <= 1).all()
        assert (read == 1 + shared).all()


def test_a_plan_is_deterministic_and_written_once(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(0, 60, 500).tolist()
    store = store_of(tmp_path / "x", lengths)
    header = write_plan(store, 32)
    before = {path.name: path.read_bytes() for path in (tmp_path / "x.pack-32").iterdir()}
    assert sorted(before) == ["blocks.npy", "lengths.npy", "plan.json", "starts.npy"]
    assert write_plan(store, 32) == header
    (tmp_path / "x.pack-32.partial").mkdir()  # of a call that was killed
    shutil.rmtree(tmp_path / "x.pack-32")
    write_plan(store, 32)
    assert {path.name: path.read_bytes() for path in (tmp_path / "x.pack-32").iterdir()} == before
    assert header.num_padding / (header.num_blocks * 33) < 0.01
    digest = PackPlan.open(store, 32).digest
    assert plan_digests({"x": BestFitBlocks(store, 32), "y": UnpackedBlocks(store, 32)}) == {"x": digest}
    other = store_of(tmp_path / "y", [*lengths[1:], lengths[0]])
    write_plan(other, 32)
    assert PackPlan.open(other, 32).digest != digest
    for path in (*tmp_path.glob("y.[bi]*"), *(tmp_path / "y.pack-32").iterdir(), tmp_path / "y.pack-32"):
        path.rmdir() if path.is_dir() else path.unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx", "x.pack-32"]


def test_plans_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    store = store_of(tmp_path / "x", [3, 7, 2])
    with pytest.raises(DataError, match=r"x.pack-4: no plan for blocks of 4 tokens; make it: .* pack .*/x length=4"):
        BestFitBlocks(store, 4)
    write_plan(store, 4)
    other = store_of(tmp_path / "x", [3, 6, 3])
    for use in (BestFitBlocks, write_plan):
        with pytest.raises(DataError, match=r"x.pack-4: a plan of another store or length; remove the folder, then: "):
            use(other, 4)
    store = store_of(tmp_path / "x", [3, 7, 2])
    header = tmp_path / "x.pack-4" / "plan.json"
    row = json.loads(header.read_text(encoding="utf-8"))
    for change, message in [
        ({"format_version": 2}, "format_version 2, this version reads 1"),
        ({"surprise": 1}, "not a plan: .*surprise"),
        ({"digests": {}}, r"blocks.npy: not readable: 'blocks'"),
        (
            {"algorithm": "first_fit/3"},
            r"x.pack-4: made by first_fit/3, .* plans by best_fit_.*; .* pack .*/x length=4",
        ),
        ({"num_pieces": 9}, r"starts.npy: expected 9 x <i8, found"),
    ]:
        header.write_text(json.dumps({**row, **change}), encoding="utf-8")
        with pytest.raises(DataError, match=message):
            BestFitBlocks(store, 4)
    header.write_text(json.dumps(row), encoding="utf-8")
    for name in ("blocks", "starts", "lengths"):
        path = tmp_path / "x.pack-4" / f"{name}.npy"
        whole = bytearray(path.read_bytes())
        for at in (8, len(whole) - 3):
            whole[at] ^= 1
            path.write_bytes(whole)
            with pytest.raises(DataError, match=rf"{name}.npy: expected xxh3-128"):
                BestFitBlocks(store, 4)
            whole[at] ^= 1
        path.write_bytes(whole[:-1])
        with pytest.raises(DataError, match=rf"{name}.npy: "):
            BestFitBlocks(store, 4)
        path.write_bytes(whole)
    PackPlan.open(store, 4).verify()


def test_plan_v1(tmp_path: Path) -> None:
    """The stored plan that later versions must read."""
    stored = Path(__file__).parent / "fixtures" / "pack-v1"
    store = store_of(tmp_path / "x", [3, 7, 0, 1, 2, 4])
    shutil.copytree(stored, pack_plan.plan_folder(store, 4))
    blocks = BestFitBlocks(store, 4)
    assert blocks.num_blocks == 4 and blocks.block(2).tokens.tolist() == [0, 1, 2, 11, 12]


def test_a_run_reads_packed_blocks(prepared: Path, tmp_path: Path) -> None:
    """One epoch through the loader: every token but the first of its document is a label once, on any ranks."""
    shutil.copytree(prepared, tmp_path / "out")
    cfg = DataConfig(
        str(tmp_path / "out" / "tokenizer.json"), 32, {"code": SourceConfig(str(tmp_path / "out" / "code"))},
        block_tokens=64, packing="best_fit",
    )  # fmt: skip
    store = Store(tmp_path / "out" / "code" / "train")
    with pytest.raises(DataError, match=r"train.pack-64: no plan .*; make it: .* pack \S+/out/code length=64"):
        read(cfg, 1)
    write_plan(store, 64)
    starts = store.document_starts
    expected = np.delete(store.tokens(0, store.num_tokens), starts[:-1][np.diff(starts) > 0])
    for kind in ("best_fit", "unpacked"):
        batches, hashes = read(replace(cfg, packing=kind), 1)
        labels = torch.cat([batch.labels[batch.labels != IGNORE] for batch in batches])
        assert np.array_equal(np.sort(labels.numpy()), np.sort(expected))
        on_two = read(replace(cfg, packing=kind), 2)[1]
        assert on_two == hashes[: len(on_two)] and len(hashes) - len(on_two) < 2
    with pytest.raises(DataError, match=r"train.pack-32: no plan"):
        read(replace(cfg, block_tokens=None), 1)


def read(cfg: DataConfig, dp_size: int) -> tuple[list[Batch], list[str]]:
    """The batches of one epoch, a block per step and rank, and the digests of the blocks; whole steps only."""
    log = ScheduleLog.fixed({"code": 1})
    loaders = [
        Loader(cfg, seed=3, batch_tokens=cfg.block_length * dp_size, microbatch=cfg.block_length // cfg.seq_len,
               dp_rank=rank, dp_size=dp_size, log=log)
        for rank in range(dp_size)
    ]  # fmt: skip
    steps = loaders[0].tokens_available["code"] // cfg.block_length // dp_size
    rows = list(zip(*(loader.steps(0, steps) for loader in loaders), strict=True))
    hashes = [digest for row in rows for digest in torch.stack([step.hashes for step in row]).sum(0).tolist()]
    return [batch for row in rows for step in row for batch in step.micro_batches], hashes
