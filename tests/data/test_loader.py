"""The loader: the same tokens for any number of ranks and workers, exact shares, clean borders, clear refusals."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmtrain.data.batch import IGNORE
from lmtrain.data.blocks.function import document_function
from lmtrain.data.config import DataConfig, SourceConfig
from lmtrain.data.loader import Loader
from lmtrain.data.order.schedule import AddedSource, Event, ScheduleLog
from lmtrain.data.policies.epochs import check_epochs
from lmtrain.data.reader import StepData, token_hash
from lmtrain.data.sources import check_sources, content_digest
from lmtrain.data.store.store import Store, StoreWriter
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import DataError, UsageError

Config = Callable[..., DataConfig]


def loader(cfg: DataConfig, events: Sequence[Event] = (), **changes: Any) -> Loader:
    weights = {name: source.weight for name, source in cfg.sources.items()}
    log = ScheduleLog((*ScheduleLog.fixed(weights).events, *events))
    return Loader(
        cfg, log=log, **{"seed": 5, "batch_tokens": 1024, "microbatch": 1, "dp_rank": 0, "dp_size": 1, **changes}
    )


def hashes(
    cfg: DataConfig, ranks: int, steps: range, growth: Mapping[int, Event] | None = None, **changes: Any
) -> list[str]:
    """Token hash per step, from all ranks together. growth: events that the ranks hear of while they hold a step."""
    loaders = [loader(cfg, dp_rank=rank, dp_size=ranks, **changes) for rank in range(ranks)]
    readers = [each.steps(steps.start, steps.stop) for each in loaders]
    found = []
    for row in zip(*readers, strict=True):
        found.append(token_hash(torch.stack([data.hashes for data in row]).sum(dim=0)))
        for each in loaders:
            each.extend([growth[row[0].step]] if growth and row[0].step in growth else [])
    return found


def test_any_number_of_ranks_and_any_microbatch_read_the_same(data_config: Config) -> None:
    cfg = data_config()
    expected = hashes(cfg, 1, range(0, 12))
    assert len(set(expected)) == 12
    for ranks, microbatch in ((1, 4), (2, 1), (2, 8), (8, 2)):
        assert hashes(cfg, ranks, range(0, 12), microbatch=microbatch) == expected
    assert hashes(cfg, 2, range(5, 9)) == expected[5:9]  # a resumed run


@pytest.fixture(scope="session")
def news(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> AddedSource:
    """A source that is not in any recipe."""
    vocab = Tokenizer.load(prepared / "tokenizer.json").vocab_size
    prefix = tmp_path_factory.mktemp("news") / "news"
    with StoreWriter(prefix, vocab) as writer:
        for n in range(40):
            writer.add(np.random.default_rng(n).integers(0, vocab, 200))
    return AddedSource(str(prefix), content_digest(str(prefix)))


def growth_of(news: AddedSource, ramp: bool) -> dict[int, Event]:
    """Step -> the event all ranks hear of while they hold it; two workers read five steps ahead."""
    last = 16 if ramp else 64  # blocks of a step
    return {
        0: Event(6 * last, "user", "", {"code": 1, "docs": 5}),
        1: Event(6 * last + 3, "user", "", skip=70),
        3: Event(9 * last, "policy", "", {"news": 2, "docs": 1}, 5, {"news": news}),
        5: Event(11 * last + 1, "user", "", {"news": 1, "rare": 1, "code": 1}),
    }


def test_the_log_grows_and_any_ranks_and_workers_read_the_same(data_config: Config, news: AddedSource) -> None:
    cfg = data_config()
    growth = growth_of(news, ramp=False)
    sizes = {"batch_tokens": 64 * 64, "workers": 0}
    expected = hashes(cfg, 1, range(14), growth, **sizes)
    assert len(set(expected)) == 14
    for ranks in (2, 64):
        assert hashes(cfg, ranks, range(14), growth, **sizes) == expected
    assert hashes(cfg, 1, range(14), growth, **(sizes | {"workers": 2})) == expected
    for first in (0, 7, 13):  # resumed, with all events there from the start
        assert hashes(cfg, 4, range(first, 14), events=list(growth.values()), **sizes) == expected[first:]


def test_seven_ranks_a_ramp_and_shorter_rows(data_config: Config, news: AddedSource) -> None:
    ramp = [(0, 14 * 64), (5000, 28 * 64)]
    cfg = data_config(seq_lens=[(0, 16), (4000, 32), (9000, 64)])
    events = list(growth_of(news, ramp=True).values())
    sizes: dict[str, Any] = {"batch_tokens": 28 * 64, "batch_ramp": ramp, "events": events}
    expected = hashes(data_config(), 1, range(12), **sizes)
    assert hashes(cfg, 7, range(12), **sizes) == expected and hashes(cfg, 1, range(5, 12), **sizes) == expected[5:]
    shapes, blocks = [], []
    for data in loader(cfg, microbatch=2, **sizes).steps(0, 12):
        shapes.append(data.micro_batches[0].tokens.shape)
        blocks += [int(k) for batch in data.micro_batches for k in dict.fromkeys(batch.block.tolist())]
    assert shapes == [(8, 16)] * 5 + [(4, 32)] * 4 + [(2, 64)] * 3
    assert blocks == list(range(6 * 14 + 6 * 28))
    with pytest.raises(UsageError, match=r"train.batch_ramp 896 is not a multiple of 1024 .*; nearest: 1024"):
        loader(cfg, dp_size=16, **(sizes | {"batch_tokens": 2048, "batch_ramp": [(0, 896), (9, 2048)]}))


def test_an_event_for_what_is_being_read_is_refused(data_config: Config, news: AddedSource) -> None:
    reader = loader(data_config(), workers=1)
    assert reader.lead == 3
    steps = reader.steps(0, 9)
    try:
        next(steps)
        soon = reader.schedule.first_block(reader.lead)
        for refuse in (reader.admit, lambda event, stop: reader.extend([event])):
            with pytest.raises(UsageError, match=rf"at block {soon - 1} comes too late: blocks up to {soon} are being"):
                refuse(Event(soon - 1, "user", "", {"code": 1}), None)
        before = reader.sampler.get(np.arange(500))
        reader.admit(Event(soon, "user", "", {"news": 1}, 7, {"news": news}), None)
        assert reader.source_names == ["code", "docs", "rare"]
        assert all(np.array_equal(a, b) for a, b in zip(reader.sampler.get(np.arange(500)), before, strict=True))
        reader.extend([Event(soon, "user", "", {"news": 1}, 7, {"news": news})])
        # the two steps that were planned already, then the first that knows
        read = [int(batch.source[0, 0]) for _ in range(3) for batch in next(steps).micro_batches]
        assert 3 not in read[:32] and set(read[32:]) == {3}
    finally:
        steps.close()  # type: ignore[attr-defined]


def test_sources_that_cannot_be_added(data_config: Config, news: AddedSource) -> None:
    reader = loader(data_config(max_epochs=4))
    for event, error, message in [
        (Event(99, "user", "", sources={"code": news}), UsageError, "adds source code, which there is"),
        (Event(99, "user", "", sources={"n": replace(news, digest="00")}), DataError, r"news: the content differs"),
        (Event(99, "user", "", sources={"n": replace(news, path="gone")}), DataError, r"gone.idx: No such file"),
        (Event(99, "user", "", {"nws": 1}, 0, {"news": news}), UsageError, r"names source nws.*did you mean news\?"),
        (Event(99, "user", "", {"news": 1}, 0, {"news": news}), UsageError, r"news: the run needs .* is 4\)"),
    ]:
        with pytest.raises(error, match=message):
            reader.admit(event, 100)
        assert reader.source_names == ["code", "docs", "rare"] and reader.log_length == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(data_config: Config, workers: int) -> None:
    cfg = data_config()
    ours = list(loader(cfg, workers=workers, dp_size=2, dp_rank=1).steps(3, 8))
    for data, plain in zip(ours, loader(cfg, dp_size=2, dp_rank=1).steps(3, 8), strict=True):
        assert data.step == plain.step and torch.equal(data.hashes, plain.hashes)
        for a, b in zip(data.micro_batches, plain.micro_batches, strict=True):
            for name in ("tokens", "labels", "positions", "source", "block", "run"):
                assert torch.equal(getattr(a, name), getattr(b, name))


def test_ranks_take_their_slots(data_config: Config) -> None:
    taken: dict[int, tuple[int, int]] = {}
    for rank in range(2):
        for data in loader(data_config(), batch_tokens=64 * 12, microbatch=3, dp_rank=rank, dp_size=2).steps(4, 5):
            for i, batch in enumerate(data.micro_batches):
                assert batch.tokens.shape == (3, 64)
                taken |= {int(k): (rank, i) for k in batch.block}
    assert taken == {48 + s: ((s // 3) % 2, s // 6) for s in range(12)}


def test_rows_are_the_windows_of_the_store(data_config: Config) -> None:
    cfg = data_config()
    reader = loader(cfg)
    stores = [Store(Path(source.path) / "train") for source in cfg.sources.values()]
    for data in reader.steps(0, 20):
        for batch in data.micro_batches:
            source, window, _ = reader.sampler.get(batch.block.numpy())
            tokens = stores[source[0]].window(int(window[0]), 64)
            assert batch.tokens[0].tolist() == tokens[:-1].tolist() and (batch.source == int(source[0])).all()
            start = int(window[0]) * 64
            borders = np.isin(np.arange(start + 1, start + 65), stores[source[0]].document_starts)
            assert batch.labels[0].tolist() == np.where(borders, IGNORE, tokens[1:]).tolist()
            assert batch.num_targets == int((~borders).sum()) and batch.log_length == 1
            assert batch.docs.before.tolist() == [0] and batch.positions[0, 0] == 0
            starts = np.append(0, np.flatnonzero(borders[:-1]) + 1)
            assert batch.positions[0].tolist() == [t - int(starts[starts <= t].max()) for t in range(64)]


def test_blocks_of_several_rows(data_config: Config) -> None:
    long, short = data_config(), data_config(seq_len=16, block_tokens=64)
    assert hashes(long, 1, range(6)) == hashes(short, 1, range(6), microbatch=4)
    for a, b in zip(loader(long).steps(0, 6), loader(short, microbatch=4).steps(0, 6), strict=True):
        for whole, cut in zip(a.micro_batches, b.micro_batches, strict=True):
            assert torch.equal(whole.tokens.reshape(4, 16), cut.tokens)
            assert torch.equal(whole.labels.reshape(4, 16), cut.labels)
            assert (cut.block == whole.block).all() and (cut.docs.before == 0).all()


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.floats(0.01, 10), min_size=3, max_size=3), st.integers(0, 2**70))
def test_every_prefix_holds_each_share_to_within_a_block(data_config: Config, weights: list[float], seed: int) -> None:
    cfg = data_config(dict(zip(("code", "docs", "rare"), weights, strict=True)))
    source = torch.cat([b.source[:, 0] for d in loader(cfg, seed=seed).steps(0, 8) for b in d.micro_batches]).numpy()
    for i, weight in enumerate(weights):
        share = weight / sum(weights)
        assert np.abs(np.cumsum(source == i) - np.arange(1, len(source) + 1) * share).max() < 1


def test_a_new_source_keeps_the_order_of_the_others(data_config: Config) -> None:
    def blocks(weights: dict[str, float]) -> list[bytes]:
        data = [b for d in loader(data_config(weights)).steps(0, 10) for b in d.micro_batches]
        code = list(weights).index("code")
        return [b.tokens.numpy().tobytes() for b in data if int(b.source[0, 0]) == code]

    before, after = blocks({"code": 1.0, "docs": 1.0}), blocks({"rare": 1.0, "docs": 1.0, "code": 1.0})
    assert before[: len(after)] == after and len(after) > 20


@document_function
def numbers(seed: int, index: int, *, most: int) -> list[int]:
    """A synthetic source: a document of 2 to ``most`` tokens."""
    return [index % 7, *range(1, 2 + (seed + index) % (most - 1))]


def test_packed_and_synthetic_sources_are_sources_like_others(data_config: Config) -> None:
    plain = data_config({"docs": 1.0, "code": 1.0}, packing="unpacked")
    made = SourceConfig(weight=2.0, synthetic=f"{__name__}:numbers", arguments={"most": 9})
    cfg = replace(plain, sources={"made": made, **plain.sources})
    sizes = {"batch_tokens": 64 * 32}
    expected = hashes(cfg, 1, range(3), **sizes)
    assert hashes(cfg, 4, range(3), **sizes) == expected == hashes(cfg, 1, range(3), workers=1, **sizes)
    reader = loader(cfg, microbatch=32, **sizes)
    assert reader.source_names == ["made", "docs", "code"]
    for data in reader.steps(0, 2):
        (batch,) = data.micro_batches
        source, window, _ = reader.sampler.get(batch.block.numpy())
        for row in range(32):
            block = reader.catalog.blocks[reader.source_names[source[row]]].block(int(window[row]))
            real = np.ones(65, dtype=bool) if block.real is None else block.real
            labels = np.where((block.ids[1:] == block.ids[:-1]) & real[1:], block.tokens[1:], IGNORE)
            assert batch.labels[row].tolist() == labels.tolist()
            assert batch.tokens[row].tolist() == block.tokens[:64].tolist()
            assert (labels != IGNORE).sum() == real.sum() - 1 if source[row] else len(np.unique(block.ids)) > 6


def test_lengths_that_do_not_divide_name_the_nearest(data_config: Config) -> None:
    for changes, sizes, message in [
        ({}, {"batch_tokens": 1000}, r"train.batch_tokens 1000 is not a multiple of 64 .*; nearest: 1024"),
        ({}, {"microbatch": 4, "dp_size": 8}, r"of 2048 = 4 rows \(microbatch\) x 64 tokens x 8 .* 2048"),
        ({"block_tokens": 256}, {"microbatch": 6}, r"microbatch 6 is not a multiple of the 4 rows of .* nearest: 8"),
    ]:
        with pytest.raises(UsageError, match=message):
            loader(data_config(**changes), **sizes)


def test_epochs_are_limited(data_config: Config) -> None:
    reader = loader(data_config(max_epochs=9))
    often = next(steps for steps in range(1, 1000) if max(epochs(reader, steps)) > 4)
    warned = [check_epochs(reader.tokens_read(steps), reader.tokens_available, 9) for steps in (1, often - 1, often)]
    assert warned[:2] == [[], []] and any("is read 4." in warning for warning in warned[2])
    event = Event(16, "user", "", skip=1)
    reader.admit(event, often)
    with pytest.raises(UsageError, match=r"needs [\d,]+ tokens, it has [\d,]+ \([\d.]+ epochs, .* is 9\)"):
        reader.admit(event, 1000)


def epochs(reader: Loader, steps: int) -> list[float]:
    return [tokens / reader.tokens_available[name] for name, tokens in reader.tokens_read(steps).items()]


def copy_of(prepared: Path, tmp_path: Path, cfg: DataConfig) -> DataConfig:
    shutil.copytree(prepared, tmp_path / "out")
    sources = {name: SourceConfig(str(tmp_path / "out" / name), source.weight) for name, source in cfg.sources.items()}
    return DataConfig(str(tmp_path / "out" / "tokenizer.json"), cfg.seq_len, sources, max_epochs=1e9)


def test_missing_and_damaged_data(prepared: Path, tmp_path: Path, data_config: Config) -> None:
    cfg = copy_of(prepared, tmp_path, data_config())
    assert check_sources(cfg) == []
    folder = tmp_path / "out" / "code"
    index = folder / "train.idx"
    for damage, message in [
        (lambda: (folder / "train.bin").write_bytes(b"\0" * 10), r"train.bin: expected [\d,]+ bytes .*, found 10"),
        (lambda: index.write_bytes(b"\0" * 50), r"train.idx: differs from the manifest.*prepare.py verify"),
        (index.unlink, r"code.path: .*train.idx is missing.*prepare.py out=.*sources.code.path="),
        (lambda: shutil.rmtree(folder), r"data.sources.code.path: .*code.idx is missing"),
        (lambda: (tmp_path / "out" / "codes.idx").touch(), r"did you mean codes\?"),
    ]:
        damage()
        with pytest.raises(DataError, match=message) as error:
            loader(cfg)
        assert check_sources(cfg) == [str(error.value)] and "\n" not in str(error.value)
    (tmp_path / "out" / "tokenizer.json").unlink()
    shutil.rmtree(tmp_path / "out" / "docs")
    problems = check_sources(cfg)
    assert len(problems) == 3 and problems[0].startswith("data.tokenizer: ")
    assert check_sources(DataConfig("x", 4))[-1] == "data.sources: none given"


def test_another_tokenizer_is_refused(prepared: Path, tmp_path: Path, data_config: Config) -> None:
    text = (prepared / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "mine.json").write_text(text.replace('"<|endoftext|>"', '"<eos>"'), encoding="utf-8")
    with pytest.raises(DataError, match=r"made with tokenizer .*out/tokenizer.json .*, data.tokenizer is .*mine"):
        loader(data_config(tokenizer=str(tmp_path / "mine.json")))


def test_a_foreign_pair_is_read_without_a_manifest(
    prepared: Path, tmp_path: Path, data_config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    vocab = Tokenizer.load(prepared / "tokenizer.json").vocab_size
    with StoreWriter(tmp_path / "mine", 60000) as writer:
        writer.add(np.arange(200) % vocab)
        writer.add(np.full(2_000_000, 7))
        writer.add(np.full(100, vocab))
    cfg = DataConfig(str(prepared / "tokenizer.json"), 50, {"mine": SourceConfig(str(tmp_path / "mine"))})
    reader = loader(cfg, batch_tokens=50)
    assert caplog.text.count("no manifest.json") == 1
    assert next(iter(reader.steps(0, 1))).micro_batches[0].tokens.shape == (1, 50)
    bad = int(np.flatnonzero(reader.sampler.get(np.arange(40005))[1] == 40004)[0])
    for workers in (0, 1):
        reader = loader(cfg, batch_tokens=50, workers=workers)
        with pytest.raises(DataError, match=rf"token id {vocab} at token \d+ of document 2 is outside") as error:
            next(iter(reader.steps(bad, bad + 1)))
        assert "\n" not in str(error.value)
    with StoreWriter(tmp_path / "mine", 60000) as writer:
        writer.add(np.arange(vocab + 5))
    with pytest.raises(DataError, match=rf"token id {vocab} at token {vocab} of document 0"):
        loader(cfg, batch_tokens=50)
    with pytest.raises(DataError, match=r"mine: has less than one block, which needs 1,001 tokens"):
        with StoreWriter(tmp_path / "mine", 60000) as writer:
            writer.add(np.zeros(325, dtype=np.int32))
        loader(DataConfig(cfg.tokenizer, 1000, cfg.sources), batch_tokens=1000)


def test_schedule_must_name_known_sources(data_config: Config) -> None:
    with pytest.raises(UsageError, match=r"names source cod, data.sources does not; did you mean code\?"):
        log = ScheduleLog.fixed({"cod": 1})
        Loader(data_config(), seed=0, batch_tokens=64, microbatch=1, dp_rank=0, dp_size=1, log=log)


def test_a_source_of_weight_zero_is_not_read(data_config: Config) -> None:
    cfg = data_config({"code": 1.0, "docs": 0.0})
    reader = loader(cfg)
    seen: list[StepData] = list(reader.steps(0, 5))
    assert {int(b.source[0, 0]) for d in seen for b in d.micro_batches} == {0}
    assert reader.source_names == ["code", "docs"]
