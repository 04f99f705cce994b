"""A folder to write recipes in, and the smallest recipe that loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

SMALL = """
model:
  d_model: 64
  branches:
    ssm: {kind: mamba2, head_dim: 32}
    attn: {kind: attention, num_heads: 4}
    mlp: {kind: mlp, d_ff: 128}
  pattern: ssm mlp attn mlp
data:
  tokenizer: tokenizer.json
  seq_len: 128
  sources:
    code: {path: data/code}
train:
  steps: 10
  batch_tokens: 1024
  lr: 1e-3
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """Writes a file below the working directory, whose name messages then cite."""
    monkeypatch.chdir(tmp_path)

    def save(name: str, text: str) -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return f"./{name}"

    save("small.yaml", SMALL)
    return save
