"""launch/prepare.py from the outside: a corpus in, data that a loader reads out, one line for every mistake."""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lmtrain.data.blocks.packing import BestFitBlocks
from lmtrain.data.config import DataConfig, SourceConfig
from lmtrain.data.heldout import Heldout
from lmtrain.data.loader import Loader
from lmtrain.data.order.schedule import ScheduleLog
from lmtrain.data.sources import open_source
from lmtrain.data.store.manifest import SPLITS, Manifest
from lmtrain.data.store.store import Store, StoreWriter
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import DataError, UsageError

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("prepare_command", ROOT / "launch" / "prepare.py")
assert spec is not None and spec.loader is not None
prepare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)


def test_text_to_batches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make_text: Callable[[int, int], str]
) -> None:
    (tmp_path / "text").mkdir()
    for i in range(30):
        (tmp_path / "text" / f"{i}.txt").write_text(make_text(i, 60), encoding="utf-8")
    out = tmp_path / "out"
    command = [f"out={out}", "tokenizer=train:300", "heldout=0.1", f"sources.mine.path={tmp_path / 'text'}"]
    assert prepare.main(command) == 0
    assert "mine: " in capsys.readouterr().out
    assert prepare.main(command) == 0 and "nothing to do" in capsys.readouterr().out
    assert prepare.main(["verify", str(out)]) == 0 and prepare.main(["verify", str(out / "mine")]) == 0
    assert "verified" in capsys.readouterr().out
    cfg = DataConfig(str(out / "tokenizer.json"), 32, {"mine": SourceConfig(str(out / "mine"))})
    log = ScheduleLog.fixed({"mine": 1})
    loader = Loader(cfg, seed=0, batch_tokens=64, microbatch=2, dp_rank=0, dp_size=1, log=log)
    assert next(iter(loader.steps(0, 2))).micro_batches[0].tokens.shape == (2, 32)
    with pytest.raises(DataError, match=r"folder around prepared sources; did you mean .*out/mine\?"):
        open_source("mine", str(out), Tokenizer.load(out / "tokenizer.json"))
    tokens = bytearray((out / "mine" / "train.bin").read_bytes())
    tokens[100] ^= 1
    (out / "mine" / "train.bin").write_bytes(tokens)
    assert prepare.main(["verify", str(out)]) == 65 and prepare.main(["verify", str(out / "mine" / "train")]) == 65
    assert "train.bin: expected xxh3-128" in capsys.readouterr().err


@pytest.fixture
def two(prepared: Path, tmp_path: Path) -> Path:
    """Two prepared sources and their tokenizer, to write beside."""
    for name in ("code", "rare"):
        shutil.copytree(prepared / name, tmp_path / name)
    shutil.copy(prepared / "tokenizer.json", tmp_path)
    return tmp_path


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a call prints; one that fails prints to stderr and fails the test."""
    assert prepare.main(words) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_inspect_and_stats(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer.load(two / "tokenizer.json")
    page = said(["inspect", str(two / "rare"), "documents=1"], capsys)
    for split in ("train", "heldout"):
        store = Store(two / "rare" / split)
        start, stop = store.document_starts[1:3].tolist()
        assert f"{split}: {store.num_documents} documents, {store.num_tokens:,} tokens, uint16, " in page
        assert f"document 1: tokens [{start:,}, {stop:,}), ends with <|endoftext|>" in page
        assert tokenizer.decode(store.document(1)[:20]).split("\n")[0] in page and "<|endoftext|>" in page
    numbers = said(["stats", str(two)], capsys)
    for name in ("code", "rare"):
        store, manifest = Store(two / name / "train"), Manifest.read(two / name)
        assert f"{store.num_documents} documents (0 empty), {store.num_tokens:,} tokens" in numbers
        assert f"{manifest.bytes_of_text['train'] / store.num_tokens:.2f} bytes per token\n" in numbers
        used = np.unique(store.tokens(0, store.num_tokens))
        unused = [str(i) for i in range(tokenizer.vocab_size) if i not in used]
        assert f"{len(unused)} of 320 ids are never used: {' '.join(unused[:8])}" in numbers
        lengths = np.diff(store.document_starts)
        assert f"128 -        255  {((lengths >= 128) & (lengths < 256)).sum():>9}" in numbers
    foreign = [f"{two / 'rare' / 'train'}", f"tokenizer={two / 'tokenizer.json'}"]
    assert "bytes per token (of the first 65,536 tokens)" in said(["stats", *foreign], capsys)
    assert "document 0: " in said(["inspect", *foreign], capsys)
    for words, message in [
        (["inspect", foreign[0]], "train: its tokenizer is not beside it; give it as tokenizer=PATH"),
        (["inspect", str(two / "rare"), "documents=99"], "document 99; it has"),
        (["inspect", str(two / "rare"), "documents=all"], "documents: expected numbers with a comma between, got all"),
    ]:
        assert prepare.main(words) in (64, 65) and message in capsys.readouterr().err


def test_merge_and_pack(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = two / "all"
    paths = [str(two / "rare"), str(two / "code")]
    said(["merge", f"out={out}", *paths], capsys)
    parts = [(Store(path / split), Manifest.read(path)) for split in SPLITS for path in (two / "rare", two / "code")]
    for split, ((a, one), (b, other)) in zip(SPLITS, (parts[:2], parts[2:]), strict=True):
        merged = Store(out / split)
        expected = [store.document(j).tolist() for store in (a, b) for j in range(store.num_documents)]
        assert [merged.document(j).tolist() for j in range(merged.num_documents)] == expected
        assert Manifest.read(out).bytes_of_text[split] == one.bytes_of_text[split] + other.bytes_of_text[split]
    assert Manifest.read(out).heldout.hashes == one.heldout.hashes + other.heldout.hashes
    assert "all: " in said(["verify", str(out)], capsys)
    said(["merge", f"out={two / 'again'}", *paths], capsys)
    for name in ("train.bin", "train.idx", "heldout.bin", "heldout.idx"):
        assert (two / "again" / name).read_bytes() == (out / name).read_bytes()
    cfg = DataConfig(str(two / "tokenizer.json"), 32, {"all": SourceConfig(str(out))})
    assert len(Heldout(cfg).bytes_of_text) == 1
    assert " blocks of " in said(["pack", str(out), "length=64"], capsys)
    assert BestFitBlocks(Store(out / "train"), 64).num_blocks > 0
    assert "train.pack-64: verified" in said(["verify", str(out)], capsys)
    damaged = bytearray((out / "train.pack-64" / "starts.npy").read_bytes())
    damaged[200] ^= 1
    (out / "train.pack-64" / "starts.npy").write_bytes(damaged)
    left = sorted(path.name for path in two.iterdir())
    other = Tokenizer.load(two / "tokenizer.json").path + ".other.json"
    text = (two / "tokenizer.json").read_text(encoding="utf-8")
    Path(other).write_text(text.replace('"<|endoftext|>"', '"<eos>"'), encoding="utf-8")
    for words, message in [
        (["verify", str(out)], "starts.npy: expected xxh3-128"),
        (["merge", f"out={out}", *paths], "all: is there already; choose another out=, or remove it"),
        (["merge", f"out={two / 'x'}", paths[0], str(two / "code" / "train")], "cannot be merged into one"),
        (["merge", f"out={two / 'x'}", paths[0], f"tokenizer={other}"], "other.json is another ("),
    ]:
        assert prepare.main(words) in (64, 65) and message in capsys.readouterr().err
    assert sorted(path.name for path in two.iterdir()) == sorted([*left, Path(other).name])


def test_foreign_files_become_a_pair(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(two / "rare" / "train")
    np.save(two / "x.npy", store.tokens(0, store.num_tokens))
    words = [str(two / "x.npy"), str(two / "code" / "train"), f"tokenizer={two / 'tokenizer.json'}"]
    said(["merge", f"out={two / 'pair'}", *words], capsys)
    pair = Store(two / "pair")
    assert pair.document(1).tolist() == store.document(1).tolist()
    assert pair.num_tokens == store.num_tokens + Store(two / "code" / "train").num_tokens
    page = said(["verify", str(two / "pair"), words[-1]], capsys)
    assert "no manifest.json: its bytes are compared with nothing" in page and "nor its ids" not in page
    assert "nor its ids" in said(["verify", str(two / "pair")], capsys)
    index = bytearray((two / "pair.idx").read_bytes())
    index[40] ^= 1
    (two / "pair.idx").write_bytes(index)
    assert prepare.main(["verify", str(two / "pair")]) == 65
    assert "does not follow from the lengths" in capsys.readouterr().err


def test_a_merge_that_is_cut_short_shows_nothing(
    two: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["merge", f"out={two / 'all'}", str(two / "rare"), str(two / "code")]
    before = sorted(two.iterdir())

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for place in (StoreWriter, Manifest):
        with monkeypatch.context() as patched:
            patched.setattr(place, "close" if place is StoreWriter else "write", full)
            assert prepare.main(words) == 74 and "No space left" in capsys.readouterr().err
        assert sorted(two.iterdir()) == before
    (two / "all.partial").mkdir()  # of a killed one
    (two / "all.partial" / "train.bin.partial").write_bytes(b"half")
    said(words, capsys)
    assert sorted(two.iterdir()) == sorted([*before, two / "all"])


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["out=x", "tokenzier=y"], 64, "tokenzier: unknown key; did you mean tokenizer?"),
        (["out=x", "sources.a.pth=y"], 64, "sources.a.pth: unknown key; did you mean path?"),
        (["out=x", "sources.a=y"], 64, "sources.a: write sources.NAME.path="),
        (["out=x", "sources.a.text_field=y"], 64, "sources.a.path: missing"),
        (["out=x", "sources.a.path=y"], 64, "tokenizer: missing"),
        (["--out", "x"], 64, "--out: expected key=value"),
        (["heldout=few", "out=x"], 64, "heldout: expected a number, got few"),
        (["workers=1.5"], 64, "workers: expected an integer, got 1.5"),
        (["overwrite=yes"], 64, "overwrite: expected true or false, got yes"),
        (["out=x", "tokenizer=none.json", "sources.a.path=y/z.txt"], 65, "none.json: no such tokenizer"),
        (["out=x", "tokenizer=train:300", "sources.a.path=y/z.txt"], 65, "y/z.txt: no such file or folder"),
        (["verfy", "out"], 64, "verfy: expected key=value or a verb; did you mean verify?"),
        (["verify"], 64, "verify: expected one path, got 0; verify --help shows how"),
        (["verify", "nowhere"], 65, "nowhere: no store there: no nowhere.idx"),
        (["stats", "x", "tokeniser=y"], 64, "stats: tokeniser: unknown key; did you mean tokenizer?"),
        (["inspect", "x", "tokenizer="], 64, "inspect: tokenizer: expected a value, got nothing"),
        (["merge", "x"], 64, "merge: expected out=NEW and at least one PATH"),
        (["merge", "out=y", "x"], 65, "x: no store there"),
        (["pack", "x"], 64, "pack: expected length=N, tokens of a block, got none"),
        (["pack", "x", "length=0"], 64, "pack: expected length=N, tokens of a block, got 0"),
        (["python-corpus"], 64, "python-corpus: expected out=FOLDER, where its .jsonl files go, and nothing else; got"),
        (["pyton-corpus", "out=x"], 64, "did you mean python-corpus?"),
        (["stats", __file__], 65, "this is text, not tokens; prepare it first"),
    ],
)
def test_mistakes(
    words: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert prepare.main(words) == code
    error = capsys.readouterr().err
    assert message in error and error.startswith("prepare: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_console_counts_ids_and_ones(
    tmp_path: Path, prepared: Path, write_jsonl: Callable[..., str], make_text: Callable[[int, int], str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Ten ids of three documents each: what is held out is a share of the ids."""
    documents = [{"id": f"page {i // 3}", "text": make_text(i, 40)} for i in range(30)]
    words = [f"out={tmp_path / 'out'}", f"tokenizer={prepared / 'tokenizer.json'}", "heldout=0.3"]
    words += [f"sources.pages.path={write_jsonl(tmp_path / 'pages.jsonl', documents)}"]
    words += [f"sources.one.path={write_jsonl(tmp_path / 'one.jsonl', [{'text': make_text(98, 40)}])}"]
    page = said(words, capsys)
    heldout = Store(tmp_path / "out" / "pages" / "heldout").num_documents
    assert 0 < heldout < 30 and f"held out {heldout} documents ({heldout // 3} of 10 ids), " in page
    assert "  one: 1 document, " in page and "held out 0 documents, 0 tokens; left out 0 documents" in page
    assert ": 1 document (0 empty), " not in page and "1 documents" not in page
    assert f"one{os.sep}train: 1 document, " in said(["inspect", str(tmp_path / "out" / "one")], capsys)


def test_values() -> None:
    words = "out=1e3 tokenizer=train:300 workers=2 heldout=0 overwrite=True eod=</s>"
    cfg = prepare.parse([*words.split(), "sources.a.path=x=y", "sources.a.split=v"])
    assert (cfg.out, cfg.workers, cfg.heldout, cfg.overwrite, cfg.eod) == ("1e3", 2, 0.0, True, "</s>")
    assert cfg.sources["a"].path == "x=y" and cfg.sources["a"].split == "v"
    with pytest.raises(UsageError):
        prepare.parse([])


def test_help_and_the_program_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare.main([]) == 0
    page = capsys.readouterr().out
    for verb in ("inspect", "verify", "stats", "merge", "pack", "python-corpus"):
        assert f"\n  {verb} " in page and f"{verb} " in said([verb, "--help"], capsys)
    for word in ("python-corpus", "verify", "sources.NAME.text_field=", "heldout=", "(default 0.01)"):
        assert word in page
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, ROOT / "launch/prepare.py", "--help"], capture_output=True, env=environment)
    assert run.returncode == 0 and run.stdout.decode() == page
