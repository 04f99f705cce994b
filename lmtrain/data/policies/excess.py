"""Excess loss over a reference: a source that lags behind a stored curve is read more (the online half of DoReMi).

DoReMi (Xie et al. 2023, arXiv 2305.10429) compares with a second model, token by token; here the reference is a curve
of bits per byte over tokens, e.g. of a smaller run of the same recipe, and the comparison is by source.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lmtrain.data.policies.config import PolicyConfig
from lmtrain.data.policies.policy import MixPolicy, Progress, Run, among, shares
from lmtrain.data.policies.window import Window
from lmtrain.errors import DataError, nearest

FORMAT_VERSION = 1
STEP_SIZE, SMOOTHING = 1.0, 1e-3
"""eta and c of the paper."""

log = logging.getLogger(__name__)

Curve = list[tuple[float, float]]


class Excess(MixPolicy):
    """alpha_d *= exp(eta max(l_d - l_ref,d(tokens), 0)), normalised, then mixed with c of the uniform mixture.

    Once every ``every`` steps, with mean losses since the last time, in nats per byte. Before the curve's first point
    and after its last one these hold; between two it is straight in the logarithm of tokens.
    """

    def __init__(self, cfg: PolicyConfig, first: Mapping[str, float], run: Run) -> None:
        """DataError for a reference that cannot be read, or lacks a source of the first mixture."""
        super().__init__(cfg, first, run)
        assert cfg.reference is not None
        self._curves = read_reference(cfg.reference)
        for name in first:
            if name not in self._curves:
                raise DataError(f"{cfg.reference}: no curve of source {name}{nearest(name, self._curves)}")
        self._alpha = dict(self.first)
        self._window = Window(cfg.every, cfg.start_tokens)

    def observe(self, step: int, tokens: Mapping[str, float], bits: Mapping[str, float]) -> None:
        if seen := self._window.add(step, tokens, bits):
            alpha = self._alpha | {name: seen.share[name] for name in seen.share if name not in self._alpha}
            for name, loss in seen.bits.items():
                alpha[name] *= math.exp(STEP_SIZE * max(self._excess(name, loss), 0.0))
            total = sum(alpha.values())
            self._alpha = {
                name: (1 - SMOOTHING) * value / total + SMOOTHING / len(alpha) for name, value in alpha.items()
            }

    def _excess(self, name: str, bits: float) -> float:
        """Nats per byte over the reference; 0 for a source that came during the run and has none."""
        if name not in self._curves:
            return 0.0
        x, y = zip(*self._curves[name], strict=True)
        return (bits - float(np.interp(math.log(self._window.read), np.log(x), y))) * math.log(2)

    def propose(self, step: int, progress: Progress) -> dict[str, float] | None:
        return shares(among(self._alpha, progress.weights))

    def state_dict(self) -> dict[str, Any]:
        return {"alpha": dict(self._alpha), "window": self._window.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._alpha = dict(state["alpha"])
        self._window.load_state_dict(state["window"])


def read_reference(path: str | Path) -> dict[str, Curve]:
    """Points (tokens of the run, bits per byte) by source, tokens rising. Raises DataError naming file and source.

    The file: ``{"format_version": 1, "sources": {NAME: [[tokens, bits_per_byte], ...]}}``.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if data["format_version"] > FORMAT_VERSION:
            raise DataError(f"{path}: format {data['format_version']}, this lmtrain reads up to {FORMAT_VERSION}")
        curves = {
            str(name): [(float(tokens), float(bits)) for tokens, bits in points]
            for name, points in data["sources"].items()
        }
    except OSError as error:
        raise DataError(f"data.policy.reference: {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a reference curve (docs/data.md): {type(error).__name__}: {error}") from None
    for name, curve in curves.items():
        tokens = [point[0] for point in curve]
        rising = all(a < b for a, b in zip([0.0, *tokens], tokens, strict=False))
        if not curve or not rising or not all(math.isfinite(value) for point in curve for value in point):
            raise DataError(f"{path}: source {name}: expected points of finite numbers, tokens positive and rising")
    return curves
