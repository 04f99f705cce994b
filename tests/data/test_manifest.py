"""The manifest of a prepared folder: what it promises is held against the files, at open, as they are read, in full."""

from __future__ import annotations

import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lmtrain.data.store import index, manifest, pieces
from lmtrain.data.store.manifest import SPLITS, Manifest, file_digest, file_entries, open_split, verify
from lmtrain.data.store.store import Store
from lmtrain.errors import DataError

FIXTURES = Path(__file__).parent / "fixtures"
Change = pytest.MonkeyPatch


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: Change) -> Path:
    """The stored folder with pieces of 64 bytes."""
    monkeypatch.setattr(pieces, "PIECE", 64)
    monkeypatch.setattr(pieces, "_READ", 64)
    shutil.copytree(FIXTURES / "prepared-v2", tmp_path / "tiny")
    entries = [entry for split in SPLITS for entry in file_entries(tmp_path / "tiny", split)]
    replace(Manifest.read(tmp_path / "tiny"), files=entries).write(tmp_path / "tiny")
    return tmp_path / "tiny"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_version_2_has_the_digest_of_every_piece() -> None:
    read = verify(FIXTURES / "prepared-v2")
    assert read.format_version == 2 and all(entry.pieces == [entry.xxh3_128] for entry in read.files)
    old = Manifest.read(FIXTURES / "prepared-v1" / "tiny")
    assert old.format_version == 1 and all(entry.pieces == [] for entry in old.files)
    store = open_split(FIXTURES / "prepared-v1" / "tiny", "train", old)
    assert store.num_documents == 4 and store.document(0).size


def test_digests_of_pieces(tmp_path: Path, monkeypatch: Change) -> None:
    monkeypatch.setattr(pieces, "PIECE", 8)
    monkeypatch.setattr(pieces, "_READ", 4)
    for size in (0, 1, 8, 9, 16, 23):
        content = bytes(range(size))
        (tmp_path / "x").write_bytes(content)
        whole, parts = pieces.digests(tmp_path / "x")
        assert parts == [pieces.xxhash.xxh3_128_hexdigest(content[at : at + 8]) for at in range(0, size, 8)]
        assert whole == file_digest(tmp_path / "x") == pieces.xxhash.xxh3_128_hexdigest(content)


def test_verify_says_which_piece_differs(folder: Path) -> None:
    verify(folder)
    for name, at in (("train.bin", 130), ("heldout.idx", 70)):
        flip(folder / name, at)
        message = rf"{name}: expected xxh3-128 \w+ of piece {at // 64} \(64 MiB from byte {at // 64 * 64}\), found"
        with pytest.raises(DataError, match=message):
            verify(folder)
        flip(folder / name, at)
    stated = Manifest.read(folder)
    entry = stated.file("train.bin")
    others = [each for each in stated.files if each.path != entry.path]
    replace(stated, files=[replace(entry, documents=5), *others]).write(folder)
    with pytest.raises(DataError, match="train: expected 86 tokens in 5 documents, found 86 in 4"):
        verify(folder)


def test_a_damaged_piece_stops_the_reader_that_meets_it(folder: Path) -> None:
    flip(folder / "train.bin", 130)
    store = pickle.loads(pickle.dumps(open_split(folder, "train", Manifest.read(folder))))
    assert store.tokens(0, 64).size == 64
    with pytest.raises(DataError, match=r"train.bin: expected xxh3-128 \w+ of piece 2"):
        store.tokens(60, 5)


def test_a_change_in_any_byte_of_a_prepared_index_is_found(folder: Path) -> None:
    """Also where the layout alone could not tell: a document of several sequences, a border moved."""
    documents = np.array([0, 2, 3, 4], dtype="<i8")
    whole = bytearray((folder / "train.idx").read_bytes())
    whole[26:34] = np.int64(len(documents)).tobytes()
    whole[34 + 12 * 4 :] = documents.tobytes()
    (folder / "train.idx").write_bytes(whole)
    assert Store(folder / "train").num_documents == 3
    entries = [entry for split in SPLITS for entry in file_entries(folder, split)]
    read = replace(Manifest.read(folder), files=entries)
    open_split(folder, "train", read)
    for at in range(len(whole)):
        for value in (1, 128, 255):
            (folder / "train.idx").write_bytes(whole[:at] + bytes([whole[at] ^ value]) + whole[at + 1 :])
            with pytest.raises(DataError, match=r"train.idx: differs from the manifest; restore .* verify FOLDER"):
                open_split(folder, "train", read)


def test_a_large_index_is_compared_as_it_is_read(folder: Path, monkeypatch: Change) -> None:
    monkeypatch.setattr(index, "WHOLE", 0)
    monkeypatch.setattr(manifest, "WHOLE", 0)
    read = Manifest.read(folder)
    assert open_split(folder, "train", read).document_starts[-1] == 86
    flip(folder / "train.idx", 34 + 4)  # the length of document 1, in the first piece
    with pytest.raises(DataError, match=r"train.idx: expected xxh3-128 \w+ of piece 0"):
        open_split(folder, "train", read).document(1)
    flip(folder / "train.idx", 34 + 4)
    whole = bytearray((folder / "train.idx").read_bytes())
    whole[17] = 3  # int16, where it was uint16: the same sizes
    (folder / "train.idx").write_bytes(whole)
    with pytest.raises(DataError, match=r"train.idx: expected xxh3-128 \w+ of piece 0"):
        open_split(folder, "train", read)
    (folder / "train.idx").unlink()
    with pytest.raises(DataError, match=r"train.idx: No such file"):
        open_split(folder, "train", read)


def test_a_file_beyond_memory_is_left_to_verify(
    folder: Path, monkeypatch: Change, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(manifest, "LAZY_BYTES", 100)
    flip(folder / "train.bin", 130)
    assert open_split(folder, "train", Manifest.read(folder)).num_tokens == 86
    assert "too large to be compared with its digests while it is read; python launch/prepare.py verify" in caplog.text
