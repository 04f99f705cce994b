"""What a probe hands out: tokens, and where they ask for which answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NOT_ASKED = -100
"""A label that does not count, as ``lmtrain.ops.cross_entropy.IGNORE``."""


@dataclass(frozen=True)
class Document:
    """``labels[t]`` is the right answer once ``tokens[: t + 1]`` were read, ``NOT_ASKED`` where there is no question.

    Both int32 ``[T]``. The last question's answer is the last token or stands before it: every question has a token
    behind it, so that ``tokens[:-1]`` with ``labels[:-1]`` are inputs and targets.
    """

    tokens: NDArray[np.int32]
    labels: NDArray[np.int32]


def generator(seed: int, index: int) -> np.random.Generator:
    """The document's own randomness: any document is made without those before it."""
    return np.random.default_rng((seed, index))
