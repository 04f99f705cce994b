"""The default engine: FSDP2 (or HSDP), gradients summed over every rank that holds tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lmtrain.data.batch import Batch
from lmtrain.engine.carried import CarriedState
from lmtrain.engine.optimizer import (
    OptimizerConfig,
    build_optimizer,
    optimizer_tensors,
    restore_steps,
    set_lr,
    step_count,
)
from lmtrain.engine.protocol import StepInfo
from lmtrain.model.branch import State
from lmtrain.model.config import ModelConfig
from lmtrain.model.context import Key
from lmtrain.model.decode import decode
from lmtrain.model.ffn.moe import Experts
from lmtrain.model.init import draw
from lmtrain.model.language_model import LanguageModel
from lmtrain.ops.cross_entropy import IGNORE
from lmtrain.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_sum
from lmtrain.parallel.config import ClusterConfig
from lmtrain.parallel.context import ExpertContext, make_context
from lmtrain.parallel.mesh import Mesh


def shard_model(model: LanguageModel, mesh: Mesh, cluster: ClusterConfig, dtype: torch.dtype) -> None:
    """Wrap ``model`` in FSDP2 units, in place.

    Parameters that stay fp32 are units of their own in mixed precision. Inputs and outputs are never cast: fp32 state
    would be rounded at every block. Sums, not means: the loss is already divided by the global target count.
    """
    mixed = dtype == torch.bfloat16
    compute = dtype if mixed else None
    policy = MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=torch.float32 if mixed else None, cast_forward_inputs=False
    )
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    for block in model.stack:
        if mixed:
            for module in block.modules():
                if getattr(module, "keeps_fp32", False):
                    fully_shard(module, mesh=mesh.shard, mp_policy=exact, reshard_after_forward=False)
        if mesh.cfg.ep > 1:
            for module in block.modules():
                if isinstance(module, Experts):
                    spread_experts(module, mesh)
                    fully_shard(
                        module, mesh=mesh.expert_shard, mp_policy=policy, shard_placement_fn=lambda parameter: Shard(1)
                    )
        if cluster.fsdp_units == "branch":
            fully_shard(block, mesh=mesh.shard, mp_policy=policy)
    fully_shard(model, mesh=mesh.shard, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def spread_experts(experts: Experts, mesh: Mesh) -> None:
    """Cut every parameter along dim 0 over the expert axis. ValueError unless the experts divide."""
    for name, parameter in list(experts.named_parameters()):
        if parameter.shape[0] % mesh.cfg.ep:
            raise ValueError(f"{parameter.shape[0]} experts do not divide by ep {mesh.cfg.ep}")
        cut = distribute_tensor(parameter.detach(), mesh.expert_axis, [Shard(0)], src_data_rank=None)
        setattr(experts, name, nn.Parameter(cut))


@torch.no_grad()
def initialise_sharded(model: LanguageModel, seed: int) -> None:
    """Fill every parameter from its own generator: the same values at every world size, without communication."""
    info = model.param_info()
    for name, parameter in model.named_parameters():
        full = draw(name, info[name], tuple(parameter.shape), seed).to(parameter.device, parameter.dtype)
        if isinstance(parameter, DTensor):
            full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(full)
    for buffer in model.buffers():
        buffer.zero_()


class FSDPEngine:
    """See ``Engine``. Builds the model on the meta device, shards it, and only then allocates.

    stateful: rows that go on with a run of blocks (``Documents.before``) get the state the row before them ended with.
    """

    def __init__(
        self,
        model: ModelConfig,
        vocab_size: int,
        *,
        mesh: Mesh,
        cluster: ClusterConfig,
        optimizer: OptimizerConfig,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
        num_sources: int = 1,
        z_loss: float = 0.0,
        stateful: bool = False,
    ) -> None:
        self.mesh, self.cluster, self.device, self.dtype = mesh, cluster, device, dtype
        self.clip_norm, self.z_loss, self.num_sources = optimizer.clip_norm, z_loss, num_sources
        self.stateful, self._carried = stateful, CarriedState()
        with torch.device("meta"):
            self.model = LanguageModel(model, vocab_size)
        self.model.to(torch.float64 if dtype == torch.float64 else torch.float32)
        for block in self.model.stack:
            block.recompute = cluster.activation_checkpointing
        shard_model(self.model, mesh, cluster, dtype)
        self.model.to_empty(device=device)
        initialise_sharded(self.model, seed)
        self.named: dict[str, nn.Parameter] = dict(self.model.named_parameters())
        self.optimizer = build_optimizer(self.named, self.model.param_info(), optimizer)

    def train_step(self, micro_batches: Sequence[Batch], lr: float, flags: Tensor) -> StepInfo:
        begun = time.perf_counter()
        counts = torch.tensor([sum(batch.num_targets for batch in micro_batches)], dtype=torch.int64)
        agreed = torch.cat([counts, flags]).to(self.device)
        dist.all_reduce(agreed)
        num_targets, flags = int(agreed[0]), agreed[1:].cpu()
        # fp64 sums: [loss, squared gradient norm, losses of branches, then nats and targets of each source]
        sums = torch.zeros(3 + 2 * self.num_sources, dtype=torch.float64, device=self.device)
        notes: dict[Key, Tensor] = {}
        if num_targets:
            for index, batch in enumerate(micro_batches):
                cast(FSDPModule, self.model).set_requires_gradient_sync(index == len(micro_batches) - 1)
                state = self._carried.take(index, batch)
                after = self._backward(batch.to(self.device), state, num_targets, sums, notes)
                if self.stateful:
                    self._carried.keep(index, batch, after)
            sums[1] = self._local_squares() / self.mesh.replicas
        dist.all_reduce(sums)
        notes = self._sum_notes(notes)
        grad_norm = float(sums[1].sqrt()) if num_targets else None
        skipped = self._step(grad_norm, lr)
        if skipped is None:
            self._tell_branches(notes)
        elif self.stateful:
            self._carried.forget(micro_batches)
        self.optimizer.zero_grad(set_to_none=True)
        return StepInfo(
            loss_sum=float(sums[0]),
            num_targets=num_targets,
            flags=flags,
            grad_norm=grad_norm,
            skipped=skipped,
            source_loss=sums[3:].view(-1, 2).cpu(),
            branch_loss=float(sums[2]) / num_targets if num_targets else 0.0,
            router_load={place: load.cpu() for (place, name), load in notes.items() if name == "load"},
            seconds=time.perf_counter() - begun,
        )

    def _backward(self, batch: Batch, state: State, num_targets: int, sums: Tensor, notes: dict[Key, Tensor]) -> State:
        """Adds to gradients, ``sums`` and ``notes``; the state after the rows."""
        ctx = make_context(batch.docs, self.mesh, self.cluster.sp_attention, carries=self.stateful)
        ctx.tokens = torch.tensor(num_targets, dtype=self.dtype if self.dtype == torch.float64 else torch.float32)
        read = partial(
            linear_cross_entropy_sum, labels=batch.labels, loss_weights=batch.loss_weights, z_loss=self.z_loss
        )
        (objective, nll, _), after = self.model(batch.tokens, ctx, state, read)
        (objective / num_targets).backward()
        told = torch.stack([nll, batch.labels != IGNORE], dim=-1).double().flatten(0, 1)
        member = F.one_hot(batch.source.flatten().long(), self.num_sources).double()
        sums[0] += told[:, 0].sum()
        for value in ctx.losses.values():
            sums[2] += value
        for key, value in ctx.notes.items():
            notes[key] = notes[key] + value if key in notes else value
        sums[3:] += (member.T @ told).flatten()
        return after

    def _sum_notes(self, notes: dict[Key, Tensor]) -> dict[Key, Tensor]:
        """The counts of all ranks, in one collective; every rank noted under the same keys."""
        if not notes:
            return {}
        keys = sorted(notes)
        packed = torch.cat([notes[key].flatten() for key in keys])
        dist.all_reduce(packed)
        parts = packed.split([notes[key].numel() for key in keys])
        return {key: part.view_as(notes[key]) for key, part in zip(keys, parts, strict=True)}

    def _tell_branches(self, notes: dict[Key, Tensor]) -> None:
        for index, branch in enumerate(self.model.branches):
            mine = {name: value for (place, name), value in notes.items() if place == index}
            if mine:
                branch.after_step(mine)

    def _local_squares(self) -> Tensor:
        grads = [_local(p.grad) for p in self.named.values() if p.grad is not None]
        return torch.stack([g.double().square().sum() for g in grads]).sum()

    @torch.no_grad()
    def _step(self, grad_norm: float | None, lr: float) -> str | None:
        """Clip and step; the reason if not. Judged on reduced values alone: every rank decides alike."""
        if grad_norm is None:
            return "the batch has no targets"
        if not torch.isfinite(torch.tensor(grad_norm)):
            return f"gradient norm is {grad_norm}"
        if self.clip_norm is not None and grad_norm > self.clip_norm:
            # local parts: parameters live on more than one mesh
            grads = [_local(p.grad) for p in self.named.values() if p.grad is not None]
            torch._foreach_mul_(grads, self.clip_norm / grad_norm)
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        return None

    @torch.no_grad()
    def losses(self, batch: Batch) -> Tensor:
        batch = batch.to(self.device)
        ctx = make_context(batch.docs, self.mesh, self.cluster.sp_attention)
        (nll, _), _ = self.model(batch.tokens, ctx, {}, partial(linear_cross_entropy, labels=batch.labels))
        return nll

    @torch.no_grad()
    def decode(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        experts = self.mesh.experts if self.mesh.cfg.ep > 1 else None
        return decode(self.model, tokens.to(self.device), state, partial(ExpertContext, experts=experts))

    def init_state(self, batch: int) -> State:
        return self.model.init_state(batch, self.device)

    def parameters_fp32(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.named.items()

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        tensors = {f"model.{name}": parameter.detach() for name, parameter in self.named.items()}
        tensors |= {f"model.{name}": buffer for name, buffer in self.model.named_buffers()}
        tensors |= optimizer_tensors(self.optimizer, self.named)
        return tensors, {"optimizer_steps": step_count(self.optimizer)}

    def load_state_dict(self, counters: Mapping[str, int]) -> None:
        restore_steps(self.optimizer, counters["optimizer_steps"])


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
