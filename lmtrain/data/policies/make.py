"""The policies by kind, and the one a recipe asks for."""

from __future__ import annotations

from collections.abc import Mapping

from lmtrain.data.counted import counted
from lmtrain.data.policies.ado import Ado
from lmtrain.data.policies.config import Kind, PolicyConfig
from lmtrain.data.policies.excess import Excess
from lmtrain.data.policies.limits import Limited
from lmtrain.data.policies.odm_exp3 import OdmExp3
from lmtrain.data.policies.odm_smoothed import OdmSmoothed
from lmtrain.data.policies.policy import MixPolicy, Run
from lmtrain.data.policies.staged import Staged
from lmtrain.data.policies.static import Static, first_mixture
from lmtrain.errors import UsageError

POLICIES: dict[Kind, type[MixPolicy]] = {
    "static": Static,
    "staged": Staged,
    "odm_exp3": OdmExp3,
    "odm_smoothed": OdmSmoothed,
    "ado": Ado,
    "excess": Excess,
}


def make(cfg: PolicyConfig, weights: Mapping[str, float], run: Run) -> MixPolicy:
    """The policy of a run whose sources have ``weights`` (``data.sources.*.weight``); its ``first`` holds at block 0.

    Raises UsageError or DataError for what cannot work, before anything is read.
    """
    first = first_mixture(cfg, weights, run)
    kind = POLICIES[cfg.kind]
    if kind.adapts and cfg.floor * len(first) > 1:
        raise UsageError(
            f"data.policy.floor: {cfg.floor:g} for each of {counted(len(first), 'source')} is more than the whole; "
            f"at most {1 / len(first):.4g}"
        )
    policy = kind(cfg, first, run)
    return Limited(policy, cfg, run) if kind.adapts else policy
