"""Checkpoints of two ranks: read by one or two on other placements; one rank's trouble is everybody's."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lmtrain.checkpoint import retention
from lmtrain.checkpoint.checkpointer import Checkpointer, branch_from
from lmtrain.checkpoint.config import CheckpointConfig
from lmtrain.checkpoint.storage import LocalFile, LocalStorage
from lmtrain.errors import DataError, StorageError

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]
WORLD = 2
PLACEMENTS = [Shard(0), Shard(1), Replicate()]


def full_tensors() -> dict[str, torch.Tensor]:
    """Even, uneven (5 rows, 7 columns), fewer rows than ranks, no rows, bf16, int64."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"even": (4, 6), "uneven": (5, 7), "thin": (1, 3), "none": (0, 4)}
    tensors = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    return {**tensors, "bf16": tensors["uneven"].bfloat16(), "int64": torch.arange(30).reshape(3, 10)}


def laid_out(shift: int, fill: float | None = None) -> dict[str, torch.Tensor]:
    """Each tensor on the mesh, placements cycled by ``shift``; and plain ones, equal on all ranks."""
    mesh = init_device_mesh("cpu", (WORLD,))
    tensors: dict[str, torch.Tensor] = {}
    for number, (name, full) in enumerate(full_tensors().items()):
        full = full if fill is None else torch.full_like(full, fill)
        for place in range(len(PLACEMENTS)):
            placement = PLACEMENTS[(number + place + shift) % len(PLACEMENTS)]
            tensors[f"{name}.{place}"] = distribute_tensor(full, mesh, [placement])
    tensors["plain"] = torch.full((3,), 2.0 if fill is None else float(fill))
    tensors["scalar"] = torch.tensor(9 if fill is None else int(fill))
    return tensors


def expect_full(tensors: dict[str, torch.Tensor]) -> None:
    expected = full_tensors()
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if "." in name:
            assert torch.equal(whole, expected[name.split(".")[0]]), name
    assert tensors["plain"].tolist() == [2.0] * 3 and tensors["scalar"].item() == 9


def checkpointer(run_dir: Path, **more: Any) -> Checkpointer:
    return Checkpointer(run_dir, CheckpointConfig(keep_last=9), start_id="one", identity={"mesh": {"dp": 2}}, **more)


class FailsHere(LocalStorage):
    """Writing shards fails on the rank that asks for it."""

    def __init__(self, broken: bool) -> None:
        self.broken = broken

    def create(self, path: Path) -> LocalFile:
        if self.broken and path.name.startswith("shard"):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(path))
        return LocalFile(path)


def save_and_reload(run_dir: Path, rank: int) -> None:
    first = checkpointer(run_dir)
    first.save(1, laid_out(0), {"loop": {"tokens": 1, "rank": rank}})
    first.wait()
    assert first.poll().error is None
    for shift in range(len(PLACEMENTS)):
        into = laid_out(shift, fill=0)
        assert first.load(first.find("true"), into) == {"loop": {"tokens": 1, "rank": 0}}
        expect_full(into)


def names_of_one_rank_only(run_dir: Path, rank: int) -> None:
    """Pipeline stages: every rank has tensors of its own, none knows all names."""
    stages = checkpointer(run_dir)
    stages.save(1, {f"stage{rank}.w": torch.full((2,), float(rank))}, {})
    stages.wait()
    into = {f"stage{rank}.w": torch.zeros(2)}
    stages.load(stages.find("true"), into)
    assert into[f"stage{rank}.w"].tolist() == [rank, rank]
    with pytest.raises(DataError, match=r"stage1\.w: unexpected"):
        stages.load(stages.find("true"), {"stage0.w": torch.zeros(2)})
    with pytest.raises(DataError, match=r"stage1\.w: dtype float32 in the checkpoint, int64 asked for"):
        stages.load(stages.find("true"), {f"stage{rank}.w": torch.zeros(2, dtype=torch.int64 if rank else None)})


def failure_of_one_rank(run_dir: Path, rank: int) -> None:
    good = checkpointer(run_dir)
    good.save(1, laid_out(0), {})
    good.wait()
    bad = checkpointer(run_dir, storage=FailsHere(broken=rank == 1))
    bad.save(2, laid_out(0), {})
    bad.wait()
    result = bad.poll()
    assert isinstance(result.error, StorageError) and "shard-00001-of-00002.bin" in str(result.error), result
    assert os.listdir(run_dir / "checkpoints") == ["step-00000001"]
    assert bad.find("auto").name == "step-00000001"


def damage_is_seen_by_all(run_dir: Path, rank: int) -> None:
    good = checkpointer(run_dir)
    for step in (1, 2):
        good.save(step, laid_out(0), {})
    good.wait()
    if rank == 0:
        file = run_dir / "checkpoints" / "step-00000002" / "shard-00001-of-00002.bin"
        data = bytearray(file.read_bytes())
        data[5] ^= 1
        file.write_bytes(data)
    dist.barrier()
    assert good.find("auto").name == "step-00000001"
    with pytest.raises(DataError, match="none of the 1"):
        good.find(str(run_dir / "checkpoints" / "step-00000002"))


def branch_and_read_of_one_rank(run_dir: Path, rank: int) -> None:
    """The parent saved step 3 as a single process."""
    into = laid_out(1, fill=0)
    branch = run_dir.with_name("branch")
    path, documents = branch_from(checkpointer(branch), str(run_dir), into)
    expect_full(into)
    assert documents == {"loop": {"tokens": 3}}
    assert retention.pinned_by(path) == [str(branch)]


CASES = [
    save_and_reload,
    names_of_one_rank_only,
    failure_of_one_rank,
    damage_is_seen_by_all,
    branch_and_read_of_one_rank,
]


def run_cases(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    for case in CASES:
        verdict = Path(folder) / f"{case.__name__}.{rank}"
        try:
            case(Path(folder) / case.__name__, rank)
            verdict.write_text("ok", encoding="utf-8")
        except Exception:
            # ending this rank ends the other too, which may wait for it
            verdict.write_text(traceback.format_exc(), encoding="utf-8")
            raise
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    for case in CASES:
        (folder / case.__name__).mkdir()
    single = checkpointer(folder / "branch_and_read_of_one_rank")
    single.save(3, single_process(), {"loop": {"tokens": 3}})
    single.wait()
    with contextlib.suppress(mp.ProcessRaisedException, mp.ProcessExitedException):
        mp.spawn(run_cases, (str(folder),), WORLD)
    return folder


def single_process(fill: float | None = None) -> dict[str, torch.Tensor]:
    tensors = {
        f"{name}.{place}": full.clone() if fill is None else torch.full_like(full, fill)
        for name, full in full_tensors().items()
        for place in range(len(PLACEMENTS))
    }
    plain = {"plain": torch.full((3,), 2.0), "scalar": torch.tensor(9)}
    return {**tensors, **(plain if fill is None else {name: torch.zeros_like(t) for name, t in plain.items()})}


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_two_ranks(folder, case):
    for rank in range(WORLD):
        verdict = folder / f"{case}.{rank}"
        assert verdict.exists(), f"rank {rank} did not come to an end"
        assert verdict.read_text(encoding="utf-8") == "ok"


def test_two_ranks_are_read_by_one(folder):
    into = single_process(fill=0)
    reader = checkpointer(folder / "save_and_reload")
    reader.load(reader.find("true"), into)
    expect_full(into)
