"""Online data mixing (ODM): sources as the arms of a bandit, rewarded by their loss (arXiv 2312.02406 and its code)."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.policies.config import PolicyConfig
from lmtrain.data.policies.policy import MixPolicy, Progress, Run, among
from lmtrain.data.policies.window import Window


def exploration(num_sources: int, updates: int) -> float:
    """eps_t = min(1/K, sqrt(ln K / (K t))); eps_0 = 1/K."""
    if updates == 0:
        return 1 / num_sources
    return min(1 / num_sources, math.sqrt(math.log(num_sources) / (num_sources * updates)))


class Odm(MixPolicy):
    """Rewards R_i of the sources, updated every ``every`` steps with the mean loss of each since the last update.

    Losses are in nats per byte. A new source starts with the mean of the others' rewards.
    """

    def __init__(self, cfg: PolicyConfig, first: Mapping[str, float], run: Run) -> None:
        super().__init__(cfg, first, run)
        self._updates = 0
        self._rewards = dict.fromkeys(self.first, 0.0)
        self._window = Window(cfg.every, cfg.start_tokens)

    def observe(self, step: int, tokens: Mapping[str, float], bits: Mapping[str, float]) -> None:
        if seen := self._window.add(step, tokens, bits):
            self._updates += 1
            for name, reward in among(self._rewards, seen.share).items():
                nats = seen.bits[name] * math.log(2)
                self._rewards[name] = self._reward(reward, nats, seen.share[name])

    def propose(self, step: int, progress: Progress) -> dict[str, float] | None:
        if not self._updates:
            return None
        rewards = among(self._rewards, progress.weights)
        floor = exploration(len(rewards), self._updates)
        parts = self._parts(np.array(list(rewards.values())), exploration(len(rewards), self._updates - 1))
        mixture = (1 - len(rewards) * floor) * parts + floor
        return dict(zip(rewards, (mixture / mixture.sum()).tolist(), strict=True))

    @abstractmethod
    def _reward(self, reward: float, nats: float, share: float) -> float:
        """R_i after a window in which source i had this mean loss and this share of the targets."""

    @abstractmethod
    def _parts(self, rewards: NDArray[np.float64], exploration: float) -> NDArray[np.float64]:
        """What is distributed beyond the floor, summing to 1; ``exploration`` is the update's before this one."""

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self._updates, "rewards": dict(self._rewards), "window": self._window.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._updates, self._rewards = state["updates"], dict(state["rewards"])
        self._window.load_state_dict(state["window"])
