"""AdamW with groups from ParamInfo, and its state as flat named tensors plus one step count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import AdamW

from lmtrain.model.branch import ParamInfo

FUSED_DEVICES = ("cpu", "cuda")
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. What decays and which learning-rate multiplier applies is each parameter's own ``ParamInfo``."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the parameters that decay."""
    clip_norm: float | None = 1.0
    """Global gradient norm above which gradients are scaled down; null: never."""

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: must be at least 0 and less than 1, got {self.betas}")
        if self.eps <= 0 or self.weight_decay < 0:
            key, rule = ("eps", "positive") if self.eps <= 0 else ("weight_decay", "at least 0")
            raise ValueError(f"{key}: must be {rule}, got {getattr(self, key)}")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm: must be positive, or null for no clipping, got {self.clip_norm}")


def build_optimizer(named: Mapping[str, Tensor], infos: Mapping[str, ParamInfo], cfg: OptimizerConfig) -> AdamW:
    """AdamW over ``named``, one group per (decays, lr_scale) found in ``infos``; the rate is 0 until ``set_lr``.

    The order of groups, and of parameters within one, follows from the arguments alone: the same on every rank.
    """
    if named.keys() != infos.keys():
        raise ValueError(f"parameters without ParamInfo, or the reverse: {sorted(named.keys() ^ infos.keys())}")
    members: dict[tuple[bool, float], list[Tensor]] = {}
    for name, param in named.items():
        members.setdefault((infos[name].decay, infos[name].lr_scale), []).append(param)
    groups = [
        {"params": params, "weight_decay": cfg.weight_decay if decay else 0.0, "lr_scale": scale}
        for (decay, scale), params in sorted(members.items(), key=lambda item: item[0])
    ]
    fused = all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in named.values())
    return AdamW(groups, lr=0.0, betas=cfg.betas, eps=cfg.eps, weight_decay=0.0, fused=fused)


def set_lr(optimizer: AdamW, lr: float) -> None:
    """Gives every group ``lr`` times its lr_scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def optimizer_tensors(optimizer: AdamW, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The moments themselves (no copies) as ``optimizer.exp_avg.NAME`` and ``optimizer.exp_avg_sq.NAME``.

    A parameter never stepped gets zero state first, as AdamW would give it: the keys do not depend on progress.
    """
    _create_state(optimizer)
    return {f"optimizer.{key}.{name}": optimizer.state[param][key] for key in MOMENTS for name, param in named.items()}


def step_count(optimizer: AdamW) -> int:
    """Steps taken, the same for every parameter; ValueError if not (one of them got no gradient in some step)."""
    _create_state(optimizer)
    # One device-to-host copy for all parameters.
    counts = torch.stack([state["step"] for state in optimizer.state.values()]).unique().tolist()
    if len(counts) != 1:
        raise ValueError(f"optimizer steps differ ({counts}): some parameter had no gradient in some step")
    return int(counts[0])


def restore_steps(optimizer: AdamW, steps: int) -> None:
    """Sets every parameter's step counter, on which AdamW's bias correction depends."""
    _create_state(optimizer)
    for state in optimizer.state.values():
        state["step"].fill_(steps)


def _create_state(optimizer: AdamW) -> None:
    """What AdamW does at a parameter's first step, without the step; leaves existing state alone."""
    for group in optimizer.param_groups:
        # A fused kernel reads the counter on the parameter's device, the other implementations on the host.
        for param in group["params"]:
            state = optimizer.state[param]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=param.device if group["fused"] else "cpu")
                for key in MOMENTS:
                    state[key] = torch.zeros_like(param, memory_format=torch.preserve_format, requires_grad=False)
