"""The token store: byte-exact format, round trips, and every damage refused with a reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.data.store import DTYPES, Store, StoreWriter, index_bytes, parse_index, smallest_dtype
from lmtrain.errors import DataError

GOLDEN = bytes.fromhex(
    "4d4d4944494458 0000"  # MMIDIDX
    "0100000000000000"  # version
    "08"  # uint16
    "0300000000000000"  # sequences
    "0400000000000000"  # documents + 1
    "02000000 00000000 03000000"  # lengths
    "0000000000000000 0400000000000000 0400000000000000"  # byte offsets
    "0000000000000000 0100000000000000 0200000000000000 0300000000000000"  # first sequence of each document
)
DOCUMENTS = [[7, 8], [], [9, 300, 0]]


def write(prefix: Path, documents: list[list[int]], vocab_size: int = 500, dtype: np.dtype | None = None) -> Store:
    with StoreWriter(prefix, vocab_size, dtype) as writer:
        for document in documents:
            writer.add(np.array(document, dtype=np.int64))
    return Store(prefix)


def test_three_documents_byte_for_byte(tmp_path: Path) -> None:
    store = write(tmp_path / "x", DOCUMENTS)
    assert (tmp_path / "x.idx").read_bytes() == GOLDEN
    assert (tmp_path / "x.bin").read_bytes() == bytes.fromhex("0700 0800 0900 2c01 0000")
    assert [store.document(j).tolist() for j in range(3)] == DOCUMENTS
    assert store.document_starts.tolist() == [0, 2, 2, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from(sorted(DTYPES)))
def test_round_trip_of_every_dtype(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, code: int) -> None:
    top = int(min(np.iinfo(DTYPES[code]).max, 2**31 - 1))
    documents = data.draw(st.lists(st.lists(st.integers(0, top), max_size=40), max_size=8))
    store = write(tmp_path_factory.mktemp("store") / "x", documents, top + 1, DTYPES[code])
    assert store.dtype == DTYPES[code]
    assert [store.document(j).tolist() for j in range(store.num_documents)] == documents
    flat = [token for document in documents for token in document]
    owner = [j for j, document in enumerate(documents) for _ in document]
    for start in range(len(flat)):
        ids = store.document_ids(start, len(flat) - start)
        assert np.array_equal(np.diff(ids) > 0, np.diff(owner[start:]) > 0) and ids[0] == 0


def test_windows_overlap_by_their_last_target(tmp_path: Path) -> None:
    store = write(tmp_path / "x", [list(range(10)), list(range(10, 21))])
    assert store.num_windows(5) == 4
    assert store.window(1, 5).tolist() == [5, 6, 7, 8, 9, 10]
    assert store.windows(np.array([3, 0]), 5).tolist() == [[15, 16, 17, 18, 19, 20], [0, 1, 2, 3, 4, 5]]
    with pytest.raises(IndexError):
        store.window(4, 5)
    copy = store.window(0, 5)
    del store
    assert copy.flags.owndata and copy.sum() == 15


def test_several_sequences_per_document_and_modes(tmp_path: Path) -> None:
    index = index_bytes(DTYPES[8], np.array([2, 1, 2]), np.array([0, 2, 3]))
    (tmp_path / "x.idx").write_bytes(index + b"\0\1\0")
    (tmp_path / "x.bin").write_bytes(np.arange(5, dtype="<u2").tobytes())
    assert [Store(tmp_path / "x").document(j).tolist() for j in range(2)] == [[0, 1, 2], [3, 4]]


def test_offsets_beyond_two_gigatokens(tmp_path: Path) -> None:
    lengths = np.array([2**31 - 1, 5])
    (tmp_path / "x.idx").write_bytes(index_bytes(DTYPES[8], lengths, np.arange(3)))
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
        (lambda idx, bin_: (idx[:38] + idx[34:38] + idx[42:], bin_), "byte offset of sequence 2"),
        (lambda idx, bin_: (idx[:34] + b"\xff\xff\xff\xff" + idx[38:], bin_), "sequence 0 has a negative length"),
        (lambda idx, bin_: (idx[:78] + idx[86:94] + idx[78:86] + idx[94:], bin_), "must rise from 0 to 3"),
        (lambda idx, bin_: (idx[:-8] + bytes(8), bin_), "must rise from 0 to 3"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: object, message: str) -> None:
    write(tmp_path / "x", DOCUMENTS)
    index, tokens = damage((tmp_path / "x.idx").read_bytes(), (tmp_path / "x.bin").read_bytes())  # type: ignore[operator]
    (tmp_path / "x.idx").write_bytes(index)
    (tmp_path / "x.bin").write_bytes(tokens)
    with pytest.raises(DataError, match=message) as error:
        Store(tmp_path / "x")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_every_flipped_byte_of_an_index_is_found_or_harmless(tmp_path: Path) -> None:
    write(tmp_path / "x", DOCUMENTS)
    index = bytearray((tmp_path / "x.idx").read_bytes())
    harmless = []
    for at in range(len(index)):
        for value in range(256):
            if value == index[at]:
                continue
            damaged = bytes(index[:at]) + bytes([value]) + bytes(index[at + 1 :])
            try:
                parse_index(damaged, "x.idx")
                (tmp_path / "x.idx").write_bytes(damaged)
                store = Store(tmp_path / "x")
            except DataError:
                continue
            assert [store.document(j).tolist() for j in range(store.num_documents)] == DOCUMENTS
            harmless.append((at, value))
    assert harmless == [(17, 3)]  # int16 instead of uint16: the same tokens, all below 32768


def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    assert smallest_dtype(65536) == np.uint16 and smallest_dtype(65537) == np.int32
    with pytest.raises(DataError, match=r"document 1 has token ids -1\.\.3"), StoreWriter(tmp_path / "x", 10) as writer:
        writer.add(np.array([1]))
        writer.add(np.array([3, -1]))
    assert not list(tmp_path.iterdir())
    store = write(tmp_path / "x", [[1, 2], [3, 400]])
    store.check_range(500)
    with pytest.raises(DataError, match="token id 400 at token 1 of document 1 is outside the vocabulary of 400"):
        store.check_range(400)
