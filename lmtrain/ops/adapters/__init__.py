"""Other projects' kernels as backends: one file per library, which translates its conventions into ours.

Written against the signatures of the versions that each file names, held to them by tests on the CPU, and not yet run
on a GPU. A library is imported when it is first called.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch

from lmtrain.ops import library


def needs(package: str) -> Callable[[], str | None]:
    """``Backend.missing`` of a library for CUDA that is imported as ``package``."""

    def missing() -> str | None:
        if find_spec(package) is None:
            return f"{package} is not installed; install it with `{library.GPU_COMMAND}`"
        return None if torch.cuda.is_available() else "torch sees no CUDA device"

    return missing
