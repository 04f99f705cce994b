"""A run, a checkpoint and an export go in; numbers that agree with training and with themselves come out."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from lmtrain.data.batch import make_batch
from lmtrain.data.heldout import Heldout
from lmtrain.eval import command, run
from lmtrain.eval.heldout import by_position, cached_equals_uncached
from lmtrain.eval.run import QUESTIONS, evaluate_run
from lmtrain.hub.folder import write_folder
from lmtrain.hub.llama import Llama
from lmtrain.ops.cross_entropy import IGNORE
from lmtrain.train.metrics import read_metrics
from lmtrain.trained import load_model
from tests.eval.conftest import HYBRID, LLAMA, build

ROOT = Path(__file__).parents[2]
PAGE = "what the program does"


def call(*argv: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = command.main([str(word) for word in argv], PAGE)
    told = capsys.readouterr()
    return code, told.out, told.err


@pytest.fixture(scope="module")
def measured(run_dir: Path) -> dict[str, Any]:
    recipe = load_model(run_dir).recipe
    return evaluate_run(run_dir, max_tokens=recipe.eval.max_tokens)


def test_heldout_bits_are_those_of_the_training_loop(run_dir: Path, measured: dict[str, Any]) -> None:
    (row,) = [row for row in read_metrics(run_dir / "metrics.jsonl") if row["kind"] == "eval" and row["step"] == 3]
    names = [key for key in row if key.startswith("heldout_bpb")]
    assert len(names) == 3 and measured["step"] == 3
    for name in names:
        assert measured["heldout"][name] == pytest.approx(row[name], abs=1e-6)


def test_loss_by_position_counts_every_target_once(run_dir: Path, measured: dict[str, Any]) -> None:
    recipe = load_model(run_dir).recipe
    held = Heldout(recipe.data, recipe.eval.max_tokens)
    expected = sum(held.num_tokens.values()) - sum(held.num_unpredicted.values())
    lines = measured["heldout"]["loss_by_position"]["table"]
    assert sum(line["targets"] for line in lines) == measured["heldout"]["targets"] == expected
    nats = sum(line["nats"] * line["targets"] for line in lines)
    bits = nats / np.log(2) + sum(held.num_unpredicted.values()) * np.log2(held.vocab_size)
    assert bits / measured["heldout"]["bytes"] == pytest.approx(measured["heldout"]["heldout_bpb"], abs=1e-9)


def test_positions_are_sorted_into_powers_of_two() -> None:
    ids = torch.tensor([[0] * 20 + [1] * 281])
    batch = make_batch(ids, ids, source=ids[:, 1:], block=torch.zeros(1, dtype=torch.int64))
    losses = batch.positions.double()
    table = by_position(losses, batch.positions, batch.labels != IGNORE)
    both = [list(range(19)), list(range(280))]  # the last token of a document predicts nothing
    for index, (low, high) in enumerate(
        [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63), (64, 127), (128, 255)]
    ):
        inside = [position for each in both for position in each if low <= position <= high]
        assert table[index].tolist() == [sum(inside), len(inside)]
    assert table[:, 1].sum() == 299


def test_decoding_with_state_says_what_scoring_says() -> None:
    model = build(HYBRID, 300)
    told = cached_equals_uncached(model, [1, 2, 3], tokens=40)
    assert told["equal"] and told["tokens"] == 40 and told["max_logit_diff"] < 1e-3
    for block in model.blocks:  # a state that is lost between steps must be seen
        original = block.branch.forward
        block.branch.forward = lambda x, ctx, state, streams, call=original: call(x, ctx, {}, streams)
    assert not cached_equals_uncached(model, [1, 2, 3], tokens=40)["equal"]


def test_an_evaluation_leaves_the_random_state_alone(run_dir: Path) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    result = evaluate_run(run_dir, heldout=True, max_tokens=128, mmlu=QUESTIONS, num_fewshot=0, limit=2)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert result["mmlu"]["questions"] == 4 and result["mmlu"]["limit"] == 2
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_tasks_of_ones_own(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in ("ab cd", "ef")), encoding="utf-8"
    )
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "text.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
    }
    rolling = {"task": "bits", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    writing = {
        "task": "writing",
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{text}}",
    }
    rolling["metric_list"] = [{"metric": "bits_per_byte"}]
    writing |= {"metric_list": [{"metric": "exact_match"}], "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}}
    for task in (rolling, writing):
        (tmp_path / f"{task['task']}.yaml").write_text(yaml.safe_dump(shared | task), encoding="utf-8")
    found = evaluate_run(run_dir, tasks="bits,writing", include=str(tmp_path))["tasks"]
    assert 3 < found["bits"]["bits_per_byte"] < 10 and found["writing"]["exact_match"] == 0.0
    assert found["bits"]["num_fewshot"] == 0 and found["bits"]["questions"] == 2
    code, _, err = call(run_dir, "tasks=bitz", f"include={tmp_path}", capsys=capsys)
    assert code == 64 and err == f"evaluate: tasks: no task bitz in {tmp_path}; did you mean bits?\n"


def test_an_export_is_scored_like_the_model_it_was_made_from(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lmtrain.eval import mmlu
    from lmtrain.eval.adapter import LMTrainLM

    model = build(LLAMA, tokenizer.vocab_size)
    write_folder(tmp_path / "export", Llama(), model, tokenizer, 256, torch.float32)
    code, out, err = call(tmp_path / "export", f"mmlu={QUESTIONS}", "num_fewshot=1", "json=true", capsys=capsys)
    assert code == 0, err
    result = json.loads(out)
    assert result == json.loads((tmp_path / "export" / "evaluation.json").read_text(encoding="utf-8"))
    lm = LMTrainLM(model=model, tokenizer=tokenizer, max_length=256)
    assert result["kind"] == "export" and result["mmlu"] == mmlu.score(lm, QUESTIONS, num_fewshot=1)
    code, _, err = call(tmp_path / "export", capsys=capsys)
    assert code == 64 and "an export does not know its held-out text" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["RUN", "heldot=true"], 64, "heldot: unknown key; did you mean heldout?"),
        (["RUN", "limit=few"], 64, "limit: expected an integer, got few"),
        (["RUN", "limit=0"], 64, "limit: must be at least 1, got 0"),
        (["RUN", "heldout=maybe"], 64, "heldout: expected true or false, got maybe"),
        (["RUN", "mmlu_format=cloze"], 64, "mmlu_format: expected letter or continuation, got cloze"),
        (["RUN", "tasks=x"], 64, "tasks=NAME,... and include=FOLDER go together"),
        (["RUN", "OTHER"], 64, "OTHER: expected key=value"),
        (["limit=3"], 64, "name the folder of a run, a checkpoint or an export first"),
        (["RUN/nothing"], 65, "RUN/nothing: neither the folder of a run"),
        (["RUN", "mmlu=RUN"], 64, "mmlu=RUN: no test/SUBJECT_test.csv there"),
        (["RUN", "max_tokens=64", "out=RUN/no/such.json"], 74, "RUN/no/such.json: No such file or directory"),
    ],
)
def test_errors_are_one_line(
    argv: list[str], code: int, message: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    got, _, err = call(*(word.replace("RUN", str(run_dir)) for word in argv), capsys=capsys)
    assert (got, err.count("\n")) == (code, 1), err
    assert err.startswith(f"evaluate: {message.replace('RUN', str(run_dir))}")


def test_where_results_go(run_dir: Path, tmp_path: Path) -> None:
    assert run.default_path("runs/x") == Path("runs/x/evaluation.json")
    assert run.default_path("runs/x/checkpoints/step-00000002") == Path("runs/x/evaluation-step-00000002.json")
    older = evaluate_run(run_dir / "checkpoints" / "step-00000002", max_tokens=64)
    assert older["step"] == 2 and older["checkpoint"].endswith("step-00000002")


def test_the_script_by_hand(run_dir: Path, tmp_path: Path) -> None:
    """As a user starts it: the script's folder comes first on the path then, and holds a file called evaluate.py."""
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(ROOT / "launch" / "evaluate.py")]

    def start(*words: object) -> subprocess.CompletedProcess[str]:
        argv = [*script, *map(str, words)]
        return subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    done = start("run", "heldout=true", f"mmlu={QUESTIONS}", "num_fewshot=1", "max_length=512")
    assert done.returncode == 0 and not done.stderr, done.stderr
    for text in ("held-out text, bits per byte", "chance is 0.25", "python_language", "equals recomputing"):
        assert text in done.stdout, done.stdout
    result = json.loads((copy / "evaluation.json").read_text(encoding="utf-8"))
    assert result["format_version"] == 1 and result["versions"]["lm-eval"] and result["mmlu"]["num_fewshot"] == 1
    assert result["settings"]["max_length"] == result["max_length"] == 512 and result["truncated_requests"] == 0
    (tmp_path / "mine.py").write_text(
        "import evaluate\nload = evaluate.load\n\ndef every(docs):\n    return docs\n", "utf-8"
    )
    (tmp_path / "text.jsonl").write_text('{"text": "ab cd"}\n', encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(
        f"{{task: mine, output_type: loglikelihood_rolling, dataset_path: json, test_split: test, doc_to_text: '', "
        f"doc_to_target: '{{{{text}}}}', metric_list: [{{metric: bits_per_byte}}], process_docs: !function mine.every, "
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/text.jsonl}}, cache_dir: {tmp_path}/cache}}}}\n",
        encoding="utf-8",
    )
    done = start("run", "tasks=mine", f"include={tmp_path}", "out=mine.json")
    assert done.returncode == 0 and "mine, 0-shot: bits_per_byte" in done.stdout, done.stderr
    done = start("--help")
    assert done.returncode == 0 and "python launch/evaluate.py runs/demo" in done.stdout
    assert str(QUESTIONS) in done.stdout and "num_fewshot=" in done.stdout
