"""Writes a model in the form of a transformers class, proves that it is the same model, and only then shows it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmtrain import __version__
from lmtrain.checkpoint.checkpointer import HASHER
from lmtrain.checkpoint.manifest import FileRecord
from lmtrain.checkpoint.storage import LocalStorage, check_space
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import StorageError, UsageError
from lmtrain.hub.card import card
from lmtrain.hub.folder import as_json, write_folder, write_text
from lmtrain.hub.match import require
from lmtrain.hub.table import HubClass, to_disk
from lmtrain.hub.tokenizer_files import tokenizer_files
from lmtrain.hub.verify import Check, Loaded, logits_of, probe_tokens, run_transformers
from lmtrain.model.language_model import LanguageModel

FORMAT_VERSION = 1
FACTS = "lmtrain_export.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PERTURBATION = 0.05


@dataclass(frozen=True)
class Origin:
    """Where a model comes from, for the files that tell of it. ``sources``: weights of the data by name."""

    name: str
    step: int
    tokens: int | None
    seq_len: int
    sources: dict[str, float]
    recipe: str  # the resolved recipe, YAML


@dataclass(frozen=True)
class ExportResult:
    """An export that is proven and in place.

    max_logit_diff, logit_std: between lmtrain and transformers in fp32; the perturbed pair: the same with every
    parameter moved. cached_equals_uncached: None if the class cannot use its cache. rounding_logit_diff: what bfloat16
    changed.
    texts: the prompts continued by transformers alone.
    """

    cls: str
    path: Path
    step: int
    max_logit_diff: float
    logit_std: float
    perturbed_max_logit_diff: float
    perturbed_logit_std: float
    cached_equals_uncached: bool | None
    rounding_logit_diff: float
    texts: list[str]


def export_model(
    model: LanguageModel,
    tokenizer: Tokenizer,
    origin: Origin,
    out: Path,
    *,
    dtype: str = "float32",
    overwrite: bool = False,
    prompts: Sequence[str] = (),
    new_tokens: int = 64,
) -> ExportResult:
    """Export to the folder ``out``. The model, fp32 on the host, is used up: it is perturbed for the second proof.

    Raises UsageError (no class is this model, ``out`` is taken), DataError (not the same logits; nothing is left),
    StorageError.
    """
    cls = require(model.cfg)
    if dtype not in DTYPES:
        raise UsageError(f"dtype: expected float32 or bfloat16, got {dtype}")
    tokenizer_files(tokenizer, origin.seq_len)  # refused before anything is written
    if not all(ids.size for ids in tokenizer.encode_batch(prompts)):
        raise UsageError("prompt: expected some text to continue")
    _refuse_taken(out, overwrite)
    work = out.absolute().with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        numbers = sum(tensor.numel() for tensor in model.state_dict().values())
        check_space(out.absolute().parent, 2 * numbers * DTYPES[dtype].itemsize)
        work.mkdir()
        return _export(cls, model, tokenizer, origin, out, work, DTYPES[dtype], prompts, new_tokens)
    except OSError as error:
        raise StorageError(f"{out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _refuse_taken(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not (out / FACTS).is_file():
        raise UsageError(f"{out}: exists and is not an export of lmtrain; choose another out=")
    if not overwrite:
        raise UsageError(f"{out}: an export is there; choose another out=, or replace it with overwrite=true")


def _export(
    cls: HubClass,
    model: LanguageModel,
    tokenizer: Tokenizer,
    origin: Origin,
    out: Path,
    work: Path,
    dtype: torch.dtype,
    prompts: Sequence[str],
    new_tokens: int,
) -> ExportResult:
    tokens = probe_tokens(model)
    exact, _ = logits_of(model, tokens)
    round_weights(cls, model, dtype)
    files = write_folder(work / "export", cls, model, tokenizer, origin.seq_len, dtype)
    real = make_check(work / "export", cls, model, tokenizer, tokens, prompts, new_tokens)
    perturb(model)
    round_weights(cls, model, dtype)
    write_folder(work / "perturbed", cls, model, tokenizer, origin.seq_len, dtype)
    moved = make_check(work / "perturbed", cls, model, tokenizer, tokens)
    loaded = run_transformers([real, moved], work)
    result = ExportResult(
        cls=cls.name,
        path=out,
        step=origin.step,
        max_logit_diff=loaded[0].max_logit_diff,
        logit_std=loaded[0].logit_std,
        perturbed_max_logit_diff=loaded[1].max_logit_diff,
        perturbed_logit_std=loaded[1].logit_std,
        cached_equals_uncached=loaded[0].cached,
        rounding_logit_diff=float((real.logits - exact).abs().max()),
        texts=loaded[0].texts,
    )
    _describe(work / "export", cls, model, tokenizer, origin, dtype, files, result, loaded, tokens.shape)
    _publish(work, out)
    return result


def make_check(
    folder: Path,
    cls: HubClass,
    model: LanguageModel,
    tokenizer: Tokenizer,
    tokens: Tensor,
    prompts: Sequence[str] = (),
    new_tokens: int = 0,
) -> Check:
    """What to hold ``folder`` against: the logits of ``model`` as it is now."""
    logits, comparable = logits_of(model, tokens)
    meta = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    elements = sum(tensor.numel() for _, tensor in to_disk(cls.rules(model.cfg), meta))
    return Check(folder, cls, tokens, logits, comparable, elements, tokenizer.eod_id, prompts, new_tokens)


@torch.no_grad()
def round_weights(cls: HubClass, model: LanguageModel, dtype: torch.dtype) -> None:
    """Round in place what is written in ``dtype``."""
    ours = model.state_dict()
    for rule in cls.rules(model.cfg):
        for name in () if rule.keep_fp32 else rule.ours:
            ours[name].copy_(ours[name].to(dtype))


@torch.no_grad()
def perturb(model: LanguageModel, seed: int = 0) -> None:
    """Add noise to every parameter and buffer, in place: what starts at 0 or 1 would let a wrong table pass."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        scale = float(tensor.square().mean().sqrt()) or 1.0
        tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=PERTURBATION * scale)


def _describe(
    folder: Path,
    cls: HubClass,
    model: LanguageModel,
    tokenizer: Tokenizer,
    origin: Origin,
    dtype: torch.dtype,
    files: dict[str, FileRecord],
    result: ExportResult,
    loaded: Sequence[Loaded],
    probe: Sequence[int],  # rows and columns of the tokens
) -> None:
    facts: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "name": origin.name,
        "class": cls.architecture,
        "dtype": str(dtype).removeprefix("torch."),
        "step": origin.step,
        "tokens": origin.tokens,
        "seq_len": origin.seq_len,
        "vocab_size": model.vocab_size,
        "num_params": model.cfg.num_params(model.vocab_size),
        "num_active_params": model.cfg.num_params(model.vocab_size, active=True),
        "sources": origin.sources,
        "tokenizer": {"vocab_size": tokenizer.vocab_size, "eod": tokenizer.eod, "fingerprint": tokenizer.fingerprint},
        "lmtrain": __version__,
        **{package: importlib.metadata.version(package) for package in ("torch", "transformers")},
        "parity": {
            "max_logit_diff": result.max_logit_diff,
            "logit_std": result.logit_std,
            "probe": list(probe),
            "compared_share": loaded[0].compared,
            "perturbed_max_logit_diff": result.perturbed_max_logit_diff,
            "perturbed_logit_std": result.perturbed_logit_std,
            "perturbed_compared_share": loaded[1].compared,
            "cached_equals_uncached": result.cached_equals_uncached,
            "cached_max_logit_diff": loaded[0].cached_diff,
        },
        "rounding_logit_diff": result.rounding_logit_diff,
        "texts": result.texts,
    }
    files["README.md"] = write_text(folder / "README.md", card(cls, model.cfg, facts))
    files["recipe.yaml"] = write_text(folder / "recipe.yaml", origin.recipe)
    listed = {name: {"bytes": record.bytes, HASHER.name: record.digest} for name, record in sorted(files.items())}
    write_text(folder / FACTS, as_json(facts | {"files": listed}))


def _publish(work: Path, out: Path) -> None:
    """One rename shows the export; one that was there goes with ``work``."""
    storage = LocalStorage()
    storage.fsync_dir(work / "export")
    if out.exists():
        os.rename(out, work / "replaced")
    os.rename(work / "export", out)
    storage.fsync_dir(out.absolute().parent)
