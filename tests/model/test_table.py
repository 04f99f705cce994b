"""``python -m lmtrain.model``: what it says of every kind, and that docs/models.md says the same."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lmtrain.config.files import names
from lmtrain.config.load import load
from lmtrain.config.recipe import branch_kinds
from lmtrain.hub.match import match
from lmtrain.hub.table import HubClass
from lmtrain.model.__main__ import BEGIN, END, PAGE, classes, known_backends, markdown, page, survey, write
from lmtrain.model.branch import BRANCHES
from lmtrain.model.table import SIZES, Row, rows


@pytest.fixture(scope="module")
def found() -> dict[str, Row]:
    return {row.kind: row for row in rows(branch_kinds())}


def test_every_kind_has_a_row_and_a_sentence(found: dict[str, Row]) -> None:
    assert found.keys() == BRANCHES.keys()
    for row in found.values():
        assert row.about.endswith(".") and 20 < len(row.about) <= 118 and "|" not in row.about, row.about
        assert row.sp == BRANCHES[row.kind].sp and row.num_params > 0 and row.flops_per_token > 0


def test_sizes_are_given_where_there_is_no_default_and_nowhere_else() -> None:
    required = {
        kind: {field.name for field in dataclasses.fields(branch.Config) if field.default is dataclasses.MISSING}
        for kind, branch in BRANCHES.items()
    }
    assert {kind: set(sizes) for kind, sizes in SIZES.items()} == {k: v for k, v in required.items() if v}


@pytest.mark.parametrize(
    ("kind", "ops"),
    [
        ("attention", ["attention"]),
        ("mamba2", ["ssd"]),
        ("kda", ["delta"]),
        ("lightnet", ["log_sum_exp", "gla"]),
        ("lstm", []),
        ("mlp", []),
    ],
)
def test_ops_are_those_the_branch_calls(found: dict[str, Row], kind: str, ops: list[str]) -> None:
    assert found[kind].ops == ops


def test_backends_are_those_of_every_op_whatever_is_installed(found: dict[str, Row]) -> None:
    assert known_backends(found["mamba2"]) == "cpu, fla, reference"
    assert known_backends(found["lightnet"]) == "reference; cpu, fla, reference"
    assert known_backends(found["lstm"]) == ""


def test_classes_have_the_kinds_that_recipes_take_there(found: dict[str, Row]) -> None:
    told = {kind: classes(row) for kind, row in found.items()}
    assert told["lstm"] == [] and "Mamba2" not in told["attention"]
    for name in names("recipe"):
        model = load([f"recipe={name}"]).recipe.model
        taken = match(model)
        if isinstance(taken, HubClass):
            assert all(taken.name in told[model.branches[branch].kind] for branch in model.order()), name


def test_the_page_is_what_the_program_writes(found: dict[str, Row]) -> None:
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    assert rest.partition(END)[0].strip() == markdown(list(found.values())), "run python -m lmtrain.model --docs"


def test_writing_keeps_what_stands_around(tmp_path: Path) -> None:
    path = tmp_path / "models.md"
    path.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n", encoding="utf-8")
    write(path)
    once = path.read_text(encoding="utf-8")
    write(path)
    assert path.read_text(encoding="utf-8") == once
    assert once.startswith(f"above\n{BEGIN}\n| kind") and once.endswith(f"{END}\nbelow\n") and "old" not in once


@pytest.mark.parametrize("text", [None, "", f"{END} {BEGIN}"])
def test_a_page_without_markers_is_refused(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "models.md"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match="expected a page with the markers"):
        write(path)
    assert text is None or path.read_text(encoding="utf-8") == text


def test_a_page_for_a_terminal() -> None:
    lines = page(survey()).splitlines()
    assert [line.split()[0] for line in lines[2 : lines.index("")]] == [row.kind for row in rows(branch_kinds())]
    assert lines[-1].startswith("Backends for ")
    assert any(line.split()[:2] == ["mamba2", "ssd"] for line in lines)


def test_its_json_is_the_survey() -> None:
    done = subprocess.run([sys.executable, "-m", "lmtrain.model", "--json"], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert told == json.loads(json.dumps(survey()))
    assert set(told["kinds"]) == set(BRANCHES) and set(told["kinds"]["gla"]["backends"]) == {"gla"}
