"""A power law with a floor, fitted to a loss curve: L(n) = eps + beta n^-alpha."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

Floats = NDArray[np.float64]

HUBER = 1e-3
ALPHA = (1e-3, 0.8)
"""Bounds of alpha, and in units of the log loss where Huber's parabola becomes a line: of ADO's code."""
LOWEST_FLOOR = 0.2
"""eps is at least this share of the newest loss: a short curve does not tell a floor from a slow power."""
STARTS = 6
MAX_ITERATIONS = 200


class PowerLaw(NamedTuple):
    """L(n) = eps + beta n^-alpha."""

    alpha: float
    beta: float
    eps: float

    def reducible(self, n: float) -> float:
        """L(n) - eps."""
        return self.beta * n**-self.alpha


def fit(n: Floats, loss: Floats) -> PowerLaw:
    """The law that minimises the mean Huber loss of log L(n) - log ``loss`` (arXiv 2410.11820, appendix).

    n, loss: positive, ``[points]``. L-BFGS-B from the best points of a grid. Inside, n is counted in units of its last
    value: the parameters log b (b = L - eps there), log eps and alpha are then of order one and hardly correlated.
    """
    x, y = np.log(n / n[-1]), np.log(loss)
    newest = float(np.median(loss[-max(len(loss) // 10, 1) :]))

    def objective(params: Floats) -> tuple[float, Floats]:
        log_b, log_eps, alpha = params
        falling = log_b - alpha * x
        predicted = np.logaddexp(falling, log_eps)
        miss = predicted - y
        weight = np.clip(miss, -HUBER, HUBER) / len(x)
        share = np.exp(falling - predicted)
        size = np.abs(miss)
        value = np.where(size > HUBER, HUBER * (size - HUBER / 2), miss**2 / 2).mean()
        gradient = np.array([weight @ share, weight @ (1 - share), -(weight * share) @ x])
        return value / HUBER**2, gradient / HUBER**2  # of order one, where L-BFGS-B's tolerances are meant to be

    grid = [
        np.array([np.log((1 - part) * newest), np.log(part * newest), alpha])
        for part in (0.25, 0.4, 0.55, 0.7, 0.8, 0.9, 0.96)
        for alpha in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    ]
    grid.sort(key=lambda start: objective(start)[0])
    bounds = [(None, None), (np.log(LOWEST_FLOOR * newest), None), ALPHA]
    options = {"maxiter": MAX_ITERATIONS}
    results = [minimize(objective, start, jac=True, bounds=bounds, options=options) for start in grid[:STARTS]]
    log_b, log_eps, alpha = min(results, key=lambda result: result.fun).x
    return PowerLaw(float(alpha), float(np.exp(log_b + alpha * np.log(n[-1]))), float(np.exp(log_eps)))
