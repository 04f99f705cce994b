"""Fixtures shared by several folders."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# helpers beside the tests are imported as `tests.…`, here and in spawned ranks, whatever started pytest
sys.path.insert(0, str(Path(__file__).parents[1]))

from lmtrain.ops import library
from tests.distributed.ranks import Ranks


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """torch seeds a process as it likes: what a test draws without a generator would differ from run to run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def every_kernel() -> Iterator[None]:
    """A run started in this process may have chosen kernels: the next test begins as a new process would."""
    yield
    library.set_kernels("auto")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes for checks on several ranks; started when first used."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def small_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of a small model and its prepared data (tests/small_run.py); read only."""
    from tests.small_run import make_recipe  # imports the whole product

    return make_recipe(tmp_path_factory.mktemp("small"))
