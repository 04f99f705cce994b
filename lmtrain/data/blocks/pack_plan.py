"""Which documents share a block, planned once (best_fit.py) and kept on disk.

The plan of ``PREFIX`` for blocks of L inputs is the folder ``PREFIX.pack-L`` (docs/formats.md). It holds positions, no
tokens, and names the store it belongs to.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from lmtrain.data.blocks.best_fit import best_fit, cut
from lmtrain.data.store.arrays import write_array
from lmtrain.data.store.pieces import PieceCheck, digests
from lmtrain.data.store.store import Store, sync_folder
from lmtrain.errors import DataError, StorageError

FORMAT_VERSION = 1
ALGORITHM = "best_fit_decreasing/1"
"""With its version: raised whenever the same store and length would give another plan."""
HEADER = "plan.json"
ARRAYS = {"blocks": "<i8", "starts": "<i8", "lengths": "<i4"}


@dataclass(frozen=True)
class PlanHeader:
    """``plan.json``. borders: xxh3-128 over the store's document borders as int64, which alone decide the plan; tokens,
    documents: of the store. num_padding: columns that hold no token. digests: per array, of its 64 MiB pieces."""

    length: int
    algorithm: str
    borders: str
    tokens: int
    documents: int
    num_blocks: int
    num_pieces: int
    num_padding: int
    digests: dict[str, list[str]]
    format_version: int = FORMAT_VERSION


class PackPlan:
    """A plan on disk, mapped. Block p holds the pieces ``[blocks[p], blocks[p + 1])``; ``starts`` and ``lengths`` are
    each piece's first token and number of tokens."""

    def __init__(self, folder: Path, header: PlanHeader) -> None:
        self.folder, self.header = folder, header
        self.num_blocks = header.num_blocks
        self._arrays: dict[str, np.memmap] = {}
        self._checks: dict[str, PieceCheck] = {}
        sizes = {"blocks": header.num_blocks + 1, "starts": header.num_pieces, "lengths": header.num_pieces}
        for name, kind in ARRAYS.items():
            path = folder / f"{name}.npy"
            try:
                self._checks[name] = PieceCheck(path, header.digests[name])
                self._checks[name](0, 128)  # numpy's own header, before it is trusted
                loaded = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, KeyError) as error:
                raise DataError(f"{path}: not readable: {error}") from None
            if loaded.dtype != kind or loaded.shape != (sizes[name],):
                raise DataError(f"{path}: expected {sizes[name]} x {kind}, found {loaded.shape} x {loaded.dtype}")
            self._arrays[name] = loaded

    @classmethod
    def open(cls, store: Store, length: int) -> PackPlan:
        """The plan of ``store`` for blocks of ``length`` inputs. DataError if there is none, or another's."""
        folder = plan_folder(store, length)
        path = folder / HEADER
        where = os.path.dirname(store.prefix) if os.path.basename(store.prefix) == "train" else store.prefix
        command = f"python launch/prepare.py pack {where} length={length}"
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
            if row["format_version"] > FORMAT_VERSION:
                raise DataError(f"{path}: format_version {row['format_version']}, this version reads {FORMAT_VERSION}")
            header = PlanHeader(**row)
        except FileNotFoundError:
            raise DataError(f"{folder}: no plan for blocks of {length} tokens; make it: {command}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a plan: {error}") from None
        known = (header.length, header.tokens, header.documents)
        if known != (length, store.num_tokens, store.num_documents) or header.borders != borders_digest(store):
            raise DataError(f"{folder}: a plan of another store or length; remove the folder, then: {command}")
        if header.algorithm != ALGORITHM:
            raise DataError(
                f"{folder}: made by {header.algorithm}, this version of lmtrain plans by {ALGORITHM}; "
                f"go on with the version that made it, or remove the folder, then: {command}"
            )
        return cls(folder, header)

    def block(self, p: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First tokens and lengths of the pieces of block p, int64 ``[n]`` each."""
        first, stop = self._read("blocks", p, p + 2).tolist()
        return self._read("starts", first, stop), self._read("lengths", first, stop)

    @property
    def digest(self) -> str:
        """xxh3-128, hex, of what the plan says: which pieces lie in which block of which store."""
        content = [self.header.borders, *(self.header.digests[name] for name in ARRAYS)]
        return xxhash.xxh3_128_hexdigest(json.dumps(content).encode())

    def verify(self) -> None:
        """Compare all of it with its digests."""
        for check in self._checks.values():
            check.all()

    def _read(self, name: str, first: int, stop: int) -> NDArray[np.int64]:
        values = self._arrays[name]
        self._checks[name](values.offset + first * values.itemsize, values.offset + stop * values.itemsize)
        return values[first:stop].astype(np.int64)


def plan_folder(store: Store, length: int) -> Path:
    """Where the plan of ``store`` lies."""
    return Path(f"{store.prefix}.pack-{length}")


def plans(store: Store) -> list[int]:
    """Lengths for which a plan lies beside ``store``."""
    prefix = Path(store.prefix)
    ends = [path.name.removeprefix(f"{prefix.name}.pack-") for path in prefix.parent.glob(f"{prefix.name}.pack-*")]
    return sorted(int(end) for end in ends if end.isdecimal())


def borders_digest(store: Store) -> str:
    """xxh3-128, hex, over the length of every document as little-endian int64."""
    digest = xxhash.xxh3_128()
    for _, lengths in store.document_lengths():
        digest.update(lengths.astype("<i8").tobytes())
    return digest.hexdigest()


def write_plan(store: Store, length: int) -> PlanHeader:
    """Plan and write, whole or not at all. A plan that is there already is kept if it is the same store's.

    Memory: about 40 bytes per document. Raises DataError (a plan of another store is in the way), StorageError.
    """
    folder = plan_folder(store, length)
    if folder.exists():
        return PackPlan.open(store, length).header
    starts, lengths = cut(store, length)
    bins = best_fit(lengths, length + 1)
    # By block, longest first; equally long ones in the order of the store.
    order = np.lexsort((np.arange(len(lengths)), -lengths.astype(np.int64), bins))
    num_blocks = int(bins.max()) + 1 if len(bins) else 0
    blocks = np.zeros(num_blocks + 1, dtype=np.int64)
    np.cumsum(np.bincount(bins, minlength=num_blocks), out=blocks[1:])
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a call that was cut short
        partial.mkdir()
        arrays: dict[str, NDArray[np.integer]] = {"blocks": blocks, "starts": starts[order], "lengths": lengths[order]}
        for name, kind in ARRAYS.items():
            with open(partial / f"{name}.npy", "wb") as file:
                write_array(file, arrays[name].astype(kind))
                file.flush()
                os.fsync(file.fileno())
        header = PlanHeader(
            length=length,
            algorithm=ALGORITHM,
            borders=borders_digest(store),
            tokens=store.num_tokens,
            documents=store.num_documents,
            num_blocks=num_blocks,
            num_pieces=len(lengths),
            num_padding=num_blocks * (length + 1) - int(lengths.sum()),
            digests={name: digests(partial / f"{name}.npy")[1] for name in ARRAYS},
        )
        with open(partial / HEADER, "w", encoding="utf-8") as file:
            json.dump(asdict(header), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(partial)
        os.replace(partial, folder)
        sync_folder(folder.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise StorageError(f"{error.filename or folder}: {error.strerror or error}") from error
    return header
