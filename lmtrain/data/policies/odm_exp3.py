"""ODM as EXP3: rewards add up, weighted by how rarely a source was drawn, and the mixture is their softmax."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.policies.odm import Odm

REWARD_SCALE = 0.1
"""Of the published code."""


class OdmExp3(Odm):
    """R_i += l_i / 10 / pi_i, with pi_i the share of the targets that source i had; w = softmax(eps_{t-1} R)."""

    def _reward(self, reward: float, nats: float, share: float) -> float:
        return reward + REWARD_SCALE * nats / share

    def _parts(self, rewards: NDArray[np.float64], exploration: float) -> NDArray[np.float64]:
        raised = np.exp(exploration * (rewards - rewards.max()))  # the maximum is taken out: rewards only grow
        return raised / raised.sum()
