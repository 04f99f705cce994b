"""Questions from CSV files stay text, reach the model as lm-eval's own MMLU would put them, and are counted right."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
import yaml
from lm_eval.api.model import LM

from lmtrain.errors import DataError, UsageError
from lmtrain.eval import mmlu
from lmtrain.eval.mmlu import LETTERS, Question, read_csv, read_folder
from lmtrain.eval.run import QUESTIONS

ODD = [
    "None",
    "NaN",
    "0.10",
    "01",
    "1e3",
    "True",
    "N/A",
    "",
    "2019-01-01",
    'say "hi"',
    "a, b",
    "two\nlines",
    " padded ",
]
SIZES = {"odd_things": 13, "plain": 8, "one": 2}


def write(folder: Path, name: str, split: str, rows: list[Question]) -> None:
    path = folder / split / f"{name}_{split}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([q.question, *q.choices, LETTERS[q.answer]] for q in rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three subjects of different sizes; one of nothing but oddities, one whose options all look like dates."""
    root, draw = tmp_path_factory.mktemp("mmlu"), random.Random(0)
    for name, size in SIZES.items():
        for split, count in (("test", size), ("dev", 5)):
            rows = []
            for index in range(count):
                options = (
                    [draw.choice(ODD) for _ in LETTERS] if name == "odd_things" else [f"199{n}-01-01" for n in range(4)]
                )
                rows.append(Question(f"{name} {split} {index}, {ODD[index % len(ODD)]}?", tuple(options), index % 4))
            write(root, name, split, rows)
    return root


class Rigged(LM):
    """Knows the right letter of the questions it is told to know, and answers the next letter elsewhere."""

    def __init__(self, folder: Path, knows: Any) -> None:
        super().__init__()
        self.prompts: list[str] = []
        self.answers: dict[str, str] = {}
        for name, rows in read_folder(folder, "test").items():
            for index, q in enumerate(rows):
                letter = LETTERS[(q.answer + (not knows(name, index))) % 4]
                options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, q.choices, strict=True))
                self.answers[f"{q.question.strip()}\n{options}\nAnswer:"] = letter

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        found = []
        for request in requests:
            prompt, letter = request.args
            self.prompts.append(prompt)
            (answer,) = [known for question, known in self.answers.items() if prompt.endswith(question)]
            found.append((0.0, True) if letter == f" {answer}" else (-1.0, False))
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        raise AssertionError("not asked for")

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        raise AssertionError("not asked for")


def test_a_rigged_model_gets_exactly_its_accuracy(folder: Path) -> None:
    lm = Rigged(folder, lambda name, index: index % 3 == 0)
    result = mmlu.score(lm, folder, num_fewshot=2)
    right = {name: sum(index % 3 == 0 for index in range(size)) for name, size in SIZES.items()}
    assert {name: line["acc"] for name, line in result["subjects"].items()} == {n: right[n] / SIZES[n] for n in SIZES}
    assert result["acc_micro"] == pytest.approx(sum(right.values()) / sum(SIZES.values()), abs=1e-12)
    assert result["acc_macro"] == pytest.approx(sum(right[n] / SIZES[n] for n in SIZES) / 3, abs=1e-12)
    micro, total = result["acc_micro"], sum(SIZES.values())
    assert result["acc_micro_stderr"] == pytest.approx((micro * (1 - micro) / (total - 1)) ** 0.5)
    facts = {"format": "letter", "num_fewshot": 2, "questions": total, "limit": None, "chance": 0.25}
    assert facts.items() <= result.items()
    assert len(lm.prompts) == 4 * total


def test_the_prompt_is_that_of_lm_eval(folder: Path) -> None:
    lm = Rigged(folder, lambda name, index: True)
    assert mmlu.score(lm, folder, num_fewshot=2, limit=1)["acc_micro"] == 1.0
    dev, test = read_folder(folder, "dev")["odd_things"], read_folder(folder, "test")["odd_things"]
    parts = [
        _block(dev[0]) + f" {LETTERS[dev[0].answer]}",
        _block(dev[1]) + f" {LETTERS[dev[1].answer]}",
        _block(test[0]),
    ]
    head = "The following are multiple choice questions (with answers) about odd things.\n\n"
    assert lm.prompts.count(head + "\n\n".join(parts)) == 4
    installed = Path(lm_eval.__file__).parent / "tasks" / "mmlu"
    for form, path in (
        ("letter", "default/_default_template_yaml"),
        ("continuation", "continuation/_continuation_template_yaml"),
    ):
        theirs = yaml.safe_load((installed / path).read_text(encoding="utf-8"))
        ours = yaml.safe_load((mmlu.TEMPLATES / f"mmlu_{form}.yaml").read_text(encoding="utf-8"))
        assert all(ours[key] == theirs[key] for key in ("doc_to_text", "doc_to_choice", "doc_to_target", "output_type"))


class Cloze(Rigged):
    """Answers right by the option's text; keeps what it was asked."""

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self.asked = [request.args for request in requests]
        return [(0.0 if continuation == " 1992-01-01" else -1.0, False) for _, continuation in self.asked]


def test_options_are_scored_as_text(folder: Path) -> None:
    lm = Cloze(folder, lambda name, index: True)
    result = mmlu.score(lm, folder, num_fewshot=1, form="continuation")
    plain = read_folder(folder, "test")["plain"]
    expected = sum(q.choices[q.answer] == "1992-01-01" for q in plain) / len(plain)
    assert result["subjects"]["plain"]["acc"] == result["subjects"]["plain"]["acc_norm"] == expected > 0
    test, dev = read_folder(folder, "test")["odd_things"], read_folder(folder, "dev")["odd_things"][0]
    head = "The following are questions (with answers) about odd things.\n\n"
    shot = f"Question: {dev.question.strip()}\nAnswer: {dev.choices[dev.answer]}\n\n"
    for q in test:
        for choice in q.choices:
            assert (f"{head}{shot}Question: {q.question.strip()}\nAnswer:", f" {choice}") in lm.asked


def _block(q: Question) -> str:
    return q.question.strip() + "".join(f"\n{a}. {c}" for a, c in zip(LETTERS, q.choices, strict=True)) + "\nAnswer:"


def test_csv_is_text(tmp_path: Path) -> None:
    rows = [Question(ODD[i], (ODD[i - 1], ODD[i - 2], ODD[i - 3], ODD[i - 4]), i % 4) for i in range(len(ODD))]
    write(tmp_path, "odd", "test", rows)
    assert read_csv(tmp_path / "test" / "odd_test.csv") == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q,a,b,c,d\n", "row 1: 5 fields"),
        ("q,a,b,c,d,A\nq,a,b,c,d,E\n", "row 2: the answer is 'E'"),
        ('q,a,b,c,d,"A\n', "unexpected end of data"),
        ("", "no questions"),
    ],
)
def test_a_damaged_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x_test.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        read_csv(path)
    assert str(path) in str(caught.value)


def test_what_is_missing_is_told(folder: Path, tmp_path: Path) -> None:
    lm = Rigged(folder, lambda name, index: True)
    with pytest.raises(UsageError, match="no test/SUBJECT_test"):
        mmlu.score(lm, tmp_path)
    with pytest.raises(UsageError, match="has 5 rows; use num_fewshot=5 or fewer"):
        mmlu.score(lm, folder, num_fewshot=6)


def test_random_state_is_as_before(folder: Path) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    mmlu.score(Rigged(folder, lambda name, index: True), folder, num_fewshot=0, limit=1)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_the_questions_that_ship_are_well_formed() -> None:
    test, dev = read_folder(QUESTIONS, "test"), read_folder(QUESTIONS, "dev")
    assert {name: len(rows) for name, rows in test.items()} == {"python_language": 20, "standard_library": 20}
    assert all(len(rows) == 5 for rows in dev.values())
    everything = [q for rows in (*test.values(), *dev.values()) for q in rows]
    assert len({q.question for q in everything}) == len(everything)
    assert all(len(set(q.choices)) == 4 for q in everything)
    for rows in test.values():  # a model that always says one letter must not look clever
        assert max([q.answer for q in rows].count(letter) for letter in range(4)) <= 6
