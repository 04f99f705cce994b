"""What is installed: the console script, the mapped packages, and what the lowest rooms import."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lmtrain
from lmtrain import cli

ROOT = Path(__file__).parents[1]

# `lmtrain.ops` and `lmtrain.model` must run where only torch is installed
ROOMS_OF_TORCH_ALONE = ("lmtrain.ops", "lmtrain.model")

FORBID = """
import importlib.metadata as metadata
import re, sys

def distributions_of_torch():
    todo, names = ["torch"], set()
    while todo:
        name = todo.pop()
        if name in names:
            continue
        names.add(name)
        try:
            wanted = metadata.requires(name) or ()
        except metadata.PackageNotFoundError:
            continue
        todo += [re.match(r"[A-Za-z0-9._-]+", line)[0] for line in wanted if "extra ==" not in line]
    return {re.sub("[-_.]+", "-", name).lower() for name in names}

# numpy is optional to torch, which imports it if it can
allowed = distributions_of_torch() | {"numpy", "lmtrain"}
owners = metadata.packages_distributions()

class Forbid:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        belongs = {re.sub("[-_.]+", "-", owner).lower() for owner in owners.get(top, ())}
        if belongs and not belongs & allowed:
            raise ImportError(f"forbidden: {name}")

sys.meta_path.insert(0, Forbid())
try:
    import rich
except ImportError:
    pass
else:
    raise SystemExit("the hook does not forbid")
"""


@pytest.mark.parametrize("room", ROOMS_OF_TORCH_ALONE)
def test_imports_with_torch_alone(room: str) -> None:
    every_module = f"""
import importlib, pkgutil, {room} as room
found = [module.name for module in pkgutil.walk_packages(room.__path__, "{room}.")]
for name in found:
    if not name.endswith("__main__"):
        importlib.import_module(name)
assert len(found) > 5, found
"""
    done = subprocess.run([sys.executable, "-c", FORBID + every_module], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_version_is_the_package_s() -> None:
    done = subprocess.run([sys.executable, "-m", "lmtrain.cli", "--version"], capture_output=True, text=True)
    assert done.stdout.strip() == f"lmtrain {lmtrain.__version__}"


def test_types_are_shipped() -> None:
    assert (Path(lmtrain.__file__).parent / "py.typed").is_file()


def test_every_installed_package_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower().replace("_", "-")
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"], "scikit-build-core", "cmake", "ninja"]
    for requirement in wanted:
        name = requirement.split(">")[0].lower()
        assert f"\n{name}==" in pins, f"{name} is not in constraints.txt"
    assert "file:" not in pins and "@" not in pins and "+cpu" not in pins


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A launch folder with two verbs and things that are none."""
    (tmp_path / "pretrain.py").write_text('"""Train a model.\n\nMore."""\nimport sys\nsys.exit(len(sys.argv))\n')
    (tmp_path / "broken.py").write_text('"""Not imported by the list."""\nimport nothing_of_this_name\n')
    (tmp_path / "_private.py").write_text("")
    (tmp_path / "slurm").mkdir()
    found = {path.stem: path for path in sorted(tmp_path.glob("[!_]*.py"))}
    monkeypatch.setattr(cli, "verbs", lambda: found)
    return tmp_path


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_the_verbs(launch: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "  broken    Not imported by the list.",
        "  pretrain  Train a model.",
    ]


def test_an_unknown_verb_names_the_nearest(launch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrian"]) == 64
    assert capsys.readouterr().err == "lmtrain: no verb pretrian; did you mean pretrain?\n"


def test_a_verb_runs_with_its_arguments(launch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lmtrain"])
    with pytest.raises(SystemExit) as exit:
        cli.main(["pretrain", "recipe=tiny", "seed=1"])
    assert exit.value.code == 3


def test_the_verbs_are_the_files_of_launch() -> None:
    assert set(cli.verbs()) == {path.stem for path in (ROOT / "launch").glob("[!_]*.py")}
