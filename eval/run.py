"""One evaluation: a run, a checkpoint or an export in, plain data out (docs/formats.md, evaluation.json)."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lmtrain import __version__
from lmtrain.checkpoint.checkpointer import HASHER
from lmtrain.checkpoint.manifest import read_manifest
from lmtrain.checkpoint.storage import LocalStorage
from lmtrain.data.heldout import Heldout
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.errors import DataError, StorageError, UsageError
from lmtrain.eval import heldout as heldout_score
from lmtrain.hub.export import FACTS
from lmtrain.ops.library import chosen
from lmtrain.train.hardware import resolve_device
from lmtrain.trained import load_model

FORMAT_VERSION = 1
QUESTIONS = Path(__file__).parent / "data" / "mmlu_python"
"""A few questions about Python in MMLU's layout, to see an evaluation run."""
PROMPT_TOKENS = 32


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured, and how."""

    heldout: bool | None = None
    """Bits per byte of the run's held-out text; default: only if nothing else is asked for."""
    max_tokens: int | None = None
    """Score at most this many held-out tokens of each source; null: all."""
    mmlu: str | None = None
    """Folder of questions in MMLU's layout: test/SUBJECT_test.csv, dev/SUBJECT_dev.csv."""
    num_fewshot: int = 5
    """Solved questions before each question of mmlu=, the first rows of dev."""
    mmlu_format: Literal["letter", "continuation"] = "letter"
    """letter: the model picks A, B, C or D; continuation: the options' own text is scored (better for small models)."""
    tasks: str | None = None
    """Names of lm-eval tasks, with commas between them, defined in include=."""
    include: str | None = None
    """Folder of lm-eval task YAML files."""
    limit: int | None = None
    """Questions of each task or subject; null: all."""
    batch: int = 8
    """Rows of a forward pass."""
    max_length: int | None = None
    """Most tokens of a prompt; longer ones lose their left end. Default: the recipe's data.seq_len."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs."""

    def __post_init__(self) -> None:
        for key in ("max_tokens", "limit", "batch", "max_length"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UsageError(f"{key}: must be at least 1, got {value}")
        if self.num_fewshot < 0:
            raise UsageError(f"num_fewshot: must not be negative, got {self.num_fewshot}")
        if (self.tasks is None) != (self.include is None):
            raise UsageError("tasks=NAME,... and include=FOLDER go together: the tasks and where their YAML files are")

    @property
    def scores_heldout(self) -> bool:
        """Whether held-out text is scored."""
        return self.heldout if self.heldout is not None else self.mmlu is None and self.tasks is None


def evaluate_run(where: str | Path, cfg: EvaluateConfig | None = None, **settings: Any) -> dict[str, Any]:
    """Measure the run, checkpoint or export in ``where``; settings are those of ``EvaluateConfig``. Writes nothing.

    Raises UsageError, DataError. The process's random state is as before.
    """
    cfg = EvaluateConfig(**settings) if cfg is None else cfg
    begun = time.monotonic()
    result: dict[str, Any] = {"format_version": FORMAT_VERSION, "where": str(where), "time_unix": int(time.time())}
    result |= _evaluate_export(Path(where), cfg) if is_export(where) else _evaluate_checkpoint(Path(where), cfg)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "lm-eval", "datasets", "transformers")}
    result["versions"] = {"lmtrain": __version__, **versions}
    used = dataclasses.asdict(cfg) | {"heldout": cfg.scores_heldout}
    result["settings"] = {key: str(value) if isinstance(value, Path) else value for key, value in used.items()}
    return {**result, "seconds": round(time.monotonic() - begun, 3)}


def is_export(where: str | Path) -> bool:
    """Whether a folder is one that transformers loads."""
    return (Path(where) / "config.json").is_file()


def _evaluate_checkpoint(where: Path, cfg: EvaluateConfig) -> dict[str, Any]:
    device = resolve_device(cfg.device)
    trained = load_model(where, device=device)
    model, recipe, tokenizer = trained.model, trained.recipe, trained.tokenizer
    manifest = read_manifest(LocalStorage(), trained.checkpoint, HASHER)
    max_length = cfg.max_length or recipe.data.seq_len
    dtype = next(model.parameters()).dtype
    result: dict[str, Any] = {
        "kind": "checkpoint",
        "checkpoint": str(trained.checkpoint),
        "step": trained.step,
        "tokens": trained.tokens,
        "recipe_sha256": manifest.get("recipe_sha256"),
        "model_fingerprint": manifest.get("model_fingerprint"),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "kernels": chosen(device.type, dtype),
        "max_length": max_length,
    }
    if cfg.scores_heldout:
        held = Heldout(recipe.data, cfg.max_tokens)
        if not held.source_names:
            raise DataError(f"{where}: no source of its recipe has held-out text; prepare it with heldout=0.03")
        result["heldout"] = heldout_score.score(model, held, cfg.batch)
        result["decoding"] = heldout_score.cached_equals_uncached(model, _prompt(held, tokenizer))
    if cfg.mmlu or cfg.tasks:
        from lmtrain.eval.adapter import LMTrainLM  # lm-eval takes seconds to import

        lm = LMTrainLM(model=model, tokenizer=tokenizer, max_length=max_length, batch_size=cfg.batch)
        result |= _harness(lm, cfg)
        result["truncated_requests"] = lm.truncated
    return result


def _prompt(held: Heldout, tokenizer: Tokenizer) -> list[int]:
    """How the held-out text begins."""
    first = next(held.batches(held.source_names[0], 1))
    tokens = first.tokens[0, : int((first.docs.ids[0] == first.docs.ids[0, 0]).sum())].tolist()
    return [int(token) for token in tokens[:PROMPT_TOKENS] if token != tokenizer.eod_id] or [tokenizer.eod_id]


def _evaluate_export(where: Path, cfg: EvaluateConfig) -> dict[str, Any]:
    """Through lm-eval's own model class for transformers."""
    if cfg.scores_heldout:
        raise UsageError(
            f"{where}: an export does not know its held-out text; use mmlu=FOLDER or tasks=NAME include=FOLDER, "
            "or evaluate the run it was made from"
        )
    from lm_eval.models.huggingface import HFLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it advises kernels for GPUs
    device = resolve_device(cfg.device)
    try:
        lm: Any = HFLM(
            pretrained=str(where), device=str(device), dtype="float32", batch_size=cfg.batch, max_length=cfg.max_length
        )
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{where}: transformers does not load it: {str(error).splitlines()[0]}") from error
    facts = {"kind": "export", "device": str(device), "dtype": "float32", "max_length": lm.max_length}
    return {**facts, "model_type": lm.config.model_type, **_origin(where), **_harness(lm, cfg)}


def _origin(where: Path) -> dict[str, Any]:
    """Of which checkpoint an export of ours was made; nothing for another's."""
    source = where / FACTS
    if not source.is_file():
        return {}
    told = json.loads(source.read_text(encoding="utf-8"))
    return {"step": told["step"], "tokens": told["tokens"], "tokenizer_fingerprint": told["tokenizer"]["fingerprint"]}


def _harness(lm: Any, cfg: EvaluateConfig) -> dict[str, Any]:
    from lmtrain.eval import mmlu
    from lmtrain.eval.harness import run_tasks

    found: dict[str, Any] = {}
    if cfg.mmlu is not None:
        found["mmlu"] = mmlu.score(lm, cfg.mmlu, num_fewshot=cfg.num_fewshot, limit=cfg.limit, form=cfg.mmlu_format)
    if cfg.tasks is not None and cfg.include is not None:
        results = run_tasks(lm, cfg.include, [name.strip() for name in cfg.tasks.split(",")], limit=cfg.limit)
        found["tasks"] = {name: _task_line(results, name) for name in results["results"]}
    return found


def _task_line(results: dict[str, Any], name: str) -> dict[str, Any]:
    """What lm-eval measured for one task or group."""
    metrics = {
        key.removesuffix(",none"): float(value)
        for key, value in results["results"][name].items()
        if isinstance(value, int | float) and "stderr" not in key and key not in ("sample_len", "sample_count")
    }
    facts = {"version": results["versions"].get(name), "num_fewshot": results["n-shot"].get(name)}
    return {**metrics, **facts, "questions": results.get("n-samples", {}).get(name, {}).get("effective")}


def default_path(where: str | Path) -> Path:
    """evaluation.json of a run or an export; of one checkpoint of a run, evaluation-step-N.json in the run's folder."""
    where = Path(where)
    checkpoint = where.absolute().parent.name == "checkpoints"
    return where.parent.parent / f"evaluation-{where.name}.json" if checkpoint else where / "evaluation.json"


def write(result: dict[str, Any], path: str | Path) -> None:
    """The result as JSON, whole or not at all. Raises StorageError."""
    partial = Path(path).with_name(f".{Path(path).name}.partial")
    try:
        partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from error
