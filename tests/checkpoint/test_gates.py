"""A checkpoint stored by version 1 stays readable, and nothing in lmtrain may unpickle."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import lmtrain
from lmtrain.checkpoint.table import DTYPES

FIXTURE = Path(__file__).parent / "fixtures" / "v1"
DOCUMENTS = {"loop": {"tokens": 4096, "lr": 0.1}, "schedule": [{"at": 0, "weights": {"code": 1}}]}


def stored() -> dict[str, torch.Tensor]:
    """What the fixture holds: ``Checkpointer(FIXTURE, ...).save(7, stored(), DOCUMENTS)`` made it."""
    tensors = {f"model.{name}": torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in DTYPES.items()}
    return {**tensors, "model.empty": torch.zeros(0, 2), "optimizer.step.w": torch.tensor(7)}


def test_a_checkpoint_of_version_1_is_readable(make):
    checkpointer = make(start_id="reader")
    path = checkpointer.find(str(FIXTURE))
    assert path == FIXTURE / "checkpoints" / "step-00000007"
    into = {name: torch.zeros_like(tensor) for name, tensor in stored().items()}
    assert checkpointer.load(path, into) == DOCUMENTS
    for name, tensor in stored().items():
        assert torch.equal(into[name].to(torch.complex128), tensor.to(torch.complex128)), name
    assert sum(file.stat().st_size for file in path.iterdir()) < 20_000


@pytest.mark.parametrize("word", [r"pickle\.load", r"torch\.load", r"weights_only\s*=\s*False", r"yaml\.load\("])
def test_nothing_unpickles(word):
    files = sorted(Path(lmtrain.__file__).parent.rglob("*.py"))
    assert files
    assert [str(file) for file in files if re.search(word, file.read_text(encoding="utf-8"))] == []
