"""Fixtures of the tests that run over all ops."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lmtrain.ops import library
from tests.ops.op_case import Running
from tests.ops.op_cases import running

RUNNING = running()


@pytest.fixture(params=RUNNING)
def op(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Running:
    """A case, its backend chosen; one that is not built is an error, unless this machine cannot have it."""
    chosen = RUNNING[request.param]
    if chosen.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.setenv("LMTRAIN_KERNELS", chosen.backend.name)
    if chosen.case.op in library.registered():
        assert library.backend(chosen.case.op, chosen.device, chosen.widest) == chosen.backend.name
    return chosen


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that torch hands out uninitialised holds NaN."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)
