"""Weights as safetensors: a header, then one tensor after the other, each made when its turn comes.

Format: 8 bytes little-endian length of the JSON header ``{name: {dtype, shape, data_offsets}, __metadata__}``, the
header padded to 8 bytes with spaces, then the buffers without holes (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lmtrain.checkpoint.checkpointer import HASHER
from lmtrain.checkpoint.commit import write_file
from lmtrain.checkpoint.manifest import FileRecord
from lmtrain.checkpoint.storage import LocalStorage
from lmtrain.hub.table import Rule, to_disk

SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
Entry = tuple[str, torch.dtype, tuple[int, ...]]


def write_weights(
    folder: Path, rules: Sequence[Rule], ours: Mapping[str, Tensor], dtype: torch.dtype, shard_bytes: int = SHARD_BYTES
) -> dict[str, FileRecord]:
    """Write ``ours`` under the names on disk, in ``dtype`` unless a rule keeps fp32; the files by name.

    A new shard begins where the next rule's tensors would not fit: what one rule makes (the experts of a layer, say)
    stays together, even where that alone is more than ``shard_bytes``.
    """
    meta = {name: tensor.to("meta") for name, tensor in ours.items()}
    shards: list[list[tuple[Rule, list[Entry]]]] = [[]]
    filled = 0
    for rule in rules:
        kept = torch.float32 if rule.keep_fp32 else dtype
        entries = [(name, kept, tuple(tensor.shape)) for name, tensor in to_disk([rule], meta)]
        size = sum(_bytes(entry) for entry in entries)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((rule, entries))
        filled += size
    records: dict[str, FileRecord] = {}
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        shard.sort(key=lambda item: -item[1][0][1].itemsize)  # keeps every tensor aligned to its element
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        records[name] = write_file(LocalStorage(), folder / name, _chunks(shard, ours), HASHER)
        where |= {entry[0]: name for _, entries in shard for entry in entries}
    if len(shards) > 1:
        total = sum(_bytes(entry) for shard in shards for _, entries in shard for entry in entries)
        index = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1).encode()
        records[INDEX] = write_file(LocalStorage(), folder / INDEX, [index], HASHER)
    return records


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of an export by their names on disk."""
    index = folder / INDEX
    files = {"model.safetensors"}
    if index.exists():
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    found: dict[str, Tensor] = {}
    for name in sorted(files):
        with safe_open(folder / name, framework="pt") as shard:
            found |= {key: shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118 (a handle, not a dict)
    return found


def _bytes(entry: Entry) -> int:
    _, dtype, shape = entry
    return torch.Size(shape).numel() * dtype.itemsize


def _chunks(shard: Sequence[tuple[Rule, list[Entry]]], ours: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for _, entries in shard:
        for entry in entries:
            name, dtype, shape = entry
            size = _bytes(entry)
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
            at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for rule, entries in shard:
        for (_, dtype, _), (_, tensor) in zip(entries, to_disk([rule], ours), strict=True):
            flat = tensor.detach().to("cpu", dtype).contiguous().reshape(-1)
            yield memoryview(flat.view(torch.uint8).numpy().data)
