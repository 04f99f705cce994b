"""The token store: byte-exact format, round trips, damage refused with a reason, and stores larger than memory."""

from __future__ import annotations

import errno
import os
import pickle
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.sparse_store import write_sparse_store
from lmtrain.data.store import index, pieces
from lmtrain.data.store import merge as merge_module
from lmtrain.data.store import store as store_module
from lmtrain.data.store.index import DTYPES, HEADER, Index
from lmtrain.data.store.store import Store, StoreWriter, smallest_dtype
from lmtrain.errors import DataError

DOCUMENTS = [[7, 8], [], [9, 100, 0]]
START = "4d4d4944494458 0000 0100000000000000"  # MMIDIDX, version 1
COUNTS = "0300000000000000 0400000000000000"  # sequences, documents + 1
LENGTHS = "02000000 00000000 03000000"
BORDERS = "0000000000000000 0100000000000000 0200000000000000 0300000000000000"  # first sequence of each document
GOLDEN = {  # dtype code -> byte offsets of the sequences in .idx, .bin
    1: ("0000000000000000 0200000000000000 0200000000000000", "07 08 09 64 00"),
    2: ("0000000000000000 0200000000000000 0200000000000000", "07 08 09 64 00"),
    3: ("0000000000000000 0400000000000000 0400000000000000", "0700 0800 0900 6400 0000"),
    4: ("0000000000000000 0800000000000000 0800000000000000", "07000000 08000000 09000000 64000000 00000000"),
    5: (
        "0000000000000000 1000000000000000 1000000000000000",
        "0700000000000000 0800000000000000 0900000000000000 6400000000000000 0000000000000000",
    ),
    8: ("0000000000000000 0400000000000000 0400000000000000", "0700 0800 0900 6400 0000"),
}
FIXED = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def golden_index(code: int) -> bytes:
    return bytes.fromhex(f"{START} {code:02x} {COUNTS} {LENGTHS} {GOLDEN[code][0]} {BORDERS}")


def write(prefix: Path, documents: list[list[int]], vocab_size: int = 500, dtype: np.dtype | None = None) -> Store:
    with StoreWriter(prefix, vocab_size, dtype) as writer:
        for document in documents:
            writer.add(np.array(document, dtype=np.int64))
    return Store(prefix)


def index_bytes(code: int, lengths: list[int], documents: list[int]) -> bytes:
    """The layout of docs/formats.md, written down a second time; a document may hold several sequences."""
    offsets = [sum(lengths[:i]) * DTYPES[code].itemsize for i in range(len(lengths))]
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, len(lengths), len(documents))
    arrays = (("i", lengths), ("q", offsets), ("q", documents))
    return header + b"".join(struct.pack(f"<{len(values)}{kind}", *values) for kind, values in arrays)


def contents(store: Store) -> list[list[int]]:
    return [store.document(j).tolist() for j in range(store.num_documents)]


@pytest.mark.parametrize("code", sorted(GOLDEN))
def test_three_documents_byte_for_byte(tmp_path: Path, code: int) -> None:
    store = write(tmp_path / "x", DOCUMENTS, 128, DTYPES[code])
    assert (tmp_path / "x.idx").read_bytes() == golden_index(code) == index_bytes(code, [2, 0, 3], [0, 1, 2, 3])
    assert (tmp_path / "x.bin").read_bytes() == bytes.fromhex(GOLDEN[code][1])
    assert contents(store) == DOCUMENTS and store.document_starts.tolist() == [0, 2, 2, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]
    os.rename(tmp_path / "x.idx", tmp_path / "y.idx")
    os.rename(tmp_path / "x.bin", tmp_path / "y.bin")
    assert contents(pickle.loads(pickle.dumps(Store(tmp_path / "y")))) == DOCUMENTS


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from(sorted(DTYPES)))
def test_round_trip_of_every_dtype(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, code: int) -> None:
    top = int(min(np.iinfo(DTYPES[code]).max, 2**31 - 1))
    documents = data.draw(st.lists(st.lists(st.integers(0, top), max_size=40), max_size=8))
    prefix = tmp_path_factory.mktemp("store") / "x"
    store = write(prefix, documents, top + 1, DTYPES[code])
    assert store.dtype == DTYPES[code] and contents(store) == documents
    lengths = [len(document) for document in documents]
    assert Path(f"{prefix}.idx").read_bytes() == index_bytes(code, lengths, list(range(len(lengths) + 1)))
    flat = [token for document in documents for token in document]
    owner = [j for j, document in enumerate(documents) for _ in document]
    for start in range(len(flat)):
        ids = store.document_ids(start, len(flat) - start)
        assert np.array_equal(np.diff(ids) > 0, np.diff(owner[start:]) > 0) and ids[0] == 0
    with StoreWriter(prefix, top + 1, DTYPES[code]) as writer:  # several documents at once: the same files
        writer.extend(np.array(flat, dtype=np.int64), np.array(lengths, dtype=np.int64))
    assert Path(f"{prefix}.idx").read_bytes() == index_bytes(code, lengths, list(range(len(lengths) + 1)))
    assert contents(Store(prefix)) == documents


def test_windows_overlap_by_their_last_target(tmp_path: Path) -> None:
    store = write(tmp_path / "x", [list(range(10)), list(range(10, 21))])
    assert store.num_windows(5) == 4
    assert store.window(1, 5).tolist() == [5, 6, 7, 8, 9, 10]
    with pytest.raises(IndexError):
        store.window(4, 5)
    copy = store.window(0, 5)
    del store
    assert copy.flags.owndata and copy.sum() == 15


def test_several_sequences_per_document_and_modes(tmp_path: Path) -> None:
    (tmp_path / "x.idx").write_bytes(index_bytes(8, [2, 1, 2], [0, 2, 3]) + b"\0\1\0")
    (tmp_path / "x.bin").write_bytes(np.arange(5, dtype="<u2").tobytes())
    assert contents(Store(tmp_path / "x")) == [[0, 1, 2], [3, 4]]


def test_offsets_beyond_two_gigatokens(tmp_path: Path) -> None:
    (tmp_path / "x.idx").write_bytes(index_bytes(8, [2**31 - 1, 5], [0, 1, 2]))
    with open(tmp_path / "x.bin", "wb") as file:  # sparse: takes no room
        file.seek(2 * (2**31 - 1))
        file.write(np.arange(5, dtype="<u2").tobytes())
    assert Store(tmp_path / "x").document(1).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda idx, bin_: (b"TNTIDX\0\0" + idx, bin_), "old TNTIDX"),
        (lambda idx, bin_: (b"PK\3\4" + idx, bin_), "not a Megatron index"),
        (lambda idx, bin_: (idx[:20], bin_), "not a Megatron index"),
        (lambda idx, bin_: (idx[:9] + b"\2" + idx[10:], bin_), "index version 2"),
        (lambda idx, bin_: (idx[:17] + b"\7" + idx[18:], bin_), "dtype code 7"),
        (lambda idx, bin_: (idx[:-1], bin_), "expected 102 bytes for 3 sequences, found 101"),
        (lambda idx, bin_: (idx, bin_[:-2]), "expected 10 bytes from the .idx, found 8"),
        (lambda idx, bin_: (idx, bin_ + b"\0"), "expected 10 bytes from the .idx, found 11"),
        (lambda idx, bin_: (idx[:17] + b"\1" + idx[18:], bin_), "byte offset of sequence 1"),
        (lambda idx, bin_: (idx[:38] + idx[34:38] + idx[42:], bin_), "byte offset of sequence 2"),
        (lambda idx, bin_: (idx[:34] + b"\xff\xff\xff\xff" + idx[38:], bin_), "sequence 0 has a negative length"),
        (lambda idx, bin_: (idx[:78] + idx[86:94] + idx[86:], bin_), "document 0 does not hold exactly one sequence"),
        (lambda idx, bin_: (idx[:78] + idx[86:94] + idx[78:86] + idx[94:], bin_), "must rise from 0 to 3"),
        (lambda idx, bin_: (idx[:70] + idx[78:86] + idx[70:78] + idx[86:], bin_), "must rise from 0 to 3"),
        (lambda idx, bin_: (idx[:-8] + bytes(8), bin_), "must rise from 0 to 3"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: object, message: str) -> None:
    write(tmp_path / "x", DOCUMENTS)
    changed, tokens = damage((tmp_path / "x.idx").read_bytes(), (tmp_path / "x.bin").read_bytes())  # type: ignore[operator]
    (tmp_path / "x.idx").write_bytes(changed)
    (tmp_path / "x.bin").write_bytes(tokens)
    with pytest.raises(DataError, match=message) as error:
        Store(tmp_path / "x")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(("code", "other"), [(8, 3), (4, None)])
def test_every_changed_byte_of_an_index_is_found_or_harmless(tmp_path: Path, code: int, other: int | None) -> None:
    """All 255 x 102 of them. What is read back is the same documents, or an error."""
    write(tmp_path / "x", DOCUMENTS, 128, DTYPES[code])
    whole = golden_index(code)
    harmless = []
    for at in range(len(whole)):
        for value in set(range(256)) - {whole[at]}:
            damaged = whole[:at] + bytes([value]) + whole[at + 1 :]
            try:
                Index(damaged, "x.idx").check()
            except DataError:
                continue
            (tmp_path / "x.idx").write_bytes(damaged)
            try:
                store = Store(tmp_path / "x")
            except DataError:
                continue
            assert contents(store) == DOCUMENTS
            harmless.append((at, value))
    assert harmless == ([] if other is None else [(17, other)])  # the signed twin: the same ids, all below its middle


def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    assert smallest_dtype(65536) == np.uint16 and smallest_dtype(65537) == np.int32
    with pytest.raises(DataError, match=r"document 1 has token ids -1\.\.3"), StoreWriter(tmp_path / "x", 10) as writer:
        writer.add(np.array([1]))
        writer.add(np.array([3, -1]))
    with pytest.raises(DataError, match=r"document 2 has token ids 10\.\.10"), StoreWriter(tmp_path / "x", 10) as more:
        more.extend(np.array([1, 2, 3, 10]), np.array([3, 0, 1]))
    assert not list(tmp_path.iterdir())
    store = write(tmp_path / "x", [[1, 2], [3, 400]])
    store.check_range(500)
    with pytest.raises(DataError, match="token id 400 at token 1 of document 1 is outside the vocabulary of 400"):
        store.check_range(400)
    wide = write(tmp_path / "w", [[1], [2, 2**32 + 5]], 2**40, DTYPES[5])
    with pytest.raises(DataError, match="token id 4294967301 at token 1 of document 1"):
        wide.tokens(0, 3)  # as int32 it would be 5


def test_passes_over_a_store_in_small_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [[1] * n for n in (3, 0, 0, 9, 1, 2, 0, 5, 4, 0)]
    store = write(tmp_path / "x", documents)
    whole = (tmp_path / "x.idx").read_bytes(), (tmp_path / "x.bin").read_bytes()
    for module in (store_module, merge_module):
        monkeypatch.setattr(module, "READ_TOKENS", 4)
    monkeypatch.setattr(store_module, "READ_DOCUMENTS", 3)
    monkeypatch.setattr(index, "_STEP", 3)
    assert [(at, lengths.tolist()) for at, lengths in store.document_lengths()] == [
        (0, [3, 0, 0]), (3, [9, 1, 2]), (6, [0, 5, 4]), (9, [0]),
    ]  # fmt: skip
    assert [start for start, _ in store.pieces()] == [0, 4, 8, 12, 16, 20]
    merge_module._write(tmp_path / "y", [store], 500)
    assert whole == ((tmp_path / "y.idx").read_bytes(), (tmp_path / "y.bin").read_bytes())
    with StoreWriter(tmp_path / "z", 500) as writer, pytest.raises(ValueError, match="3 tokens for documents of 2"):
        writer.extend(np.array([1, 2, 3]), np.array([1, 1]))


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "x", DOCUMENTS)
    assert not list(tmp_path.iterdir())


@FIXED
@given(st.lists(st.integers(0, 9), max_size=30), st.data())
def test_a_mapped_index_answers_as_one_in_memory(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, lengths: list[int], data: st.DataObject
) -> None:
    borders = [0, *sorted(data.draw(st.lists(st.integers(0, len(lengths)), max_size=40))), len(lengths)]
    documents = data.draw(st.sampled_from([list(range(len(lengths) + 1)), borders]))
    prefix = tmp_path_factory.mktemp("store") / "x"
    Path(f"{prefix}.idx").write_bytes(index_bytes(8, lengths, documents))
    Path(f"{prefix}.bin").write_bytes(np.arange(sum(lengths), dtype="<u2").tobytes())
    if len(documents) == len(lengths) + 1 and documents != list(range(len(lengths) + 1)):
        return  # refused: see the exhaustive test
    known = Store(prefix)
    monkeypatch.setattr(index, "WHOLE", 0)
    monkeypatch.setattr(index, "_STEP", 7)
    mapped = Store(prefix)
    monkeypatch.undo()
    assert contents(mapped) == contents(known)
    assert mapped.document_starts.tolist() == known.document_starts.tolist()
    for start in range(mapped.num_tokens):
        count = mapped.num_tokens - start
        assert np.array_equal(mapped.document_ids(start, count), known.document_ids(start, count))
        assert str(mapped.out_of_range(start, 3)) == str(known.out_of_range(start, 3))


def test_a_mapped_index_is_checked_where_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "WHOLE", 0)
    write(tmp_path / "x", [[1, 2, 3]] * 50)
    whole = bytearray((tmp_path / "x.idx").read_bytes())
    whole[HEADER.size + 4 * 20] = 2  # length of sequence 20
    (tmp_path / "x.idx").write_bytes(whole)
    store = Store(tmp_path / "x")
    assert store.document(5).tolist() == [1, 2, 3] and store.document_ids(90, 12)[-1] == 3
    with pytest.raises(DataError, match="byte offset of sequence 21"):
        store.document_ids(58, 12)
    with pytest.raises(DataError, match="byte offset of sequence 21"):
        Index.open(str(tmp_path / "x.idx")).check()
    for damage in (HEADER.size + 12 * 50, len(whole) - 1, HEADER.size - 1):
        ends = bytearray(whole)
        ends[damage] ^= 1
        (tmp_path / "x.idx").write_bytes(ends)
        with pytest.raises(DataError):
            Store(tmp_path / "x")


def test_a_store_of_a_billion_documents_opens_in_constant_memory(tmp_path: Path) -> None:
    """Sparse files: 20 GB of index that take a few kilobytes on disk; all documents but the last are empty."""
    write_sparse_store(tmp_path / "x", documents=10**9, filled=1000, length=300)
    assert os.path.getsize(tmp_path / "x.idx") > 20e9
    tracemalloc.start()
    store = Store(tmp_path / "x")
    assert (store.num_documents, store.num_tokens) == (10**9, 300_000)
    assert store.document_ids(299_000, 1000).tolist() == [(t + 200) // 300 for t in range(1000)]
    assert store.document(10**9 - 1).tolist() == store.window(0, 299).tolist() == [*range(1, 300), 0]
    assert "token 7 of document 999999001" in str(store.out_of_range(307, 5))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    with pytest.raises(DataError, match="document 0 does not hold exactly one sequence"):
        Index.open(f"{tmp_path / 'x'}.idx").check_documents(0, 1000)


def test_a_piece_is_compared_when_it_is_first_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 256)
    monkeypatch.setattr(pieces, "_READ", 64)
    monkeypatch.setattr(index, "WHOLE", 0)
    write(tmp_path / "x", [list(range(j, j + 10)) for j in range(60)])
    expected = [pieces.digests(tmp_path / f"x{suffix}")[1] for suffix in (".bin", ".idx")]
    assert [len(each) for each in expected] == [5, 5]
    store = pickle.loads(pickle.dumps(Store(tmp_path / "x", *expected)))
    read: list[int] = []
    check = pieces.PieceCheck._check
    monkeypatch.setattr(pieces.PieceCheck, "_check", lambda self, piece: (read.append(piece), check(self, piece)))
    store.tokens(120, 20)
    store.tokens(100, 10)
    store.tokens(130, 300)
    assert read == [0, 1, 2, 3]
    for suffix, at in ((".bin", 3 * 256 + 5), (".idx", 3 * 256 + 5)):
        whole = bytearray((tmp_path / f"x{suffix}").read_bytes())
        whole[at] ^= 1
        (tmp_path / f"x{suffix}").write_bytes(whole)
        damaged = Store(tmp_path / "x", *expected)
        damaged.tokens(0, 384)
        message = rf"x{suffix}: expected xxh3-128 \w+ of piece 3 \(64 MiB from byte 768\), found"
        with pytest.raises(DataError, match=message):
            damaged.tokens(383, 2)
            damaged.document_starts  # noqa: B018 (reads the index)
        whole[at] ^= 1
        (tmp_path / f"x{suffix}").write_bytes(whole)
    with pytest.raises(DataError, match=r"x.bin: 1,200 bytes, the manifest has 4 digests of it"):
        Store(tmp_path / "x", expected[0][:-1])
