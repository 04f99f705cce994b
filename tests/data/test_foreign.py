"""Stores of others give the documents of a ``.bin/.idx`` with the same tokens; what contradicts itself is named."""

from __future__ import annotations

import gzip
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmtrain.data.config import DataConfig, SourceConfig
from lmtrain.data.loader import Loader
from lmtrain.data.order.schedule import ScheduleLog
from lmtrain.data.reader import token_hash
from lmtrain.data.sources import content_digest, open_train
from lmtrain.data.store import foreign
from lmtrain.data.store.foreign import open_store
from lmtrain.data.store.manifest import TokenizerEntry
from lmtrain.data.store.store import Store, StoreWriter
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import DataError

EOD = 3
VOCAB = 70_000
TOKENIZER, SMALL = (TokenizerEntry("", "", size, "", EOD) for size in (VOCAB, 9))
Documents = list[list[int]]
Writer = Callable[[Path, Documents, int], str]


def flat(documents: Documents, width: int) -> np.ndarray:
    return np.array([token for document in documents for token in document], dtype=f"<u{width}")


def write_datatrove(folder: Path, documents: Documents, width: int) -> str:
    path = folder / "x.ds"
    flat(documents, width).tofile(path)
    np.cumsum([len(document) for document in documents]).astype("<u8").tofile(f"{path}.index")
    count = sum(map(len, documents))
    (folder / "x.ds.metadata").write_text(f"gpt2|{width}\n{count}\n{count} T", encoding="utf-8")
    return str(path)


def write_flat(folder: Path, documents: Documents, width: int) -> str:
    flat(documents, width).tofile(folder / "x.npy")
    return str(folder / "x.npy")


def write_table(folder: Path, documents: Documents, width: int) -> str:
    ends = np.cumsum([len(document) for document in documents]).tolist()
    with gzip.open(folder / "x.csv.gz", "wt", encoding="utf-8") as file:
        file.writelines(f"{end - len(d)},{end},id,src,loc,1\n" for d, end in zip(documents, ends, strict=True))
    return write_flat(folder, documents, width)


def write_numpy(folder: Path, documents: Documents, width: int) -> str:
    np.save(folder / "x.npy", flat(documents, width))
    return str(folder / "x.npy")


def contents(store: Store) -> Documents:
    return [store.document(j).tolist() for j in range(store.num_documents)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.integers(4, 65_535), max_size=9), min_size=2, max_size=8),
    st.sampled_from([2, 4]),
    st.sampled_from([write_datatrove, write_flat, write_table, write_numpy]),
)
def test_the_documents_are_those_of_the_same_pair(
    tmp_path_factory: pytest.TempPathFactory, documents: Documents, width: int, write: Writer
) -> None:
    folder = tmp_path_factory.mktemp("foreign")
    ended = [[*document, EOD] for document in documents]
    with StoreWriter(folder / "pair", VOCAB) as writer:
        for document in ended:
            writer.add(np.array(document))
    pair = open_store(folder / "pair")
    store = open_store(write(folder, ended, width), TOKENIZER)
    assert store.dtype == np.dtype(f"<u{width}") and store.num_tokens == pair.num_tokens
    for start in range(store.num_tokens):  # before anything looked for all borders
        count = store.num_tokens - start
        assert np.array_equal(store.document_ids(start, count), pair.document_ids(start, count))
    store = pickle.loads(pickle.dumps(store))
    assert contents(store) == contents(pair) == ended
    assert store.document_starts.tolist() == pair.document_starts.tolist()


def test_a_tail_without_an_end_is_a_document(tmp_path: Path) -> None:
    documents = [[4, 5, EOD], [EOD], [6, 7]]
    assert contents(open_store(write_flat(tmp_path, documents, 2), SMALL)) == documents
    write_table(tmp_path, documents[:2], 2)
    write_flat(tmp_path, documents, 2)
    assert contents(open_store(tmp_path / "x.npy", SMALL)) == documents


def test_datatrove_of_older_versions_and_empty_documents(tmp_path: Path) -> None:
    path = Path(write_datatrove(tmp_path, [[], [5, 6], []], 2))
    for text in ("gpt2\n2\n2 T", "org/name\n2\n2"):
        path.with_name("x.ds.metadata").write_text(text, encoding="utf-8")
        assert contents(open_store(path)) == [[], [5, 6], []]
    path.with_name("x.ds.metadata").unlink()
    assert contents(open_store(path)) == [[], [5, 6], []]


def test_a_large_datatrove_index_stays_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [[5, 6], [], [7], [8, 9, 10]]
    known = open_store(write_datatrove(tmp_path, documents, 4))
    monkeypatch.setattr(foreign, "WHOLE", 0)
    mapped = open_store(tmp_path / "x.ds")
    assert contents(mapped) == contents(known) == documents
    assert mapped.document_ids(1, 5).tolist() == known.document_ids(1, 5).tolist() == [0, 1, 2, 2, 2]


def damaged(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_bytes(change(path.read_bytes() if path.exists() else b""))

    return damage


def table(rows: str) -> Callable[[Path], None]:
    return damaged("x.csv.gz", lambda _: gzip.compress(rows.encode()))


@pytest.mark.parametrize(
    ("write", "damage", "message"),
    [
        (write_datatrove, damaged("x.ds", lambda d: d[:-1]), r"x.ds: 9 bytes are not 2 or 4 for each of the 5 tokens"),
        (write_datatrove, damaged("x.ds.index", lambda d: d[:-1]), r"x.ds.index: 15 bytes, expected 8 per document"),
        (write_datatrove, damaged("x.ds.index", lambda d: d[:-8]), r"x.ds: 10 bytes are not 2 or 4 for each of the 3"),
        (write_datatrove, damaged("x.ds.index", lambda d: b"\7" + d[1:]), r"index: document 1 ends before it starts"),
        (write_datatrove, damaged("x.ds.metadata", lambda d: b"gpt2|4\n5\n"), r"expected 5 tokens of 2 .* gpt2\|4 / 5"),
        (write_datatrove, damaged("x.ds.metadata", lambda d: b"gpt2|2\n6\n"), r"expected 5 tokens of 2 .* gpt2\|2 / 6"),
        (write_datatrove, damaged("x.ds.loss", lambda d: b"\1" * 5), r"x.ds.loss: per-token loss masks are not"),
        (write_datatrove, lambda folder: (folder / "x.ds.index").unlink(), r"x.ds.index: No such file"),
        (write_flat, damaged("x.npy", lambda d: d[:-1]), r"x.npy: a flat array whose beginning is neither uint16 nor"),
        (write_flat, damaged("x.npy", lambda d: b"\xff" * 8), r"neither uint16 nor uint32 ids of a vocabulary of 9"),
        (write_flat, damaged("x.npy", lambda d: bytes(8)), r"neither uint16 nor uint32 ids of a vocabulary of 9"),
        (
            write_flat,
            table("0,3\n4,5\n"),
            r"x.csv.gz: row 2 is tokens 4 to 5; the row before ends at 3, the file has 5",
        ),
        (write_flat, table("0,3\n3,6\n"), r"x.csv.gz: row 2 is tokens 3 to 6"),
        (write_flat, table("start,end\n"), r"x.csv.gz: not rows of start,end"),
        (write_flat, damaged("x.csv.gz", lambda d: b"0,5\n"), r"x.csv.gz: not rows of start,end: Not a gzipped file"),
        (write_numpy, damaged("x.npy", lambda d: d[:20]), r"x.npy: not a readable numpy file"),
        (
            lambda f, d, w: np.save(f / "x.npy", np.ones(3)),
            lambda f: None,
            r"expected integers \[n\], found float64 \[3\]",
        ),
        (lambda f, d, w: np.save(f / "x.npy", np.ones((2, 2), int)), lambda f: None, r"found int64 \[2, 2\]"),
        (lambda f, d, w: np.save(f / "x.npy", np.array([{}])), lambda f: None, r"not a readable numpy file"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, write: Writer, damage: Callable[[Path], None], message: str) -> None:
    write(tmp_path, [[4, 5, EOD], [6, EOD]], 2)
    damage(tmp_path)
    path = tmp_path / ("x.ds" if (tmp_path / "x.ds").exists() else "x.npy")
    with pytest.raises(DataError, match=message) as error:
        open_store(path, SMALL)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_paths_that_are_no_store(tmp_path: Path) -> None:
    (tmp_path / "code.idx").touch()
    for name in ("empty", "pairs"):
        (tmp_path / name).mkdir()
    (tmp_path / "pairs" / "code.idx").touch()
    (tmp_path / "out" / "code").mkdir(parents=True)
    (tmp_path / "out" / "code" / "manifest.json").touch()
    for path, message in [
        (tmp_path / "cod", r"cod: no store there: no .*/cod.idx; did you mean code\?"),
        (tmp_path / "code.bin", "give the prefix of the pair, .*/code$"),
        (
            tmp_path / "pairs",
            r"a folder, not a store; give one of its 1 \(first: code\), or make one of them all: .* merge ",
        ),
        (tmp_path / "empty", "a folder, not a store; it holds no .idx, .ds or .npy"),
        (tmp_path / "out", "give one of the prepared sources in it: code$"),
        (tmp_path / "a.ds", "a.ds: No such file"),
        (tmp_path / "a.npy", "a .npy file does not say where documents end; give its tokenizer"),
    ]:
        with pytest.raises(DataError, match=message):
            open_store(path)


def test_a_run_reads_them_as_it_reads_the_pair(prepared: Path, tmp_path: Path) -> None:
    store = Store(prepared / "code" / "train")
    documents = contents(store)
    tokenizer = Tokenizer.load(prepared / "tokenizer.json")
    shutil.copy(f"{store.prefix}.bin", tmp_path / "pair.bin")
    shutil.copy(f"{store.prefix}.idx", tmp_path / "pair.idx")
    paths = [str(tmp_path / "pair"), write_datatrove(tmp_path, documents, 2), write_numpy(tmp_path, documents, 4)]
    read = []
    for path in paths:
        cfg = DataConfig(tokenizer.path, 32, {"text": SourceConfig(path)})
        given = {"seed": 1, "batch_tokens": 64, "microbatch": 2, "dp_rank": 0, "dp_size": 1}
        loader = Loader(cfg, log=ScheduleLog.fixed({"text": 1}), **given)
        read.append([(token_hash(step.hashes), step.micro_batches[0].labels.tolist()) for step in loader.steps(0, 9)])
        assert open_train("text", path, cfg).tokens(0, 9).tolist() == store.tokens(0, 9).tolist()
    assert read[0] == read[1] == read[2] and len({digest for digest, _ in read[0]}) == 9
    table = {path: content_digest(path) for path in paths}
    assert len(set(table.values())) == 3
    with pytest.raises(DataError, match=r"x.npy: a flat array whose beginning is neither uint16 nor uint32"):
        write_flat(tmp_path, [[1000, 2000]], 2)
        Loader(cfg, log=ScheduleLog.fixed({"text": 1}), **given)
