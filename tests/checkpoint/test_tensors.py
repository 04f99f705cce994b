"""Every dtype and shape comes back bit for bit; a table that lies, or a model that differs, is refused in one line."""

from __future__ import annotations

import copy

import pytest
import torch

from lmtrain.checkpoint.manifest import FileRecord
from lmtrain.checkpoint.table import DTYPES, check_table, compare
from lmtrain.errors import DataError


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def test_round_trip_of_every_dtype_and_shape(make, tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = {"scalar": (), "vector": (7,), "empty": (0, 3), "cube": (2, 3, 5), "one": (1, 1)}
    saved = {
        f"{name}.{shape_name}": random_tensor(shape, dtype, generator)
        for name, dtype in DTYPES.items()
        for shape_name, shape in shapes.items()
    }
    saved["transposed"] = torch.randn(4, 6, generator=generator).t()
    saved["strided"] = torch.randn(40, generator=generator)[::4]
    saved["parameter"] = torch.nn.Parameter(torch.randn(3, generator=generator))
    first = make()
    first.save(1, saved, {})
    loaded = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    loaded["parameter"] = torch.nn.Parameter(torch.zeros(3))
    second = make()
    path = second.find("true")
    assert path == tmp_path / "checkpoints" / "step-00000001"
    second.load(path, loaded)
    for name, tensor in saved.items():
        assert bits(loaded[name].detach()) == bits(tensor.detach()), name


def test_tensors_larger_than_a_write_block(make, monkeypatch):
    monkeypatch.setattr("lmtrain.checkpoint.tensors.WRITE_BLOCK", 64)
    monkeypatch.setattr("lmtrain.checkpoint.commit.READ_BLOCK", 100)
    tensor = torch.arange(1000)
    make().save(1, {"x": tensor}, {})
    into = torch.zeros_like(tensor)
    make().load(make().find("true"), {"x": into})
    assert torch.equal(into, tensor)


@pytest.mark.parametrize("value", [3, "text", [torch.ones(2)], {"x": 1}, None, torch.ones(2, device="meta")])
def test_what_is_no_stored_tensor_is_refused(make, tmp_path, value):
    with pytest.raises(TypeError, match=r"checkpoint tensor model\.x"):
        make().save(1, {"model.x": value}, {})
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("document", [{1: "a"}, {"a": [{2: 3}]}, {"a": object()}, {"a": torch.ones(1)}])
def test_documents_that_json_would_change_are_refused(make, document):
    with pytest.raises(TypeError):
        make().save(1, {}, {"loop": document})


@pytest.mark.parametrize("name", ["manifest", "metadata", "../x", "a b", ""])
def test_document_names(make, name):
    with pytest.raises(ValueError, match="document"):
        make().save(1, {}, {name: {}})


def test_documents_come_back_equal(make):
    document = {"tokens": 2**70, "lr": 0.1 + 0.2, "text": "äöü \ud800 \n", "none": None, "list": [1, [2.5, True]]}
    make().save(1, {"x": torch.ones(1)}, {"loop": document, "data": []})
    assert make().load(make().find("true"), {"x": torch.zeros(1)}) == {"loop": document, "data": []}


def test_another_model_is_refused_by_one_line_with_five_differences(make, save, state):
    path = save(make(), 3)
    asked = {**state(0), "model.w": torch.zeros(2, 4)}
    del asked["optimizer.step.w"]
    asked.update({f"model.new{n}": torch.zeros(1) for n in range(5)})
    with pytest.raises(DataError) as raised:
        make().load(path, asked)
    text = str(raised.value)
    assert text.count("\n") == 0
    assert text.endswith("; and 2 more")
    assert "model.new0: missing in the checkpoint" in text
    with pytest.raises(DataError, match=r"model\.w: shape \(2, 3\) in the checkpoint, \(2, 4\) asked for"):
        make().load(path, {**state(0), "model.w": torch.zeros(2, 4)})
    with pytest.raises(DataError, match=r"model\.w: dtype float32 in the checkpoint, bfloat16 asked for"):
        make().load(path, {**state(0), "model.w": torch.zeros(2, 3, dtype=torch.bfloat16)})
    with pytest.raises(DataError, match=r"optimizer\.step\.w: unexpected"):
        make().load(path, {"model.w": torch.zeros(2, 3)})


def test_compare_says_nothing_when_all_is_equal(tmp_path):
    compare({"a": ((1,), "int8")}, {"a": ((1,), "int8")}, tmp_path)


CHUNK = {"offsets": [0, 0], "sizes": [2, 3], "file": "shard.bin", "byte_offset": 8, "bytes": 24}
TABLE = {"format_version": 1, "tensors": {"w": {"shape": [2, 3], "dtype": "float32", "chunks": [CHUNK]}}}


def changed(**values):
    table = copy.deepcopy(TABLE)
    table["tensors"]["w"]["chunks"][0].update(values)
    return table


def entry(**values):
    return {"format_version": 1, "tensors": {"w": {**TABLE["tensors"]["w"], **values}}}


@pytest.mark.parametrize(
    "table",
    [
        [],
        {"format_version": 2, "tensors": {}},
        {"format_version": 1, "tensors": []},
        {"format_version": 1, "tensors": {"w": 3}},
        entry(dtype="object"),
        entry(shape=[2, "3"]),
        entry(shape=[2, 4]),
        entry(shape=[-2, -3]),
        entry(chunks=None),
        entry(chunks=[3]),
        entry(chunks=[]),
        entry(chunks=[CHUNK, CHUNK], shape=[4, 3]),
        entry(more=1),
        changed(more=1),
        changed(offsets=[0]),
        changed(offsets=[1, 0]),
        changed(offsets=[True, 0]),
        changed(sizes=[2, 2]),
        changed(file="../../etc/passwd"),
        changed(byte_offset=9),
        changed(byte_offset=-8),
        changed(bytes=23),
    ],
)
def test_tables_that_lie_are_refused(tmp_path, table):
    files = {"shard.bin": FileRecord(32, "")}
    assert check_table(TABLE, files, tmp_path) == TABLE
    with pytest.raises(DataError, match=str(tmp_path)):
        check_table(table, files, tmp_path)
