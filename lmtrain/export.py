"""Exports a run to Hugging Face transformers: what ``launch/export.py`` runs, and the demo calls."""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from lmtrain.errors import EXIT_DONE, EXIT_INTERNAL, LmtrainError, UsageError, nearest
from lmtrain.hub.card import NO_CACHE, loading
from lmtrain.hub.export import ExportResult, Origin, export_model
from lmtrain.hub.match import require
from lmtrain.trained import RECIPE, load_model

USAGE = """\
Export a trained model to Hugging Face transformers, and prove that it is the same model.

    python launch/export.py RUN [out=RUN/export] [step=N] [dtype=float32|bfloat16] [overwrite=false] [prompt=TEXT]

RUN is the folder of a run, whose newest checkpoint that verifies is taken, or one checkpoint. The class is chosen by
the recipe: it must be able to say every setting, or the reasons are told. Nothing is left behind unless transformers
alone, in a process without lmtrain, computes the same logits.

  out=        folder to make (default RUN/export)
  step=       take this run's checkpoint of that step
  dtype=      of the weights on disk; decays, steps and routers stay float32 (default float32)
  overwrite=  true: replace an export that is there (default false)
  prompt=     text that transformers alone shall continue"""
KEYS = ("out", "step", "dtype", "overwrite", "prompt")


def export(
    run: str | Path,
    out: str | Path | None = None,
    *,
    step: int | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
    prompts: Sequence[str] = (),
    new_tokens: int = 64,
) -> ExportResult:
    """Export a run or a checkpoint; ``prompts`` are continued by transformers alone, greedily. Raises LmtrainError."""
    trained = load_model(run, step)
    require(trained.recipe.model)
    origin = Origin(
        name=trained.run_dir.absolute().name,
        step=trained.step,
        tokens=trained.tokens,
        seq_len=trained.recipe.data.seq_len,
        sources={name: source.weight for name, source in trained.recipe.data.sources.items()},
        recipe=(trained.run_dir / RECIPE).read_text(encoding="utf-8"),
    )
    return export_model(
        trained.model,
        trained.tokenizer,
        origin,
        trained.run_dir / "export" if out is None else Path(out),
        dtype=dtype,
        overwrite=overwrite,
        prompts=prompts,
        new_tokens=new_tokens,
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit code; an error is one line."""
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    if not argv or {"--help", "-h", "help"} & set(argv):
        print(USAGE)
        return EXIT_DONE
    try:
        run, given = _parse(argv)
        begun = time.monotonic()
        result = export(
            run,
            given.get("out"),
            step=_whole(given["step"]) if "step" in given else None,
            dtype=given.get("dtype", "float32"),
            overwrite=_flag(given.get("overwrite", "false")),
            prompts=[given["prompt"]] if "prompt" in given else [],
        )
    except LmtrainError as error:
        print(f"export: {error}", file=sys.stderr)
        return error.exit_code
    except Exception:
        traceback.print_exc()
        return EXIT_INTERNAL
    print(report(result, time.monotonic() - begun))
    return EXIT_DONE


def report(result: ExportResult, seconds: float) -> str:
    """What was made, how it was proven, and how to load it."""
    lines = [
        f"{result.path}: {result.cls}ForCausalLM of transformers, step {result.step:,}, {seconds:.0f} s",
        f"  largest difference of a logit: {result.max_logit_diff:.1e} (standard deviation {result.logit_std:.3g}); "
        f"with every parameter perturbed: {result.perturbed_max_logit_diff:.1e} ({result.perturbed_logit_std:.3g})",
    ]
    cached = result.cached_equals_uncached
    lines.append(f"  {NO_CACHE if cached is None else 'greedy generation with the cache equals that without'}")
    if result.rounding_logit_diff:
        lines.append(f"  rounding to bfloat16 changed the logits by up to {result.rounding_logit_diff:.1e}")
    lines += [f"  transformers alone continues: {text!r}" for text in result.texts]
    return "\n".join([*lines, "", *(f"    {line}" for line in loading(result.path).splitlines())])


def _parse(argv: list[str]) -> tuple[str, dict[str, str]]:
    runs = [word for word in argv if "=" not in word]
    if len(runs) != 1:
        raise UsageError(f"expected one run folder or checkpoint, got {len(runs)}; --help shows how")
    given = dict(word.split("=", 1) for word in argv if "=" in word)
    for key in given:
        if key not in KEYS:
            raise UsageError(f"{key}: unknown key{nearest(key, KEYS)}")
    return runs[0], given


def _whole(text: str) -> int:
    if not text.isdigit():
        raise UsageError(f"step: expected a number of steps, got {text}")
    return int(text)


def _flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise UsageError(f"overwrite: expected true or false, got {text}")
    return text == "true"
