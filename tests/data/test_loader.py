"""The loader: the same tokens for any number of ranks and workers, exact shares, clean borders, clear refusals."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmtrain.data.batch import IGNORE
from lmtrain.data.config import DataConfig, SourceConfig
from lmtrain.data.loader import Loader, StepData, token_hash
from lmtrain.data.schedule import ScheduleLog
from lmtrain.data.sources import check_sources
from lmtrain.data.store import Store, StoreWriter
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import DataError, UsageError

Config = Callable[..., DataConfig]


def loader(cfg: DataConfig, **changes: int) -> Loader:
    log = ScheduleLog.fixed({name: source.weight for name, source in cfg.sources.items()})
    given = {"seed": 5, "batch_tokens": 1024, "microbatch": 1, "dp_rank": 0, "dp_size": 1, **changes}
    return Loader(cfg, log=log, **given)  # type: ignore[arg-type]


def hashes(cfg: DataConfig, ranks: int, steps: range, **changes: int) -> list[str]:
    """Token hash per step, from all ranks together."""
    loaders = [loader(cfg, dp_rank=rank, dp_size=ranks, **changes) for rank in range(ranks)]
    readers = [each.steps(steps.start, steps.stop) for each in loaders]
    return [token_hash(torch.stack([data.hashes for data in row]).sum(dim=0)) for row in zip(*readers, strict=True)]


def test_any_number_of_ranks_and_any_microbatch_read_the_same(data_config: Config) -> None:
    cfg = data_config()
    expected = hashes(cfg, 1, range(0, 12))
    assert len(set(expected)) == 12
    for ranks, microbatch in ((1, 4), (2, 1), (2, 8), (8, 2)):
        assert hashes(cfg, ranks, range(0, 12), microbatch=microbatch) == expected
    assert hashes(cfg, 2, range(5, 9)) == expected[5:9]  # a resumed run


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


def test_lengths_that_do_not_divide_name_the_nearest(data_config: Config) -> None:
    for changes, sizes, message in [
        ({}, {"batch_tokens": 1000}, r"train.batch_tokens 1000 is not a multiple of 64 .*; nearest: 1024"),
        ({}, {"microbatch": 4, "dp_size": 8}, r"of 2048 = 4 rows \(microbatch\) x 64 tokens x 8 .* 2048"),
        ({"block_tokens": 256}, {"microbatch": 6}, r"microbatch 6 is not a multiple of the 4 rows of .* nearest: 8"),
    ]:
        with pytest.raises(UsageError, match=message):
            loader(data_config(**changes), **sizes)


def test_epochs_are_limited(data_config: Config) -> None:
    reader = loader(data_config(max_epochs=1.5))
    reader.check(1)
    with pytest.raises(UsageError, match=r"1000 steps need [\d,]+ tokens, it has [\d,]+ \([\d.]+ epochs, .* is 1.5\)"):
        next(iter(reader.steps(0, 1000)))


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
    with pytest.raises(DataError, match=r"325 tokens, one block needs 1,001"):
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
