"""Tables of mixtures of experts, as most classes write them: a router, one linear weight per expert, shared experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from lmtrain.hub.table import EXPERTS, Rule, Transform, same
from lmtrain.model.ffn.moe_settings import MoEConfig

PROJECTIONS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
"""Our matrices of a gated feed-forward, and their usual names on disk."""
NUMBERED = {"gate": "w1", "up": "w3", "down": "w2"}
"""Their names in Mixtral, and in those that followed it."""
BALANCING = ("balance", "aux_weight", "bias_rate")
"""Settings that do not change the function, unless the balance is a selection bias."""
WITHOUT_BIAS = Transform(
    lambda ours: [ours[0]], lambda disk, shapes: [disk[0], torch.zeros(shapes[1], dtype=torch.float32)]
)
"""A router whose selection bias takes no part in the choice, for a class that has none: it comes back as zeros."""


def biased(settings: Iterable[MoEConfig]) -> list[str]:
    """A reason if a selection bias takes part in the choice, for a class whose router has none."""
    return ["moe.balance is bias, its router has none"] * any(one.balance == "bias" for one in settings)


def router(disk: str) -> Rule:
    """The router's weight alone."""
    return Rule(("branch.router.weight", "branch.router_bias"), (disk,), WITHOUT_BIAS, keep_fp32=True)


def experts(moe: MoEConfig, prefix: str, names: Mapping[str, str] = PROJECTIONS) -> list[Rule]:
    """Routed experts; ``names``: our matrix to its name on disk below ``prefix.NUMBER.``."""
    return [
        Rule(
            (f"branch.experts.{ours}",),
            tuple(f"{prefix}.{number}.{disk}.weight" for number in range(moe.num_experts)),
            EXPERTS,
        )
        for ours, disk in names.items()
    ]


def shared(prefix: str) -> list[Rule]:
    """Shared experts, which are one feed-forward."""
    return [same(f"branch.shared.{ours}.weight", f"{prefix}.{disk}.weight") for ours, disk in PROJECTIONS.items()]
