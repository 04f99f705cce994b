"""ODM with a moving average of rewards: less memory of the first steps than EXP3, and no softmax."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.policies.odm import Odm

KEPT = 0.9
"""Share of the old reward in the new one."""


class OdmSmoothed(Odm):
    """R_i = 0.9 R_i + 0.1 exp(l_i); the mixture is linear in R."""

    def _reward(self, reward: float, nats: float, share: float) -> float:
        return KEPT * reward + (1 - KEPT) * math.exp(nats)

    def _parts(self, rewards: NDArray[np.float64], exploration: float) -> NDArray[np.float64]:
        total = rewards.sum()
        return rewards / total if total > 0 else np.full(len(rewards), 1 / len(rewards))  # no reward seen: all alike
