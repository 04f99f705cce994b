"""metadata.json: shape and dtype of every tensor, and in which file each piece of it lies. Checked before use."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmtrain.checkpoint.manifest import FileRecord
from lmtrain.errors import DataError

METADATA = "metadata.json"
METADATA_VERSION = 1
DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.bool),
        *(torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.complex128, torch.complex64),
    )
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
Signature = tuple[tuple[int, ...], str]  # shape, dtype


def signature(name: str, tensor: object) -> Signature:
    """Shape and dtype as the files name them. Raises TypeError for what cannot be stored or filled in place."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"checkpoint tensor {name}: a {type(tensor).__name__} belongs into a document, not here")
    if tensor.dtype not in NAMES or tensor.is_meta or tensor.layout != torch.strided:
        raise TypeError(f"checkpoint tensor {name}: {tensor.dtype} {tensor.layout} on {tensor.device} cannot be stored")
    return tuple(tensor.shape), NAMES[tensor.dtype]


def check_table(table: object, files: Mapping[str, FileRecord], path: Path) -> dict[str, Any]:
    """``table`` (metadata.json), if it describes tensors that lie whole in ``files``. Raises DataError otherwise."""
    if not isinstance(table, dict) or table.get("format_version") != METADATA_VERSION:
        raise DataError(f"{path}: not a table of tensors in format {METADATA_VERSION}")
    tensors = table.get("tensors")
    if not isinstance(tensors, dict):
        raise DataError(f"{path}: tensors: expected an object")
    for name, entry in tensors.items():
        fault = _fault(entry, files)
        if fault:
            raise DataError(f"{path}: tensors: {name}: {fault}")
    return table


def _fault(entry: Any, files: Mapping[str, FileRecord]) -> str | None:
    if not isinstance(entry, dict) or entry.keys() != {"shape", "dtype", "chunks"}:
        return "expected shape, dtype and chunks"
    shape, dtype, chunks = entry["shape"], entry["dtype"], entry["chunks"]
    if not _lengths(shape) or dtype not in DTYPES or not isinstance(chunks, list):
        return f"shape {shape}, dtype {dtype}: not known"
    covered, seen = 0, set()
    for chunk in chunks:
        if not isinstance(chunk, dict) or chunk.keys() != {"offsets", "sizes", "file", "byte_offset", "bytes"}:
            return "chunk: expected offsets, sizes, file, byte_offset and bytes"
        offsets, sizes, where = chunk["offsets"], chunk["sizes"], [chunk["byte_offset"], chunk["bytes"]]
        if not (_lengths(offsets) and _lengths(sizes) and _lengths(where) and len(offsets) == len(sizes) == len(shape)):
            return f"chunk {offsets} + {sizes}: expected {len(shape)} numbers each"
        if any(o + s > n for o, s, n in zip(offsets, sizes, shape, strict=True)):
            return f"chunk {offsets} + {sizes} lies outside {shape}"
        if where[1] != math.prod(sizes) * DTYPES[dtype].itemsize:
            return f"chunk {offsets} + {sizes}: {where[1]} bytes are not its size"
        if chunk["file"] not in files or sum(where) > files[chunk["file"]].bytes:
            return f"chunk {offsets} + {sizes}: not in {chunk['file']}"
        covered += math.prod(sizes)
        seen.add(tuple(offsets))
    if covered != math.prod(shape) or len(seen) != len(chunks):
        return f"its chunks hold {covered} elements of {math.prod(shape)}"
    return None


def signatures(table: Mapping[str, Any]) -> dict[str, Signature]:
    return {name: (tuple(entry["shape"]), entry["dtype"]) for name, entry in table["tensors"].items()}


def compare(asked: Mapping[str, Signature], saved: Mapping[str, Signature], path: Path) -> None:
    """Raise one DataError with the first 5 differences between the tensors asked for and those of a checkpoint."""
    differences = []
    for name in sorted(asked.keys() | saved.keys()):
        if name not in saved:
            differences.append(f"{name}: missing in the checkpoint")
        elif name not in asked:
            differences.append(f"{name}: unexpected (in the checkpoint only)")
        else:
            for what, there, here in zip(("shape", "dtype"), saved[name], asked[name], strict=True):
                if there != here:
                    differences.append(f"{name}: {what} {there} in the checkpoint, {here} asked for")
    if differences:
        more = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise DataError(f"{path} is of another model: {'; '.join(differences[:5])}{more}")


def _lengths(value: object) -> bool:
    return isinstance(value, Iterable) and all(type(n) is int and n >= 0 for n in value)
