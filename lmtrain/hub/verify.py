"""Proof that an export is the model: transformers alone, in another process, must compute the same logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lmtrain.errors import DataError
from lmtrain.hub.table import HubClass
from lmtrain.model.context import LocalContext
from lmtrain.model.ffn.moe import MoE
from lmtrain.model.language_model import LanguageModel
from lmtrain.ops.documents import Documents

TOLERANCE = 1e-4
"""Largest difference of a logit, relative to the logits' standard deviation, in fp32."""
TIE = 1e-5
"""Router scores this close may be ordered otherwise by other rounding: a row is compared up to the first such token."""
GREEDY = 24
LENGTH, LONGEST, ROWS = 133, 2048, 2
"""Tokens per row (several chunks of a scan, no multiple of one), at most where a window is longer; rows."""


@dataclass(frozen=True)
class Loaded:
    """What the other process found. ``cached``: greedy with the cache equals without; None if it cannot cache."""

    max_logit_diff: float
    logit_std: float
    compared: float  # share of the positions
    cached: bool | None
    cached_diff: float | None
    texts: list[str]


@dataclass
class Check:
    """One folder to verify, with what lmtrain computes: ``logits`` fp32 ``[B, T, V]`` of int ``tokens``."""

    folder: Path
    cls: HubClass
    tokens: Tensor
    logits: Tensor
    comparable: Tensor  # bool [B, T]
    elements: int  # numbers on disk
    eod_id: int
    prompts: Sequence[str] = ()
    new_tokens: int = 0
    problems: list[str] = field(default_factory=list)


def probe_tokens(model: LanguageModel, seed: int = 0) -> Tensor:
    """Random tokens, longer than the windows where that is affordable: int64 ``[ROWS, T]``."""
    windows = [getattr(one, "window", None) or 0 for one in (model.cfg.branches[name] for name in model.cfg.order())]
    length = min(max(LENGTH, max(windows) + 9), LONGEST)
    return torch.randint(model.vocab_size, (ROWS, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model: LanguageModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 logits ``[B, T, V]``, and bool ``[B, T]``: False from a row's first near tie of a router on."""
    comparable = torch.ones(tokens.shape, dtype=torch.bool)

    def watch(branch: MoE) -> Any:
        def hook(module: nn.Module, inputs: Any, scores: Tensor) -> None:
            scores = scores.sigmoid() if branch.cfg.router == "sigmoid" else scores.softmax(dim=-1)
            if branch.cfg.balance == "bias":
                scores = scores + branch.router_bias
            best = scores.sort(dim=-1, descending=True).values
            if branch.cfg.top_k < best.shape[-1]:
                gap = best[:, branch.cfg.top_k - 1] - best[:, branch.cfg.top_k]
                comparable.logical_and_((gap > TIE).view_as(comparable))

        return branch.router.register_forward_hook(hook)

    hooks = [watch(module) for module in model.modules() if isinstance(module, MoE)]
    try:
        docs = Documents.from_ids(torch.zeros(tokens.shape, dtype=torch.int32))
        logits, _ = model(tokens, LocalContext(docs), {})
    finally:
        for each in hooks:
            each.remove()
    return logits.float(), comparable.cummin(dim=1).values


def run_transformers(checks: Sequence[Check], work: Path) -> list[Loaded]:
    """Verify folders in one other process, in which lmtrain cannot be imported; ``work`` is for its files.

    Raises DataError, telling every difference of every folder.
    """
    jobs = [
        {
            "folder": str(check.folder),
            "tokens": check.tokens.tolist(),
            "logits": str(work / f"logits-{index}.safetensors"),
            "greedy": GREEDY,
            "prompts": list(check.prompts),
            "new_tokens": check.new_tokens,
        }
        for index, check in enumerate(checks)
    ]
    results = _call(jobs, work)
    loaded = [_judge(check, job, result) for check, job, result in zip(checks, jobs, results, strict=True)]
    problems = [f"{check.cls.name}: {problem}" for check in checks for problem in check.problems]
    if problems:
        raise DataError(f"what transformers loads is not the model that was trained: {'; '.join(problems)}")
    return [one for one in loaded if one is not None]


def _call(jobs: list[dict[str, Any]], work: Path) -> list[dict[str, Any]]:
    asked, told = work / "jobs.json", work / "results.json"
    asked.write_text(json.dumps(jobs), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # -P: the script's own folder, whose modules have common names, stays off the path
    command = [sys.executable, "-P", str(Path(__file__).with_name("verify_export.py")), str(asked), str(told)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode or not told.exists():
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DataError(f"the process that loads the export with transformers ended with {done.returncode}: {last}")
    results: list[dict[str, Any]] = json.loads(told.read_text(encoding="utf-8"))
    return results


def _judge(check: Check, job: dict[str, Any], result: dict[str, Any]) -> Loaded | None:
    """Compare; what differs goes to ``check.problems``."""
    problems = check.problems
    if "error" in result:
        problems.append(f"does not load: {result['error'].splitlines()[0]}")
        return None
    if result["architecture"] != check.cls.architecture:
        problems.append(f"loads as {result['architecture']}, not {check.cls.architecture}")
    for what, names in result["loading"].items():
        problems.append(
            f"{what.replace('_', ' ')}: {', '.join(names[:3])}{f' and {len(names) - 3} more' * (len(names) > 3)}"
        )
    if result["unknown_keys"]:
        problems.append(f"config.json: keys the class does not have: {', '.join(result['unknown_keys'])}")
    if result["elements"] != check.elements:
        problems.append(f"{check.elements:,} numbers on disk, {result['elements']:,} in the model")
    if result["eos"] != check.eod_id:
        problems.append(f"the tokenizer's end of document is {result['eos']}, not {check.eod_id}")
    if result["vocab"] > check.logits.shape[-1]:
        problems.append(f"the tokenizer has {result['vocab']} tokens, the model {check.logits.shape[-1]}")
    theirs = load_file(job["logits"])["logits"]
    if theirs.shape != check.logits.shape:
        problems.append(f"logits are {tuple(theirs.shape)}, not {tuple(check.logits.shape)}")
        return None
    compared = float(check.comparable.float().mean())
    diff, std = float((theirs - check.logits)[check.comparable].abs().max()), float(check.logits.std())
    if not compared or not diff < TOLERANCE * std:  # also where it is not a number
        problems.append(
            f"logits differ by {diff:.2e}, {diff / std:.1e} of their standard deviation (at most {TOLERANCE:g})"
        )
    cached = result["cached"]
    if cached is not None and not cached["equal"]:
        problems.append(
            f"greedy generation with the cache differs from that without, logits by {cached['max_diff']:.2e}"
        )
    equal, cached_diff = (None, None) if cached is None else (cached["equal"], cached["max_diff"])
    return Loaded(diff, std, compared, equal, cached_diff, result["texts"])
