"""The default engine: FSDP2 (or HSDP), gradients summed over every rank that holds tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lmtrain.data.batch import Batch
from lmtrain.train.optimizer import OptimizerConfig, build_optimizer, optimizer_tensors, restore_steps, set_lr, step_count
from lmtrain.engine.protocol import StepInfo
from lmtrain.model.branch import State
from lmtrain.model.config import ModelConfig
from lmtrain.model.decode import decode
from lmtrain.model.init import draw
from lmtrain.model.language_model import LanguageModel
from lmtrain.ops.cross_entropy import IGNORE, cross_entropy
from lmtrain.parallel.config import ClusterConfig
from lmtrain.parallel.context import make_context
from lmtrain.parallel.mesh import Mesh


def shard_model(model: LanguageModel, mesh: Mesh, cluster: ClusterConfig, dtype: torch.dtype) -> None:
    """Wrap ``model`` in FSDP2 units, in place.

    Parameters that stay fp32 are units of their own in mixed precision. Inputs and outputs are never cast: fp32 state
    would be rounded at every block. Sums, not means: the loss is already divided by the global target count.
    """
    mixed = dtype == torch.bfloat16
    compute = dtype if mixed else None
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32 if mixed else None, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    for block in model.blocks:
        if mixed:
            for module in block.modules():
                if getattr(module, "keeps_fp32", False):
                    fully_shard(module, mesh=mesh.shard, mp_policy=exact, reshard_after_forward=False)
        if cluster.fsdp_units == "branch":
            fully_shard(block, mesh=mesh.shard, mp_policy=policy)
    fully_shard(model, mesh=mesh.shard, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


@torch.no_grad()
def initialise_sharded(model: LanguageModel, seed: int) -> None:
    """Fill every parameter from its own generator: the same values at every world size, without communication."""
    info = model.param_info()
    for name, parameter in model.named_parameters():
        full = draw(name, info[name], tuple(parameter.shape), seed).to(parameter.device, parameter.dtype)
        if isinstance(parameter, DTensor):
            full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(full)


class FSDPEngine:
    """See ``Engine``. Builds the model on the meta device, shards it, and only then allocates."""

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
    ) -> None:
        self.mesh, self.cluster, self.device, self.dtype = mesh, cluster, device, dtype
        self.clip_norm, self.z_loss, self.num_sources = optimizer.clip_norm, z_loss, num_sources
        with torch.device("meta"):
            self.model = LanguageModel(model, vocab_size)
        self.model.to(torch.float64 if dtype == torch.float64 else torch.float32)
        for block in self.model.blocks:
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
        # fp64 sums: [loss, squared gradient norm, then nats and targets of each source]
        sums = torch.zeros(2 + 2 * self.num_sources, dtype=torch.float64, device=self.device)
        if num_targets:
            for index, batch in enumerate(micro_batches):
                self.model.set_requires_gradient_sync(index == len(micro_batches) - 1)
                self._backward(batch.to(self.device), num_targets, sums)
            sums[1] = self._local_squares() / self.mesh.replicas
        dist.all_reduce(sums)
        grad_norm = float(sums[1].sqrt()) if num_targets else None
        skipped = self._step(grad_norm, lr)
        self.optimizer.zero_grad(set_to_none=True)
        return StepInfo(
            loss_sum=float(sums[0]),
            num_targets=num_targets,
            flags=flags,
            grad_norm=grad_norm,
            skipped=skipped,
            source_loss=sums[2:].view(-1, 2).cpu(),
            seconds=time.perf_counter() - begun,
        )

    def _backward(self, batch: Batch, num_targets: int, sums: Tensor) -> None:
        ctx = make_context(batch.docs, self.mesh.sequence, self.cluster.sp_attention)
        logits, _ = self.model(batch.tokens, ctx, {})
        nll, lse = cross_entropy(logits, batch.labels)
        objective = nll + self.z_loss * lse.square() if self.z_loss else nll
        if batch.loss_weights is not None:
            objective = objective * batch.loss_weights
        (objective.sum() / num_targets).backward()
        told = torch.stack([nll.detach(), batch.labels != IGNORE], dim=-1).double().flatten(0, 1)
        member = F.one_hot(batch.source.flatten().long(), self.num_sources).double()
        sums[0] += told[:, 0].sum()
        sums[2:] += (member.T @ told).flatten()

    def _local_squares(self) -> Tensor:
        grads = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in self.named.values()]
        squares = [g.double().square().sum() for g in grads if g is not None]
        return torch.stack(squares).sum()

    @torch.no_grad()
    def _step(self, grad_norm: float | None, lr: float) -> str | None:
        """Clip and step; the reason if not. Judged on reduced values alone: every rank decides alike."""
        if grad_norm is None:
            return "the batch has no targets"
        if not torch.isfinite(torch.tensor(grad_norm)):
            return f"gradient norm is {grad_norm}"
        if self.clip_norm is not None and grad_norm > self.clip_norm:
            torch._foreach_mul_([p.grad for p in self.named.values()], self.clip_norm / grad_norm)
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        return None

    @torch.no_grad()
    def losses(self, batch: Batch) -> Tensor:
        batch = batch.to(self.device)
        ctx = make_context(batch.docs, self.mesh.sequence, self.cluster.sp_attention)
        logits, _ = self.model(batch.tokens, ctx, {})
        return cross_entropy(logits, batch.labels)[0]

    @torch.no_grad()
    def decode(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        return decode(self.model, tokens, state)

    def parameters_fp32(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.named.items()

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        tensors = {f"model.{name}": parameter.detach() for name, parameter in self.named.items()}
        tensors |= optimizer_tensors(self.optimizer, self.named)
        return tensors, {"optimizer_steps": step_count(self.optimizer)}

    def load_state_dict(self, counters: Mapping[str, int]) -> None:
        restore_steps(self.optimizer, counters["optimizer_steps"])
