"""MMLU, or questions of your own, from a local folder in Hendrycks' layout, scored by lm-eval.

The layout: ``test/SUBJECT_test.csv`` and, for the shots, ``dev/SUBJECT_dev.csv``; no header; question, four options,
the answer's letter. Everything is text: readers that guess types change the options ``None`` and ``0.10``.
"""

from __future__ import annotations

import csv
import hashlib
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet
import yaml
from lm_eval.api.model import LM

from lmtrain.errors import DataError, UsageError
from lmtrain.eval.harness import run_tasks

LETTERS = "ABCD"
CHANCE = 1 / len(LETTERS)
TEMPLATES = Path(__file__).parent / "tasks"
DESCRIPTIONS = {
    "letter": "The following are multiple choice questions (with answers) about {subject}.\n\n",
    "continuation": "The following are questions (with answers) about {subject}.\n\n",
}
SCHEMA = pyarrow.schema(
    {"question": pyarrow.string(), "choices": pyarrow.list_(pyarrow.string()), "answer": pyarrow.int64()}
)
Format = Literal["letter", "continuation"]


@dataclass(frozen=True)
class Question:
    """One row; ``answer`` is an index into ``choices``."""

    question: str
    choices: tuple[str, ...]
    answer: int


def read_csv(path: Path) -> list[Question]:
    """The questions of one file, every field as it is written. Raises DataError that names the row."""
    questions = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.reader(file, strict=True), start=1):
                if len(row) != 6:
                    raise DataError(f"{path}: row {number}: {len(row)} fields, not question, A, B, C, D, answer")
                letter = row[5].strip()
                if len(letter) != 1 or letter not in LETTERS:
                    raise DataError(f"{path}: row {number}: the answer is {row[5]!r}, not one of A, B, C, D")
                questions.append(Question(row[0], tuple(row[1:5]), LETTERS.index(letter)))
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}") from None
    if not questions:
        raise DataError(f"{path}: no questions in it")
    return questions


def read_folder(folder: Path, split: str) -> dict[str, list[Question]]:
    """Subject -> questions of ``dev`` or ``test``, in order of subject."""
    ending = f"_{split}.csv"
    return {path.name.removesuffix(ending): read_csv(path) for path in sorted((folder / split).glob(f"*{ending}"))}


def score(
    lm: LM, folder: str | Path, *, num_fewshot: int = 5, limit: int | None = None, form: Format = "letter"
) -> dict[str, Any]:
    """Accuracy by subject, over all questions (``micro``) and over subjects (``macro``: what Hendrycks' script prints).

    num_fewshot: the first rows of ``dev``. limit: questions of each subject. form: letter or continuation (eval/tasks).
    """
    folder = Path(folder)
    test, dev = read_folder(folder, "test"), read_folder(folder, "dev")
    if not test:
        raise UsageError(f"mmlu={folder}: no test/SUBJECT_test.csv there")
    for subject in test:
        if len(dev.get(subject, [])) < num_fewshot:
            there = len(dev.get(subject, []))
            raise UsageError(f"mmlu={folder}: dev/{subject}_dev.csv has {there} rows; use num_fewshot={there} or fewer")
    with tempfile.TemporaryDirectory() as work:
        names = {name: _write_task(Path(work), name, rows, dev.get(name, []), form) for name, rows in test.items()}
        results = run_tasks(lm, work, list(names.values()), num_fewshot=num_fewshot, limit=limit)
    subjects = {subject: _line(results, names[subject]) for subject in test}
    total = sum(line["questions"] for line in subjects.values())
    return {
        "folder": str(folder),
        "sha256": _digest(folder),
        "format": form,
        "num_fewshot": num_fewshot,
        "limit": limit,
        "questions": total,
        "chance": CHANCE,
        **_averages(subjects, total),
        "subjects": subjects,
    }


def _write_task(work: Path, subject: str, test: list[Question], dev: list[Question], form: Format) -> str:
    """Data and YAML of one subject below ``work``; the task's name."""
    name = f"mmlu_{subject}" if form == "letter" else f"mmlu_{subject}_{form}"
    files = {}
    for split, questions in (("test", test), ("dev", dev)):
        if questions:
            files[split] = str(work / f"{name}-{split}.parquet")
            rows = [{"question": q.question, "choices": list(q.choices), "answer": q.answer} for q in questions]
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=SCHEMA), files[split])
    task: dict[str, Any] = {
        "include": str(TEMPLATES / f"mmlu_{form}.yaml"),
        "task": name,
        "description": DESCRIPTIONS[form].format(subject=subject.replace("_", " ")),
        "dataset_kwargs": {"data_files": files, "cache_dir": str(work / "cache")},
    }
    if dev:
        task |= {"fewshot_split": "dev", "fewshot_config": {"sampler": "first_n"}}
    (work / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    return name


def _line(results: Mapping[str, Any], name: str) -> dict[str, Any]:
    measured, count = results["results"][name], int(results["n-samples"][name]["effective"])
    accuracies = {name: float(measured[f"{name},none"]) for name in ("acc", "acc_norm") if f"{name},none" in measured}
    return {"questions": count, **accuracies, "acc_stderr": standard_error(accuracies["acc"], count)}


def _averages(subjects: Mapping[str, Mapping[str, Any]], total: int) -> dict[str, float]:
    found: dict[str, float] = {}
    for metric in ("acc", "acc_norm"):
        lines = [line for line in subjects.values() if metric in line]
        if lines:
            found[f"{metric}_micro"] = sum(line[metric] * line["questions"] for line in lines) / total
            found[f"{metric}_macro"] = sum(line[metric] for line in lines) / len(lines)
    return {**found, "acc_micro_stderr": standard_error(found["acc_micro"], total)}


def standard_error(accuracy: float, count: int) -> float:
    """Of a mean of ``count`` zeros and ones, as lm-eval's closed form has it."""
    return math.sqrt(accuracy * (1 - accuracy) / max(count - 1, 1))


def _digest(folder: Path) -> str:
    """Of all that was read: names and bytes."""
    found = hashlib.sha256()
    for path in sorted([*folder.glob("test/*_test.csv"), *folder.glob("dev/*_dev.csv")]):
        content = path.read_bytes()
        found.update(f"{path.relative_to(folder)} {len(content)}\n".encode() + content)
    return found.hexdigest()
