"""Tensors as raw little-endian bytes: one file per rank, and a table (metadata.json) that says where each piece lies.

DCP's planners decide who writes and who reads what, so a checkpoint loads on any mesh; bytes and table are ours, so
nothing is ever unpickled.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from lmtrain.checkpoint.commit import write_file
from lmtrain.checkpoint.manifest import FileRecord, Hasher
from lmtrain.checkpoint.storage import Storage, check_space
from lmtrain.checkpoint.table import DTYPES, METADATA_VERSION, NAMES, signature
from lmtrain.errors import DataError

WRITE_BLOCK = 16 << 20
# a single process is a normal case here, not a mistake
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)


@dataclass(frozen=True)
class Piece:
    """What this rank holds of one tensor, copied to the host; DCP's planner asks it what there is to write."""

    shape: torch.Size
    offsets: torch.Size
    data: Tensor

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        if self.data.numel() == 0 and self.shape.numel() > 0:
            return []
        chunk = ChunkStorageMetadata(offsets=self.offsets, sizes=self.data.shape)
        written = TensorWriteData(chunk, TensorProperties(dtype=self.data.dtype), self.shape)
        return [WriteItem(MetadataIndex(name, self.offsets), WriteItemType.SHARD, tensor_data=written)]


def stage(tensors: Mapping[str, Tensor]) -> dict[str, Piece]:
    """Copies on the host of what this rank holds: later changes of ``tensors`` are not seen. Raises TypeError."""
    pieces = {}
    for name, tensor in tensors.items():
        signature(name, tensor)
        local, offsets = tensor.detach(), torch.Size([0] * tensor.dim())
        if isinstance(tensor, DTensor):
            if tensor.device_mesh.get_coordinate() is None:
                continue
            (chunk,) = tensor.__create_chunk_list__()
            local, offsets = tensor.to_local().detach(), chunk.offsets
            if local.shape != chunk.sizes:
                raise TypeError(f"checkpoint tensor {name}: shard {tuple(local.shape)}, not {tuple(chunk.sizes)}")
        copy = torch.empty(local.shape, dtype=local.dtype, device="cpu").copy_(local)
        pieces[name] = Piece(tensor.shape, offsets, copy)
    return pieces


class PiecePlanner(dcp.DefaultSavePlanner):
    """DCP's save planner over ``Piece``s: replicas are written once, spread over the ranks."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        piece: Piece = self.state_dict[index.fqn]
        return piece.data


class ShardWriter(dcp.StorageWriter):
    """Writes this rank's pieces into one file; on the coordinator ``table`` is then what metadata.json must say."""

    def __init__(self, path: Path, rank: int, world: int, storage: Storage, hasher: Hasher) -> None:
        self.name = f"shard-{rank:05d}-of-{world:05d}.bin"
        self.record: FileRecord | None = None
        self.table: dict[str, Any] = {}
        self._path, self._storage, self._hasher = path, storage, hasher

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Refuse by StorageError, before any byte is written, what does not fit."""
        check_space(self._path, sum(_num_bytes(item) for plan in plans for item in plan.items), self._storage)
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results, end = [], 0
        for item in plan.items:
            assert item.tensor_data is not None
            chunk, size = item.tensor_data.chunk, _num_bytes(item)
            place = {"offsets": list(chunk.offsets), "sizes": list(chunk.sizes), "file": self.name}
            results.append(WriteResult(item.index, size, {**place, "byte_offset": end, "bytes": size}))
            end += size
        if plan.items:
            blocks = (block for item in plan.items for block in _blocks(planner, item))
            self.record = write_file(self._storage, self._path / self.name, blocks, self._hasher)
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        tensors: dict[str, Any] = {}
        for name, entry in sorted(metadata.state_dict_metadata.items()):
            assert isinstance(entry, TensorStorageMetadata)
            tensors[name] = {"shape": list(entry.size), "dtype": NAMES[entry.properties.dtype], "chunks": []}
        for result in sorted(
            (r for rank in results for r in rank), key=lambda r: (r.index.fqn, r.storage_data["offsets"])
        ):
            tensors[result.index.fqn]["chunks"].append(result.storage_data)
        self.table = {"format_version": METADATA_VERSION, "tensors": tensors}

    def reset(self, checkpoint_id: object = None) -> None: ...
    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...
    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        return False  # never chosen by DCP from a path; only handed over


class ShardReader(dcp.StorageReader):
    """Reads, of the files a checked ``table`` names, only the rows this rank asks for."""

    def __init__(self, path: Path, table: Mapping[str, Any], storage: Storage) -> None:
        self._path, self._tensors, self._storage = path, table["tensors"], storage

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        entries: dict[str, Any] = {}
        self._chunks: dict[MetadataIndex, dict[str, Any]] = {}
        for name, entry in self._tensors.items():
            chunks = [ChunkStorageMetadata(torch.Size(c["offsets"]), torch.Size(c["sizes"])) for c in entry["chunks"]]
            properties = TensorProperties(dtype=DTYPES[entry["dtype"]])
            entries[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
            self._chunks.update({MetadataIndex(name, c["offsets"]): c for c in entry["chunks"]})
        return Metadata(entries)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in sorted(plan.items, key=self._position):
            chunk = self._chunks[item.storage_index]
            dtype = DTYPES[self._tensors[item.storage_index.fqn]["dtype"]]
            target = planner.resolve_tensor(item).detach()
            if target.numel():
                target.copy_(self._read(chunk, dtype, item.storage_offsets, item.lengths))
            planner.commit_tensor(item, target)
        return _done(None)

    def _position(self, item: ReadItem) -> tuple[str, int]:
        chunk = self._chunks[item.storage_index]
        return chunk["file"], chunk["byte_offset"]

    def _read(
        self, chunk: Mapping[str, Any], dtype: torch.dtype, offsets: Sequence[int], lengths: Sequence[int]
    ) -> Tensor:
        sizes, start, size = chunk["sizes"], chunk["byte_offset"], chunk["bytes"]
        shape = list(sizes)
        if sizes:
            row = size // sizes[0]
            start, size, shape[0] = start + offsets[0] * row, lengths[0] * row, lengths[0]
        path = self._path / chunk["file"]
        data = self._storage.read(path, start, size)
        if len(data) != size:
            raise DataError(f"{path}: expected {size:,} bytes at {start:,}, got {len(data):,}")
        tensor = torch.frombuffer(data, dtype=dtype).reshape(shape)
        for dim in range(1, len(shape)):
            tensor = tensor.narrow(dim, offsets[dim], lengths[dim])
        return tensor

    def reset(self, checkpoint_id: object = None) -> None: ...
    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...
    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        return False


def _num_bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


def _blocks(planner: SavePlanner, item: WriteItem) -> Iterator[memoryview]:
    """The bytes of an item's host tensor, in blocks that stay in cache between writing and hashing."""
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, Tensor)
    data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data) if tensor.numel() else memoryview(b"")
    for start in range(0, data.nbytes, WRITE_BLOCK):
        yield data[start : start + WRITE_BLOCK]


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
