"""A trained model from a run folder: recipe.yaml and the newest checkpoint that verifies. For export and evaluation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from lmtrain.checkpoint.checkpointer import Checkpointer
from lmtrain.checkpoint.commit import committed
from lmtrain.checkpoint.config import CheckpointConfig
from lmtrain.checkpoint.manifest import directory_name, step_of
from lmtrain.checkpoint.storage import LocalStorage
from lmtrain.checkpoint.table import DTYPES
from lmtrain.config.load import load
from lmtrain.config.recipe import Recipe
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import DataError
from lmtrain.model.language_model import LanguageModel
from lmtrain.plan.dry_run import embedding_rows

RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class Trained:
    """The model in fp32, in evaluation mode, without gradients, and where it comes from."""

    model: LanguageModel
    recipe: Recipe
    tokenizer: Tokenizer
    run_dir: Path
    checkpoint: Path
    step: int
    tokens: int | None


def load_model(source: str | Path, step: int | None = None, device: torch.device | str = "cpu") -> Trained:
    """Load from a run folder (its newest checkpoint that verifies, or the one of ``step``) or from one checkpoint.

    One process, no torch.distributed. Raises DataError for what is missing, damaged or does not fit together.
    """
    run_dir, named = _place(Path(source), step)
    recipe = load([f"recipe={run_dir.absolute() / RECIPE}"]).recipe
    checkpointer = Checkpointer(run_dir, CheckpointConfig(), start_id="reader", identity={})
    path = named or checkpointer.find("true")
    assert path is not None, "find('true') raises where there is none"
    manifest = checkpointer.manifest(path)
    tokenizer = _tokenizer(recipe.data.tokenizer, run_dir)
    if tokenizer.fingerprint != manifest.get("tokenizer_fingerprint"):
        raise DataError(f"{tokenizer.path}: not the tokenizer that {path} was trained with (its fingerprint differs)")
    vocab_size = embedding_rows(recipe.model, tokenizer.vocab_size)
    assert vocab_size is not None, "known, since the tokenizer is"
    with torch.device("meta"):
        model = LanguageModel(recipe.model, vocab_size)
    model.to_empty(device="cpu").requires_grad_(False).eval()
    ours = model.state_dict()
    saved = {name: entry["dtype"] for name, entry in manifest["tensors"].items()}
    # masters are fp32 unless the run was in fp64
    filled = {
        f"model.{name}": tensor.to(DTYPES[saved.get(f"model.{name}", "float32")]) for name, tensor in ours.items()
    }
    checkpointer.load(path, filled, prefix="model.")
    for name, tensor in ours.items():
        tensor.copy_(filled[f"model.{name}"])
    return Trained(model.to(device), recipe, tokenizer, run_dir, path, manifest["step"], manifest.get("tokens"))


def _place(source: Path, step: int | None) -> tuple[Path, Path | None]:
    """The run folder, and the checkpoint if one is named."""
    if step_of(source.name) is not None and (source.parent.parent / RECIPE).is_file():
        if step is not None:
            raise DataError(f"{source} is one checkpoint; step={step} chooses among those of a run folder")
        return source.parent.parent, source
    if not (source / RECIPE).is_file():
        raise DataError(f"{source}: neither the folder of a run (no {RECIPE} in it) nor one of a run's checkpoints")
    there = committed(LocalStorage(), source / "checkpoints")
    if not there:
        raise DataError(f"{source}: there is no checkpoint in {source / 'checkpoints'}; train this run first")
    if step is None:
        return source, None
    named = source / "checkpoints" / directory_name(step)
    if named not in there:
        steps = ", ".join(str(step_of(path.name)) for path in reversed(there))
        raise DataError(f"{source}: there is no checkpoint of step {step}; there are {steps}")
    return source, named


def _tokenizer(path: str, run_dir: Path) -> Tokenizer:
    """The recipe's tokenizer; a relative path that leads nowhere from here is tried from where the run was started."""
    environment = run_dir / "environment.json"
    if not Path(path).exists() and environment.exists():
        began = Path(json.loads(environment.read_text(encoding="utf-8")).get("directory", ""))
        if (began / path).exists():
            return Tokenizer.load(began / path)
    if not Path(path).exists():
        raise DataError(
            f"{path}: no such tokenizer; {run_dir / RECIPE} names it, run this in the folder it is relative to"
        )
    return Tokenizer.load(path)
