"""The run folder: one recipe, attempts that only grow, exits, requests, and no secrets."""

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lmtrain
from lmtrain.errors import DataError, StorageError, UsageError
from lmtrain.train.environment import describe_run, redact_argv
from lmtrain.train.hardware import describe
from lmtrain.train.run_folder import RunFolder, differences

RECIPE = {"train": {"lr": 0.1, "batch_tokens": 64}, "model": {"pattern": ["a", "b"]}}
CRASH = """
import os, signal, sys
from pathlib import Path
from lmtrain.train.run_folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
print(folder.begin({}), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_folder_is_private(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "a")
    folder.begin({})
    folder.exited(3, 0, "done")
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert all(stat.S_IMODE((folder.path / f).stat().st_mode) == 0o600 for f in ("environment.json", "exits.jsonl"))
    RunFolder(tmp_path / "runs" / "a")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(StorageError, match=r"run\.dir"):
        RunFolder(tmp_path / "file" / "run")


def test_the_same_recipe_resumes_and_another_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.keep_recipe(json.dumps(RECIPE), json.loads)
    stored = (tmp_path / "recipe.yaml").read_bytes()
    folder.keep_recipe(json.dumps(RECIPE, indent=3, sort_keys=True), json.loads)
    other = {"train": {"lr": 0.2, "batch_tokens": 64, "steps": 9}, "model": {"pattern": ["a"]}}
    with pytest.raises(UsageError) as caught:
        folder.keep_recipe(json.dumps(other), json.loads)
    message = str(caught.value)
    assert "train.lr: 0.1 -> 0.2" in message and "train.steps: absent -> 9" in message
    assert "model.pattern: ['a', 'b'] -> ['a']" in message and "batch_tokens" not in message
    assert "branch_from=" in message and "\n" not in message
    assert (tmp_path / "recipe.yaml").read_bytes() == stored


def test_only_the_first_differences_are_shown(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.keep_recipe(json.dumps({f"k{i}": 1 for i in range(9)}), json.loads)
    with pytest.raises(UsageError, match=r"k4: 1 -> 2; and 4 more \(old"):
        folder.keep_recipe(json.dumps({f"k{i}": 2 for i in range(9)}), json.loads)


def test_equal_mappings_do_not_differ() -> None:
    assert differences(RECIPE, json.loads(json.dumps(RECIPE))) == []


def test_attempts_count_over_killed_processes(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(lmtrain.__file__).parents[1])}
    for expected in (1, 2):
        done = subprocess.run(
            [sys.executable, "-c", CRASH, str(tmp_path)], capture_output=True, text=True, env=environment
        )
        assert done.returncode == -signal.SIGKILL and done.stdout == f"{expected}\n"
    folder = RunFolder(tmp_path)
    assert folder.begin({}) == 3 and folder.exits() == []
    folder.exited(10, 75, "stop:\nSIGTERM")
    # Someone deletes environment.json: the exits still know.
    (tmp_path / "environment.json").unlink()
    assert RunFolder(tmp_path).begin({}) == 4
    (row,) = folder.exits()
    assert (row["attempt"], row["step"], row["code"], row["reason"]) == (3, 10, 75, "stop: SIGTERM")


def test_exits_survive_a_torn_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.begin({})
    folder.exited(1, 75, "stopped")
    with open(tmp_path / "exits.jsonl", "ab") as file:
        file.write(b'{"format_ver')
    folder.exited(2, 0, "done")
    assert [row["code"] for row in folder.exits()] == [75, 0]
    assert json.loads((tmp_path / "exits.jsonl").read_text(encoding="utf-8").splitlines()[-1])["code"] == 0


def test_a_damaged_environment_is_told(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"environment\.json: damaged"):
        RunFolder(tmp_path).begin({})


def test_requests_stay_until_they_are_honoured(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert not folder.requested_stop() and not folder.requested_save()
    (folder.control / "stop").touch()
    (folder.control / "save").touch()
    assert folder.requested_stop() and folder.requested_stop() and folder.requested_save()
    folder.honoured("save")
    assert folder.requested_stop() and not folder.requested_save()
    folder.honoured("stop")
    folder.honoured("stop")
    assert not folder.requested_stop()


def test_the_environment_explains_the_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.begin(describe_run(["launch/pretrain.py", "recipe=a b"], describe(torch.device("cpu"))))
    record = folder.environment()
    assert record is not None and record["format_version"] == 1 and record["attempt"] == 1
    assert record["command"] == "launch/pretrain.py 'recipe=a b'" and record["versions"]["torch"] == torch.__version__
    assert record["hardware"]["threads"]["intra_op"] == torch.get_num_threads() and record["hardware"]["gpu"] is None
    assert len(record["code"]["sha256"]) == 64 and record["hardware"]["cpu"]


def test_secrets_do_not_reach_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canary = "canary-0123456789"
    for name in ("WANDB_API_KEY", "HF_TOKEN", "TORCH_SECRET"):
        monkeypatch.setenv(name, canary)
    monkeypatch.setenv("NCCL_HOOK", f"https://user:{canary}x@host/")
    argv = ["pretrain", f"hub.token={canary}", "--api-key", canary, f"run.dir=runs/{canary}", "x=https://me:pw12@h/p"]
    folder = RunFolder(tmp_path)
    folder.keep_recipe(json.dumps({"path": f"s3://{canary}", "url": "https://me:pw12@h/p"}), json.loads)
    folder.keep_recipe(json.dumps({"path": f"s3://{canary}", "url": "https://me:pw12@h/p"}), json.loads)
    folder.begin(describe_run(argv, {}))
    folder.exited(0, 70, f"403 for token {canary}")
    text = "".join(path.read_text(encoding="utf-8") for path in tmp_path.rglob("*") if path.is_file())
    assert canary not in text and "pw12" not in text and "https://***@h/p" in text
    assert folder.environment() and "hub.token=***" in text and '"TORCH_SECRET": "***"' in text


def test_tokens_and_tokenizers_are_no_secrets() -> None:
    argv = [
        "train.tokens=100e9",
        "data.tokenizer=t.model",
        "train.batch_tokens=64",
        "--keys",
        "api_key=x",
        "--hf-token",
        "y",
    ]
    assert redact_argv(argv) == [*argv[:4], "api_key=***", "--hf-token", "***"]
