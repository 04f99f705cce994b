"""wandb: absent, broken everywhere, and offline for real; training never notices."""

import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from lmtrain.train.config import WandbConfig
from lmtrain.train.wandb_view import WandbView

ON = WandbConfig(enabled=True, project="test")
ROW = {"kind": "step", "step": 1, "tokens": 64, "attempt": 1, "loss": 2.5, "mfu": None}
EVAL = {"kind": "eval", "step": 1, "tokens": 64, "attempt": 1, "heldout_bpb": 1.5}


def view(folder: Path, warnings: list[str], cfg: WandbConfig = ON) -> WandbView:
    return WandbView(cfg, folder, 1, {"train": {"lr": 0.1}}, warnings.append)


def use(view: WandbView) -> None:
    view.log(ROW)
    view.log(EVAL)
    view.close()
    view.close()


class Broken:
    """A wandb whose method ``broken`` raises; counts the calls that came through."""

    def __init__(self, broken: str) -> None:
        self.broken, self.calls = broken, {}  # type: tuple[str, dict[str, Any]]

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == self.broken:
                raise ConnectionError("no route to host")
            self.calls.setdefault(name, []).append((args, kwargs))
            return self

        return call


@pytest.mark.parametrize("broken", ["Settings", "init", "define_metric", "log", "finish"])
def test_an_exception_anywhere_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    fake = Broken(broken)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    warnings: list[str] = []
    use(view(tmp_path, warnings))
    assert len(warnings) == 1 and "ConnectionError: no route to host" in warnings[0]


def test_wandb_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    warnings: list[str] = []
    use(view(tmp_path, warnings))
    assert len(warnings) == 1 and "Error" in warnings[0]


@pytest.mark.parametrize(
    ("variables", "mode"),
    [
        ({}, "offline"),
        ({"WANDB_API_KEY": "k"}, "online"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, "disabled"),
    ],
)
def test_mode_and_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], mode: str) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    fake = Broken("nothing")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    use(view(tmp_path / "my-run", []))
    options = fake.calls["init"][0][1]
    assert options["mode"] == mode and options["group"] == "my-run" and options["name"] == "my-run.1"
    assert fake.calls["log"][0][0] == ({"step": 1, "tokens": 64, "attempt": 1, "loss": 2.5},)
    assert (("*",), {"step_metric": "step"}) in fake.calls["define_metric"] and len(fake.calls["finish"]) == 1


def test_disabled_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    warnings: list[str] = []
    use(view(tmp_path, warnings, WandbConfig()))
    assert not warnings


def test_offline_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    warnings: list[str] = []
    use(view(tmp_path, warnings))
    assert not warnings
    (record,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    # wandb's own process writes the file, shortly after finish() has returned.
    end = time.monotonic() + 30
    while b"heldout_bpb" not in record.read_bytes():
        assert time.monotonic() < end, "wandb wrote nothing"
        time.sleep(0.05)
