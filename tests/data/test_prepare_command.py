"""launch/prepare.py from the outside: a corpus in, data that a loader reads out, one line for every mistake."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lmtrain.data.config import DataConfig, SourceConfig
from lmtrain.data.loader import Loader
from lmtrain.data.schedule import ScheduleLog
from lmtrain.errors import UsageError

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("prepare_command", ROOT / "launch" / "prepare.py")
assert spec is not None and spec.loader is not None
prepare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)


def test_text_to_batches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make_text: Callable[[int, int], str]
) -> None:
    (tmp_path / "text").mkdir()
    for i in range(30):
        (tmp_path / "text" / f"{i}.txt").write_text(make_text(i, 60), encoding="utf-8")
    out = tmp_path / "out"
    command = [f"out={out}", "tokenizer=train:300", "heldout=0.1", f"sources.mine.path={tmp_path / 'text'}"]
    assert prepare.main(command) == 0
    assert "mine: " in capsys.readouterr().out
    assert prepare.main(command) == 0 and "nothing to do" in capsys.readouterr().out
    assert prepare.main(["verify", str(out)]) == 0 and prepare.main(["verify", str(out / "mine")]) == 0
    assert "verified" in capsys.readouterr().out
    cfg = DataConfig(str(out / "tokenizer.json"), 32, {"mine": SourceConfig(str(out / "mine"))})
    log = ScheduleLog.fixed({"mine": 1})
    loader = Loader(cfg, seed=0, batch_tokens=64, microbatch=2, dp_rank=0, dp_size=1, log=log)
    assert next(iter(loader.steps(0, 2))).micro_batches[0].tokens.shape == (2, 32)
    tokens = bytearray((out / "mine" / "train.bin").read_bytes())
    tokens[100] ^= 1
    (out / "mine" / "train.bin").write_bytes(tokens)
    assert prepare.main(["verify", str(out)]) == 65
    assert "train.bin: expected xxh3-128" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["out=x", "tokenzier=y"], 64, "tokenzier: unknown key; did you mean tokenizer?"),
        (["out=x", "sources.a.pth=y"], 64, "sources.a.pth: unknown key; did you mean path?"),
        (["out=x", "sources.a=y"], 64, "sources.a: write sources.NAME.path="),
        (["out=x", "sources.a.text_field=y"], 64, "sources.a.path: missing"),
        (["out=x", "sources.a.path=y"], 64, "tokenizer: missing"),
        (["--out", "x"], 64, "--out: expected key=value"),
        (["heldout=few", "out=x"], 64, "heldout: expected a number, got few"),
        (["workers=1.5"], 64, "workers: expected an integer, got 1.5"),
        (["overwrite=yes"], 64, "overwrite: expected true or false, got yes"),
        (["out=x", "tokenizer=none.json", "sources.a.path=y/z.txt"], 65, "none.json: no such tokenizer"),
        (["out=x", "tokenizer=train:300", "sources.a.path=y/z.txt"], 65, "y/z.txt: no such file or folder"),
        (["verify"], 64, "verify: expected one folder"),
        (["verify", "nowhere"], 65, "nowhere: no manifest.json there"),
        (["python-corpus"], 64, "python-corpus: expected out=FOLDER"),
    ],
)
def test_mistakes(
    words: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert prepare.main(words) == code
    error = capsys.readouterr().err
    assert message in error and error.startswith("prepare: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_values() -> None:
    words = "out=1e3 tokenizer=train:300 workers=2 heldout=0 overwrite=True eod=</s>"
    cfg = prepare.parse([*words.split(), "sources.a.path=x=y", "sources.a.split=v"])
    assert (cfg.out, cfg.workers, cfg.heldout, cfg.overwrite, cfg.eod) == ("1e3", 2, 0.0, True, "</s>")
    assert cfg.sources["a"].path == "x=y" and cfg.sources["a"].split == "v"
    with pytest.raises(UsageError):
        prepare.parse([])


def test_help_and_the_program_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare.main([]) == 0
    page = capsys.readouterr().out
    for word in ("python-corpus", "verify", "sources.NAME.text_field=", "heldout=", "(default 0.01)"):
        assert word in page
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, ROOT / "launch/prepare.py", "--help"], capture_output=True, env=environment)
    assert run.returncode == 0 and run.stdout.decode() == page
