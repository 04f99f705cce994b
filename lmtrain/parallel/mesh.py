"""The mesh: which rank holds which rows, which shard of the sequence and which shard of the parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lmtrain.errors import UsageError
from lmtrain.parallel.config import MeshConfig

AXES = ("pp", "dp_replicate", "dp_shard", "sp", "tp")
"""World order, slowest axis first; ``ep`` re-cuts dp_shard x sp."""


def resolve(cfg: MeshConfig, world_size: int) -> MeshConfig:
    """``cfg`` with its -1 axis filled. Raises UsageError unless the axes multiply to the world size."""
    sizes = {axis: getattr(cfg, axis) for axis in AXES}
    for axis, size in {**sizes, "ep": cfg.ep}.items():
        if size < 1 and size != -1:
            raise UsageError(f"mesh.{axis}: expected a positive size or -1 (fill), got {size}")
    if cfg.ep == -1:
        raise UsageError("mesh.ep: -1 (fill) is for the axes of the world; ep re-cuts dp_shard x sp, give its size")
    fill = [axis for axis, size in sizes.items() if size == -1]
    if len(fill) > 1:
        raise UsageError(f"mesh: only one axis can be -1 (fill), got {' and '.join(fill)}")
    known = 1
    for size in sizes.values():
        known *= size if size > 0 else 1
    product = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size not in (1, -1)) or "1"
    if fill:
        if world_size % known:
            raise UsageError(
                f"mesh: {product} = {known} does not divide the world size {world_size}; "
                f"start {known * max(1, round(world_size / known))} processes"
            )
        sizes[fill[0]] = world_size // known
    elif known != world_size:
        raise UsageError(
            f"mesh: the axes multiply to {known} ({product}), but {world_size} "
            f"{'process runs' if world_size == 1 else 'processes run'}; start {known} "
            f"(torchrun --nproc-per-node {known}), or set mesh.dp_shard=-1 (fill)"
        )
    block = sizes["dp_shard"] * sizes["sp"]
    if cfg.ep < 1 or block % cfg.ep:
        fits = max(n for n in range(1, block + 1) if block % n == 0 and n <= max(cfg.ep, 1))
        raise UsageError(f"mesh.ep: {cfg.ep} does not divide dp_shard x sp = {block}; nearest: {fits}")
    return MeshConfig(**sizes, ep=cfg.ep)


def fewest(cfg: MeshConfig) -> int:
    """Processes that an unresolved ``cfg`` needs at least: what a plan is made for where none were started."""
    return math.prod(max(getattr(cfg, axis), 1) for axis in AXES)


@dataclass(frozen=True)
class Mesh:
    """A resolved mesh and this rank's place in it.

    shard: the mesh parameters are sharded over: ``(fsdp,)``, or ``(dp_replicate, fsdp)`` where replicas exist; fsdp is
        dp_shard x sp, since sp ranks hold different tokens. expert_shard, expert_axis: the same ranks re-cut,
        ``(efsdp,)`` or ``(dp_replicate, efsdp)`` beside ``(ep,)``. sequence: the process group of this rank's row.
    """

    cfg: MeshConfig
    shard: DeviceMesh
    expert_shard: DeviceMesh
    expert_axis: DeviceMesh
    sequence: dist.ProcessGroup
    data_rank: int
    data_size: int
    sequence_rank: int

    @property
    def experts(self) -> dist.ProcessGroup:
        """The group over which this rank's experts are spread."""
        return self.expert_axis.get_group()

    @property
    def sp(self) -> int:
        return self.cfg.sp

    @property
    def replicas(self) -> int:
        return self.cfg.dp_replicate


def build_mesh(cfg: MeshConfig, device_type: str) -> Mesh:
    """The mesh of a resolved ``cfg`` over the initialised world; collective."""
    replicas, shards, sp = cfg.dp_replicate, cfg.dp_shard, cfg.sp
    rows = init_device_mesh(device_type, (replicas * shards, sp), mesh_dim_names=("data", "sp"))
    if replicas > 1:
        shard = init_device_mesh(device_type, (replicas, shards * sp), mesh_dim_names=("dp_replicate", "fsdp"))
    else:
        shard = init_device_mesh(device_type, (shards * sp,), mesh_dim_names=("fsdp",))
    sparse = init_device_mesh(
        device_type, (replicas, shards * sp // cfg.ep, cfg.ep), mesh_dim_names=("dp_replicate", "efsdp", "ep")
    )
    return Mesh(
        cfg=cfg,
        shard=shard,
        expert_shard=sparse["dp_replicate", "efsdp"] if replicas > 1 else sparse["efsdp"],
        expert_axis=sparse["ep"],
        sequence=rows.get_group("sp"),
        data_rank=rows.get_local_rank("data"),
        data_size=replicas * shards,
        sequence_rank=rows.get_local_rank("sp"),
    )
