"""Help is made of the settings classes: every key is there, with type, default and its sentence."""

from __future__ import annotations

import dataclasses

import pytest

from lmtrain.config.files import names
from lmtrain.config.help import answer, explain, overview
from lmtrain.config.recipe import SECTIONS, branch_kinds, keys
from lmtrain.config.schema import every_key
from lmtrain.errors import UsageError


def test_sections_share_no_key() -> None:
    every = [key for section in SECTIONS for key in keys(section)]
    assert len(every) == len(set(every))


def test_every_key_has_a_sentence_and_appears_in_help() -> None:
    kinds = branch_kinds()
    for section, cls in SECTIONS.items():
        pages = {key: explain(key) for key in keys(section)}
        for dotted, key in every_key(cls, kinds):
            page = pages[dotted.partition(".")[0]]
            assert key.doc, dotted
            assert f"{dotted}: " in page
            assert key.doc.split(".")[0][:40] in " ".join(page.split())


def test_the_settings_of_branches_are_explained_by_kind() -> None:
    for kind, cls in branch_kinds().items():
        page = explain(f"model.branches.{kind}")
        for field in dataclasses.fields(cls):
            assert f"model.branches.{kind}.{field.name}: " in page


def test_a_page_names_type_and_default() -> None:
    page = explain("train.optimizer")
    assert "train.optimizer.betas: [float, float], default [0.9, 0.95]\n    Decay of the first and second" in page
    assert "train.optimizer.clip_norm: float or null, default 1.0" in page
    assert "train.lr" not in page
    assert explain("train.lr") == "train.lr: float, required\n    Peak learning rate."


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["recipe=demo", "--help"], ["help"]])
def test_overview_teaches(argv: list[str]) -> None:
    page = answer(argv)
    assert page == overview()
    for section in SECTIONS:
        assert all(f"    {key}" in page for key in keys(section))
    assert all(f"recipe={name}" in page for name in names("recipe"))
    assert "A small hybrid (Mamba-2, attention, mixture of experts)" in page
    assert "cluster=laptop" in page


def test_no_help_asked() -> None:
    assert answer(["recipe=demo", "seed=1"]) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train.optimiser", "did you mean train.optimizer"),
        ("model.branches.manba2", "did you mean model.branches.mamba2"),
        ("xyzzy", "--help lists the top level"),
    ],
)
def test_unknown_page(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        answer([f"help={name}"])
