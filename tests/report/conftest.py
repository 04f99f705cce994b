"""A run folder to report on, made of stored metrics and written pieces."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

FIXTURE = Path(__file__).parent / "fixtures" / "metrics-v1.jsonl"
RECIPE = """\
model:
  d_model: 32
  branches:
    ssm: {kind: mamba2, head_dim: 16, d_state: 8}
    moe: {kind: moe, num_experts: 4, top_k: 2, d_expert: 32}
    attn: {kind: attention, num_heads: 2}
  pattern: ssm moe attn moe
  vocab_size: 384
data:
  tokenizer: nowhere/tokenizer.json
  seq_len: 64
  sources: {code: {path: nowhere/code, weight: 0.7}, prose: {path: nowhere/prose, weight: 0.3}}
train: {steps: 24, batch_tokens: 128, lr: 1e-3}
"""
SUMMARY = {"format_version": 1, "token_unigram_bpb": 3.4, "token_bigram_bpb": 2.2, "xz_alone_bpb": 1.6}
EVALUATION = {
    "format_version": 1,
    "num_fewshot": 0,
    "tasks": {
        "completion": {"acc": 0.4125, "chance": 0.25},
        "heldout": {"by_position": [{"from": 0, "nats": 7.5}, {"from": 1, "nats": 6.25}]},
    },
}
EXPORT = {"format_version": 1, "architecture": "NemotronHForCausalLM", "parity": {"max_logit_diff": 3e-6}}
ENVIRONMENT = {"attempt": 2, "hardware": {"cpu": "A Processor", "gpu": None}, "variables": {"WORLD_SIZE": "2"}}
EXITS = [
    {"attempt": 1, "step": 12, "code": 75, "reason": "control/stop", "time_unix": 1795509900.0},
    {"attempt": 2, "step": 24, "code": 0, "reason": "done", "time_unix": 1795510290.0},
]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run with everything but a checkpoint."""
    run = tmp_path / "runs" / "small-moe"
    (run / "export").mkdir(parents=True)
    shutil.copy(FIXTURE, run / "metrics.jsonl")
    (run / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    (run / "exits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in EXITS), encoding="utf-8")
    pieces = {"summary": SUMMARY, "evaluation": EVALUATION, "export/lmtrain_export": EXPORT, "environment": ENVIRONMENT}
    for name, content in pieces.items():
        (run / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return run
