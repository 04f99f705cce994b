"""The command line of launch/evaluate.py."""

from __future__ import annotations

import json
import logging
import os
import sys
import typing
from typing import Any

from lmtrain.config.schema import accepts, keys_of
from lmtrain.errors import EXIT_DONE, LmtrainError, UsageError, nearest
from lmtrain.eval.run import QUESTIONS, EvaluateConfig, default_path, evaluate_run, write

OWN = {
    "json": "Print the result as JSON instead of words.",
    "out": "Where the result goes; default: evaluation.json in the folder of the run or export.",
}
"""Keys that say nothing about what is measured."""


def main(argv: list[str], page: str) -> int:
    """Run the command line ``argv``; returns the exit code. ``page`` opens the help."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    # read when these libraries are imported: without it, they retry for a minute before they say there is no network
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ.setdefault(name, "1")
    try:
        if not argv or {"--help", "-h", "help"} & set(argv):
            print(help_page(page))
            return EXIT_DONE
        where, settings, own = parse(argv)
        result = evaluate_run(where, EvaluateConfig(**settings))
        path = own.get("out") or default_path(where)
        write(result, path)
        print(json.dumps(result, indent=2) if own.get("json") else "\n".join([*words(result), f"written to {path}"]))
    except LmtrainError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return error.exit_code
    return EXIT_DONE


def parse(argv: list[str]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The folder, the settings of ``EvaluateConfig``, the keys of ``OWN``. Raises UsageError with the nearest key."""
    where = ""
    settings: dict[str, Any] = {}
    own: dict[str, Any] = {}
    keys = keys_of(EvaluateConfig)
    for argument in argv:
        key, equals, text = argument.partition("=")
        if not equals:
            if where or argument.startswith("-"):
                raise UsageError(f"{argument}: expected key=value; --help shows how")
            where = argument
        elif key in OWN:
            own[key] = _value(key, text, bool if key == "json" else str)
        elif key in keys:
            settings[key] = _value(key, text, keys[key].type)
        else:
            raise UsageError(f"{key}: unknown key{nearest(key, [*keys, *OWN])}")
    if not where:
        raise UsageError("name the folder of a run, a checkpoint or an export first; --help shows examples")
    return where, settings, own


def _value(key: str, text: str, kind: Any) -> Any:
    if typing.get_origin(kind) is typing.Literal:
        choices = typing.get_args(kind)
        if text not in choices:
            raise UsageError(f"{key}: expected {' or '.join(choices)}, got {text}")
        return text
    if accepts(kind, bool):
        if text.lower() not in ("true", "false"):
            raise UsageError(f"{key}: expected true or false, got {text}")
        return text.lower() == "true"
    if accepts(kind, int):
        try:
            return int(text)
        except ValueError:
            raise UsageError(f"{key}: expected an integer, got {text}") from None
    return text


def help_page(page: str) -> str:
    """``page``, and every key from the dataclass."""
    lines = [page.rstrip().replace("MMLU_FOLDER", str(QUESTIONS)), ""]
    for key in keys_of(EvaluateConfig).values():
        default = "" if key.default is None else f" (default {json.dumps(key.default)})"
        lines.append(f"  {key.name + '=':<14} {key.doc}{default}")
    return "\n".join([*lines, *(f"  {name + '=':<14} {doc}" for name, doc in OWN.items())])


def words(result: dict[str, Any]) -> list[str]:
    """The result as a table for people."""
    what = f"{result['checkpoint']} (step {result['step']})" if result["kind"] == "checkpoint" else result["where"]
    lines = [f"{what}: {result['kind']}, {result['dtype']} on {result['device']}, rows of {result['max_length']}"]
    if held := result.get("heldout"):
        lines.append(f"held-out text, bits per byte     {held['heldout_bpb']:.4f}  ({held['targets']:,} targets)")
        names = [key for key in held if key.startswith("heldout_bpb.")]
        lines += [f"  {key.removeprefix('heldout_bpb.'):<30} {held[key]:.4f}" for key in names]
        by = held["loss_by_position"]
        if by["early"] is not None and by["late"] is not None:
            lines.append(
                f"loss at positions below {by['early_below']} / from {by['late_from']}: "
                f"{by['early']:.3f} / {by['late']:.3f} nats per target"
            )
        same = "equals" if result["decoding"]["equal"] else "DIFFERS FROM"
        lines.append(f"decoding with carried state {same} recomputing ({result['decoding']['tokens']} tokens)")
    if mmlu := result.get("mmlu"):
        lines.append(
            f"{mmlu['folder']}, {mmlu['num_fewshot']}-shot, {mmlu['format']}: accuracy {mmlu['acc_micro']:.3f} "
            f"+- {mmlu['acc_micro_stderr']:.3f} over {mmlu['questions']} questions, mean of subjects "
            f"{mmlu['acc_macro']:.3f}; chance is {mmlu['chance']}"
            + (f"; by length of the options {mmlu['acc_norm_micro']:.3f}" if "acc_norm_micro" in mmlu else "")
        )
        lines += [
            f"  {name:<30} {line['acc']:.3f} +- {line['acc_stderr']:.3f}  ({line['questions']} questions)"
            for name, line in mmlu["subjects"].items()
        ]
    for name, line in result.get("tasks", {}).items():
        metrics = ", ".join(f"{key} {value:.4f}" for key, value in line.items() if isinstance(value, float))
        lines.append(f"{name}, {line['num_fewshot']}-shot: {metrics}")
    if result.get("truncated_requests"):
        lines.append(f"{result['truncated_requests']} requests were longer than {result['max_length']} tokens and cut")
    return lines
