"""AdamW: groups come from ParamInfo alone, and tensors plus one count carry its whole state."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lmtrain.engine.optimizer import build_optimizer, optimizer_tensors, restore_steps, set_lr, step_count
from lmtrain.model.branch import ParamInfo
from lmtrain.train.config import OptimizerConfig

CFG = OptimizerConfig(weight_decay=0.3)


def info(decay: bool = False, lr_scale: float = 1.0) -> ParamInfo:
    return ParamInfo(role="matrix", init=lambda shape, generator: torch.zeros(shape), decay=decay, lr_scale=lr_scale)


INFOS = {
    "w": info(decay=True),
    "w_small": info(decay=True, lr_scale=0.5),
    "log_decay": info(),
    "bias": info(decay=True),
}
SHAPES = {"w": (3, 5), "w_small": (4, 4), "log_decay": (2, 7), "bias": (6,)}


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {name: nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for name, s in SHAPES.items()}


def train(named: dict[str, nn.Parameter], optimizer: torch.optim.AdamW, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for param in named.values():
            param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)
        set_lr(optimizer, 0.01 / (1 + step))
        optimizer.step()


def test_groups_follow_param_info() -> None:
    named = parameters()
    optimizer = build_optimizer(named, INFOS, CFG)
    set_lr(optimizer, 0.2)
    seen = {}
    for group in optimizer.param_groups:
        for name, param in named.items():
            if any(param is member for member in group["params"]):
                seen[name] = (group["weight_decay"], group["lr"])
    # A bias that says it decays does, a matrix that says it does not does not.
    assert seen == {"w": (0.3, 0.2), "w_small": (0.3, 0.1), "log_decay": (0.0, 0.2), "bias": (0.3, 0.2)}
    assert optimizer.param_groups[0]["fused"]


def test_a_parameter_without_info_is_refused() -> None:
    with pytest.raises(ValueError, match="bias"):
        build_optimizer(parameters(), {k: v for k, v in INFOS.items() if k != "bias"}, CFG)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("first", [0, 5])
def test_restored_from_flat_tensors_continues_bit_for_bit(first: int, dtype: torch.dtype) -> None:
    """10 steps at once equal ``first`` + rest through a checkpoint, also one of an optimizer that never stepped."""
    whole = parameters(dtype)
    train(whole, build_optimizer(whole, INFOS, CFG), range(10))

    before = parameters(dtype)
    optimizer = build_optimizer(before, INFOS, CFG)
    train(before, optimizer, range(first))
    saved = {name: t.clone() for name, t in {**before, **optimizer_tensors(optimizer, before)}.items()}
    steps = step_count(optimizer)
    assert steps == first

    after = parameters(dtype)
    resumed = build_optimizer(after, INFOS, CFG)
    with torch.no_grad():
        for name, tensor in {**after, **optimizer_tensors(resumed, after)}.items():
            tensor.copy_(saved[name])
    restore_steps(resumed, steps)
    train(after, resumed, range(first, 10))
    assert all(torch.equal(whole[name], after[name]) for name in SHAPES)
    assert step_count(resumed) == 10


def test_zero_state_is_what_adamw_makes() -> None:
    made, stepped = parameters(), parameters()
    ours, theirs = build_optimizer(made, INFOS, CFG), build_optimizer(stepped, INFOS, CFG)
    tensors = optimizer_tensors(ours, made)
    train(stepped, theirs, range(1))
    assert sorted(tensors) == sorted(f"optimizer.{m}.{n}" for m in ("exp_avg", "exp_avg_sq") for n in SHAPES)
    for name in SHAPES:
        mine, its = ours.state[made[name]], theirs.state[stepped[name]]
        assert list(mine) == list(its)
        for key in mine:
            assert mine[key].dtype == its[key].dtype and mine[key].shape == its[key].shape
            assert mine[key].device == its[key].device and not mine[key].any() and not mine[key].requires_grad


def test_a_parameter_left_without_gradient_is_named_as_trouble() -> None:
    named = parameters()
    optimizer = build_optimizer(named, INFOS, CFG)
    named["w"].grad = torch.ones(3, 5)
    optimizer.step()
    with pytest.raises(ValueError, match="no gradient in some step"):
        step_count(optimizer)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_state_of_sharded_parameters_is_sharded_alike() -> None:
    mesh = init_device_mesh("cpu", (1,))
    named: dict[str, Tensor] = {
        k: nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for k, p in parameters().items()
    }
    optimizer = build_optimizer(named, INFOS, CFG)
    for tensor in optimizer_tensors(optimizer, named).values():
        assert isinstance(tensor, DTensor) and tensor.placements == (Shard(0),)
    restore_steps(optimizer, 3)
    for param in named.values():
        param.grad = torch.ones_like(param)
    set_lr(optimizer, 0.1)
    optimizer.step()
    assert step_count(optimizer) == 4
