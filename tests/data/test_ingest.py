"""From text to prepared data: what is kept, what is held out, and that nothing else decides the bytes."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from lmtrain.data.ingest import ingest, reading
from lmtrain.data.ingest.encoding import Encoded, Encoder, Marked
from lmtrain.data.ingest.filters.exact import text_digest
from lmtrain.data.ingest.ingest import PrepareConfig, prepare
from lmtrain.data.ingest.reading import SourceOptions
from lmtrain.data.store.manifest import Manifest, verify
from lmtrain.data.store.store import Store
from lmtrain.data.tokenizer import EOD, Tokenizer
from lmtrain.errors import DataError, StorageError, UsageError

Write = Callable[..., str]
Text = Callable[[int, int], str]


@pytest.fixture
def config(tmp_path: Path, prepared: Path) -> Callable[..., PrepareConfig]:
    """``config(name=path, ..., heldout=0.2)``, with the tokenizer of ``prepared``, away from what is held out there."""
    (tmp_path / "alone").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(prepared / name, tmp_path / "alone")

    def build(heldout: float = 0.2, **paths: str) -> PrepareConfig:
        sources = {name: SourceOptions(path) for name, path in paths.items()}
        tokenizer = str(tmp_path / "alone" / "tokenizer.json")
        return PrepareConfig(out=str(tmp_path / "out"), tokenizer=tokenizer, heldout=heldout, sources=sources)

    return build


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def texts(folder: Path, split: str) -> list[str]:
    tokenizer = Tokenizer.load(folder.parent / "tokenizer.json")
    store = Store(folder / split)
    return [tokenizer.decode(store.document(j)).removesuffix(tokenizer.eod) for j in range(store.num_documents)]


def removed(folder: Path) -> dict[str, int]:
    return {step["step"]: step["removed"] for step in Manifest.read(folder).pipeline if "removed" in step}


def test_workers_do_not_change_a_byte(text_files: dict[str, str], prepared: Path, tmp_path: Path) -> None:
    sources = {name: SourceOptions(path) for name, path in text_files.items()}
    cfg = PrepareConfig(str(tmp_path / "two"), "train:320", sources, heldout=0.2, workers=2)
    assert prepare(cfg)[1]
    assert contents(tmp_path / "two") == contents(prepared)


def test_every_document_is_somewhere_once(text_files: dict[str, str], prepared: Path) -> None:
    seen: set[str] = set()  # of documents that are equal, in whichever sources, the first stays
    for name, path in text_files.items():
        manifest = verify(prepared / name)
        written = [json.loads(line)["text"] for line in Path(path).read_text(encoding="utf-8").splitlines()]
        written = [text for text in dict.fromkeys(written) if text not in seen]
        seen |= set(written)
        train, heldout = texts(prepared / name, "train"), texts(prepared / name, "heldout")
        assert sorted(train + heldout) == sorted(written) and train and heldout
        assert train != [text for text in written if text in train]  # shuffled
        assert manifest.bytes_of_text == {
            "train": sum(len(text.encode()) for text in train), "heldout": sum(len(text.encode()) for text in heldout)
        }  # fmt: skip
        assert manifest.heldout.hashes == [text_digest(text).hex() for text in heldout]


def test_what_is_left_out(
    tmp_path: Path, config: Callable[..., PrepareConfig], write_jsonl: Write, make_text: Text
) -> None:
    base = [{"id": str(i), "text": make_text(i, 80)} for i in range(40)]
    extra = [{"text": ""}, {"text": " \n"}, {"id": "copy", "text": base[0]["text"].upper().replace(" ", "\n ")}]
    a = write_jsonl(tmp_path / "a.jsonl", [*base, *extra])
    b = write_jsonl(tmp_path / "b.jsonl", [base[3], {"text": "b b"}, {"text": "c c"}])
    prepare(config(heldout=0.1, a=a, b=b))
    assert removed(tmp_path / "out" / "a")["empty"] == 2 and removed(tmp_path / "out" / "a")["duplicate"] == 1
    assert removed(tmp_path / "out" / "b")["duplicate"] == 1  # of a document of another source
    assert Manifest.read(tmp_path / "out" / "a").pipeline[0] == {"step": "read", "documents": 43}


def test_near_duplicates_of_heldout_text_are_not_trained_on(
    tmp_path: Path, config: Callable[..., PrepareConfig], write_jsonl: Write, make_text: Text
) -> None:
    base = [{"id": str(i), "text": make_text(i, 100)} for i in range(30)]
    prepare(config(a=write_jsonl(tmp_path / "a.jsonl", base)))
    heldout, train = (texts(tmp_path / "out" / "a", split)[0] for split in ("heldout", "train"))
    near = {"id": "near", "text": "Changed! " + heldout.replace(" ", ", ").upper()}
    half = {"id": "half", "text": heldout[: len(heldout) // 4] + make_text(99, 100)}
    near_train = {"id": "near_train", "text": "changed " + train}
    again = write_jsonl(tmp_path / "a.jsonl", [*base, near, half, near_train])
    sides = {row["id"] for row in (near, half, near_train)}
    prepare(dataclasses.replace(config(a=again), overwrite=True))
    kept = texts(tmp_path / "out" / "a", "train") + texts(tmp_path / "out" / "a", "heldout")
    assert len(sides) == 3 and removed(tmp_path / "out" / "a")["near_duplicate_of_heldout"] == 1
    assert near["text"] not in kept and half["text"] in kept and near_train["text"] in kept


def test_ids_keep_what_belongs_together_on_one_side(
    tmp_path: Path, config: Callable[..., PrepareConfig], write_jsonl: Write, make_text: Text
) -> None:
    code = [{"id": f"m{i}.py", "text": make_text(i, 50)} for i in range(60)]
    strings = [{"id": f"m{i}.py", "text": make_text(100 + i, 30), "train_only": True} for i in range(60)]
    paths = {"code": write_jsonl(tmp_path / "c.jsonl", code), "docs": write_jsonl(tmp_path / "d.jsonl", strings)}
    prepare(config(**paths))
    held = {row["id"] for row in code if row["text"] in texts(tmp_path / "out" / "code", "heldout")}
    assert 4 <= len(held) <= 24 and texts(tmp_path / "out" / "docs", "heldout") == []
    kept = {row["id"] for row in strings if row["text"] in texts(tmp_path / "out" / "docs", "train")}
    assert kept == {row["id"] for row in code} - held
    assert removed(tmp_path / "out" / "docs")["train_only_of_heldout"] == len(held)


def test_one_document_does_not_fill_the_heldout_text(
    tmp_path: Path, config: Callable[..., PrepareConfig], write_jsonl: Write, make_text: Text
) -> None:
    long = "\u00e9" + make_text(5, 20000)
    documents = [{"id": str(i), "text": make_text(i, 20)} for i in range(5)]
    path = write_jsonl(tmp_path / "a.jsonl", [{"id": "long", "text": long}, *documents])
    for share in (0.2, 0.6, 0.95):  # until the long one is on the held-out side
        manifest = prepare(dataclasses.replace(config(heldout=share, a=path), overwrite=True))[0]["a"]
        if max(manifest.heldout.bytes, default=0) > 10_000:
            break
    store = Store(tmp_path / "out" / "a" / "heldout")
    tokenizer = Tokenizer.load(tmp_path / "out" / "tokenizer.json")
    cut = store.document(int(manifest.heldout.bytes.index(max(manifest.heldout.bytes))))
    assert max(manifest.heldout.bytes) == 50_000 and tokenizer.eod_id not in cut  # it does not end there
    assert long.startswith(tokenizer.decode(cut))


def test_a_second_run_does_nothing_or_refuses(
    tmp_path: Path, config: Callable[..., PrepareConfig], write_jsonl: Write, make_text: Text
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": make_text(i, 20)} for i in range(10)])
    cfg = config(a=path)
    first, made = prepare(cfg)
    assert made and prepare(cfg) == (first, False) and prepare(dataclasses.replace(cfg, workers=2)) == (first, False)
    with pytest.raises(UsageError, match=r"out/a: made from .* \(heldout: was 0.2, is 0.5\); overwrite=true"):
        prepare(dataclasses.replace(cfg, heldout=0.5))
    with pytest.raises(UsageError, match=r"a tokenizer is there already; tokenizer=.*out/tokenizer.json adds sources"):
        prepare(dataclasses.replace(cfg, tokenizer="train:300", sources={"b": SourceOptions(path)}))
    prepare(dataclasses.replace(cfg, sources={"b": SourceOptions(path)}))
    prepare(dataclasses.replace(cfg, heldout=0.5, overwrite=True))
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert there == {".lock", "a", "b", "tokenizer.json", "tokenizer_config.json"}


def test_refusals(tmp_path: Path, config: Callable[..., PrepareConfig], write_jsonl: Write) -> None:
    empty = write_jsonl(tmp_path / "empty.jsonl", [{"text": " "}])
    good = config(heldout=0.0, a=write_jsonl(tmp_path / "a.jsonl", [{"text": "words"}]))
    for cfg, kind, message in [
        (config(), UsageError, "sources: none given"),
        (config(**{"a/b": "x"}), UsageError, "sources: 'a/b' is no name"),
        (config(heldout=1.0, a=empty), UsageError, "heldout: must be at least 0 and below 1, got 1.0"),
        (dataclasses.replace(good, workers=0), UsageError, "workers: must be at least 1"),
        (dataclasses.replace(good, tokenizer="train:2k"), UsageError, "expected train:N with a .* got train:2k"),
        (
            config(a=empty),
            DataError,
            r"empty.jsonl: no text to .* \(1 document, 1 empty, 0 held out\); give more$",
        ),
        (dataclasses.replace(good, tokenizer="train:100"), UsageError, "train:100: at least 257 ids are needed"),
        (dataclasses.replace(good, sources={"a": SourceOptions("none/x/y", fim_rate=0.5)}), DataError, "it lacks the"),
    ]:
        with pytest.raises(kind, match=message):
            prepare(cfg)
    with open(tmp_path / "out" / ".lock", "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match="another prepare is writing there"):
            prepare(good)
    prepare(good)


def test_one_document_cannot_be_split(
    tmp_path: Path, config: Callable[..., PrepareConfig], write_jsonl: Write, caplog: pytest.LogCaptureFixture
) -> None:
    prepare(config(heldout=1e-9, a=write_jsonl(tmp_path / "a.jsonl", [{"text": "words"}])))
    assert "a: nothing held out (1 document, 0 held out); raise heldout" in caplog.text
    assert verify(tmp_path / "out" / "a").bytes_of_text == {"train": 5, "heldout": 0}


def test_storage_trouble_is_one_line(
    tmp_path: Path, config: Callable[..., PrepareConfig], write_jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "out/x.bin")

    cfg = config(heldout=0.0, a=write_jsonl(tmp_path / "a.jsonl", [{"text": "words"}]))
    monkeypatch.setattr(ingest, "shuffle", full)
    with pytest.raises(StorageError, match=r"^out/x.bin: No space left on device$"):
        prepare(cfg)
    monkeypatch.undo()
    prepare(cfg)
    verify(tmp_path / "out" / "a")


KILLED = """
import os, signal, sys
from pathlib import Path
from lmtrain.data.ingest import reading
from lmtrain.data.ingest.ingest import PrepareConfig, prepare
from lmtrain.data.store.manifest import verify
from lmtrain.data.ingest.reading import SourceOptions
root, tokenizer, text = sys.argv[1:]
reading.CHUNK_BYTES, reading.CHUNKS_PER_SHARD = 100, 2
def cfg(out): return PrepareConfig(out, tokenizer, {n: SourceOptions(f"{text}/{n}.jsonl") for n in "ab"}, heldout=0.2)
def contents(out): return {str(p.relative_to(out)): p.read_bytes() for p in Path(out).rglob("*") if p.is_file()}
def in_child(call):
    child = os.fork()
    if child == 0:
        call()
        os._exit(0)
    return os.waitpid(child, 0)[1]
replace, os.fsync = os.replace, lambda file: None  # a killed process loses nothing of what the system has
whole = os.path.join(root, "whole")
prepare(cfg(whole))
for n in range(0, 1000, 3):
    out, left = os.path.join(root, str(n)), n
    def countdown(call):
        def wrapped(*args):
            global left
            if left == 0: os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return call(*args)
        return wrapped
    def killed():
        os.replace, os.fsync = countdown(replace), countdown(os.fsync)
        prepare(cfg(out))
    status = in_child(killed)
    found = [name for name in ("a", "b") if os.path.exists(os.path.join(out, name))]
    for name in found: verify(os.path.join(out, name))
    kept = len([*Path(out).glob(".partial/tokens/*.json")])
    again = prepare(cfg(out))[1]
    print(n, status, ",".join(found), kept, int(again), contents(out) == contents(whole), sep=" ")
    if status == 0: break
"""


def test_a_kill_at_any_moment_leaves_nothing_half_and_the_next_run_goes_on(
    tmp_path: Path, prepared: Path, write_jsonl: Write, make_text: Text
) -> None:
    for seed, name in ((0, "a"), (50, "b")):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": make_text(seed + i, 10)} for i in range(9)])
    arguments = [str(tmp_path), str(prepared / "tokenizer.json"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    lines = [line.split(" ") for line in run.stdout.splitlines()]
    assert len(lines) > 20 and lines[-1][1:4] == ["0", "a,b", "0"] and {line[2] for line in lines} >= {"", "a", "a,b"}
    assert all(line[-1] == "True" for line in lines)  # to the byte as if it had not been killed
    assert max(int(line[3]) for line in lines) >= 6  # of which shards were there already


def test_finished_shards_are_not_tokenized_again(
    tmp_path: Path, config: Callable[..., PrepareConfig], write_jsonl: Write, make_text: Text,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(reading, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(reading, "CHUNKS_PER_SHARD", 1)
    cfg = config(a=write_jsonl(tmp_path / "a.jsonl", [{"text": make_text(i, 60)} for i in range(60)]))
    seen: list[int] = []
    call = Encoder.__call__

    def counted(self: Encoder, task: Marked) -> Encoded:
        if len(seen) == 10:
            raise OSError(28, "No space left on device", "x")
        seen.append(task.chunk.first)
        return call(self, task)

    monkeypatch.setattr(Encoder, "__call__", counted)
    with pytest.raises(StorageError, match="No space left"):
        prepare(cfg)
    shutil.copytree(tmp_path / "out", tmp_path / "two")
    monkeypatch.setattr(Encoder, "__call__", lambda self, task: seen.append(task.chunk.first) or call(self, task))
    prepare(cfg)
    assert len(set(seen)) > 14 and len(seen) <= len(set(seen)) + 1
    whole = dataclasses.replace(cfg, out=str(tmp_path / "whole"))
    prepare(whole)
    prepare(dataclasses.replace(cfg, out=str(tmp_path / "two"), workers=2))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole") == contents(tmp_path / "two")


def test_a_full_disk_is_one_line_and_room_is_all_it_takes(
    tmp_path: Path, config: Callable[..., PrepareConfig], write_jsonl: Write, make_text: Text
) -> None:
    cfg = config(a=write_jsonl(tmp_path / "a.jsonl", [{"text": make_text(i, 3000)} for i in range(10)]))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (10, 2000, 30_000):  # bytes a file may have: the note of the inputs, the survey, the tokens
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(StorageError, match="File too large") as error:
                prepare(cfg)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "\n" not in str(error.value) and not (tmp_path / "out" / "a").exists()
    prepare(cfg)
    verify(tmp_path / "out" / "a")


def test_a_vocabulary_beyond_uint16_gets_int32(tmp_path: Path, write_jsonl: Write) -> None:
    vocab = {f"w{i}": i for i in range(70_000)} | {EOD: 70_000}
    engine = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    engine.add_special_tokens([EOD])
    engine.save(str(tmp_path / "tokenizer.json"))
    sources = {"a": SourceOptions(write_jsonl(tmp_path / "a.jsonl", [{"text": "w69999 w1"}]))}
    prepare(PrepareConfig(str(tmp_path / "out"), str(tmp_path / "tokenizer.json"), sources, heldout=0.0))
    store = Store(tmp_path / "out" / "a" / "train")
    assert store.dtype == np.int32 and store.document(0).tolist() == [69_999, 1, 70_000]
