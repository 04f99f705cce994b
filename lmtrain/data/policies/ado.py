"""Adaptive data optimization (ADO): read more of what, by its own scaling law, still falls fastest.

Jiang et al. 2024, arXiv 2410.11820, and the authors' code. For every source a law L_k(n) = eps_k + beta_k n^-alpha_k is
fitted to its loss over the tokens n of the whole run (all sources: what one learns, the others may gain from); then in
every step t, with the prior mu and the realised shares h:

    slope_k   = max(alpha_k, 0.05) (L_k(n) - eps_k) / n
    rho_k     = mu_k h_k(t-1)^s slope_k, normalised; at least 0.01, normalised again
    pi(t)     = 0.1 rho + 0.9 average(t-1)
    average(t) = (1 - 1/(t+1)) average(t-1) + rho / (t+1);  average(0) = mu
    h_k(t)    = 0.9 h_k(t-1) + 0.1 (share of source k in step t);  h(0) = mu
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lmtrain.data.policies.config import PolicyConfig
from lmtrain.data.policies.curve import LossCurve
from lmtrain.data.policies.policy import MixPolicy, Progress, Run, among, shares
from lmtrain.data.policies.power_law import PowerLaw, fit

MIX, SMOOTHING, EXPONENT, LEAST, LEAST_ALPHA = 0.1, 0.1, 0.5, 0.01, 0.05
"""gamma2, gamma1, s and delta_min of the paper; the lower bound of alpha in the slope is the code's."""
FIT_EVERY = 10
"""Proposals between two fits: with the default ``every`` the code's 1000 steps."""
LEAST_POINTS = 10


class Ado(MixPolicy):
    """mu is the first mixture (``first: proportional`` is the paper's). The losses are in bits per byte.

    A source without a fit yet, or that came during the run, keeps its prior: the first mixture's, or the share it had
    in the step in which it came.
    """

    def __init__(self, cfg: PolicyConfig, first: Mapping[str, float], run: Run) -> None:
        super().__init__(cfg, first, run)
        self._start = cfg.start_tokens
        self._read = 0.0
        self._curve = LossCurve()
        self._laws: dict[str, PowerLaw] = {}
        self._prior, self._recent = dict(self.first), dict(self.first)
        self._average, self._mixture = dict(self.first), dict(self.first)

    def observe(self, step: int, tokens: Mapping[str, float], bits: Mapping[str, float]) -> None:
        count = sum(tokens.values())
        if count <= 0:
            return
        share = {name: tokens[name] / count for name in tokens}
        self._admit({name: part for name, part in share.items() if part > 0 and name not in self._prior})
        self._read += count
        if self._read > self._start:
            self._curve.add(self._read - count / 2, tokens, bits)
            if step % (FIT_EVERY * self.every) == 0:
                self._fit()
        if self._laws:
            self._follow(step)
        for name in self._recent:
            self._recent[name] += SMOOTHING * (share.get(name, 0.0) - self._recent[name])

    def _admit(self, new: Mapping[str, float]) -> None:
        """Make room for sources that came during the run."""
        room = 1 - sum(new.values())
        for table in (self._prior, self._recent, self._average, self._mixture):
            for name in table:
                table[name] *= room
            table.update(new)

    def _fit(self) -> None:
        for name in self._curve.names():
            n, loss = self._curve.points(name)
            usable = (loss > 0) & np.isfinite(loss)  # the law is fitted to logarithms
            if usable.sum() >= LEAST_POINTS:
                self._laws[name] = fit(n[usable], loss[usable])

    def _follow(self, step: int) -> None:
        rho = self._preferred()
        for name, part in rho.items():
            self._mixture[name] = MIX * part + (1 - MIX) * self._average[name]
            self._average[name] += (part - self._average[name]) / (step + 1)

    def _preferred(self) -> dict[str, float]:
        """rho: the prior's share of the sources with a law is divided among them anew."""
        pull = {
            name: self._prior[name]
            * self._recent[name] ** EXPONENT
            * max(law.alpha, LEAST_ALPHA)
            * law.reducible(self._read)
            / self._read
            for name, law in self._laws.items()
        }
        total = sum(pull.values())
        if total <= 0:  # nothing falls any more
            return self._prior
        budget = sum(self._prior[name] for name in pull)
        rho = {name: budget * pull[name] / total if name in pull else prior for name, prior in self._prior.items()}
        rho = {name: max(part, LEAST) for name, part in rho.items()}
        return shares(rho)

    def propose(self, step: int, progress: Progress) -> dict[str, float] | None:
        return shares(among(self._mixture, progress.weights)) if self._laws else None

    def state_dict(self) -> dict[str, Any]:
        laws = {name: list(law) for name, law in self._laws.items()}
        tables = {"prior": self._prior, "recent": self._recent, "average": self._average, "mixture": self._mixture}
        copies = {key: dict(table) for key, table in tables.items()}
        return {"read": self._read, "curve": self._curve.state_dict(), "laws": laws, **copies}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._read = state["read"]
        self._curve.load_state_dict(state["curve"])
        self._laws = {name: PowerLaw(*law) for name, law in state["laws"].items()}
        self._prior, self._recent = dict(state["prior"]), dict(state["recent"])
        self._average, self._mixture = dict(state["average"]), dict(state["mixture"])
