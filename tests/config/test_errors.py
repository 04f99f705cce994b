"""Every mistake of a recipe or a command line has one sentence, exit code 64, and says where it was made."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from lmtrain.config import recipe as recipe_module
from lmtrain.config.load import load
from lmtrain.errors import EXIT_USAGE, UsageError

Write = Callable[[str, str], str]

# (lines over the small recipe, or None for the recipe itself; words of the command line; the whole message as a regex)
TABLE = [
    # names
    (None, "recipe=dem", r"recipe error: no recipe is named dem in \S*recipes; did you mean demo\?"),
    (
        None,
        "recipe=demo cluster=laptp",
        r"cluster error: no cluster is named laptp in \S*cluster; did you mean laptop\?",
    ),
    (None, "recipe=no/such.yaml", r"recipe error: no/such\.yaml: no such file"),
    (
        None,
        "seed=1",
        r"command line: no recipe=NAME or recipe=PATH; known: deepseek-v3, demo, gla-1\.3b, .*",
    ),
    # unknown keys
    ("trian: {lr: 1}", "", r"recipe error: x\.yaml: trian: unknown key; did you mean train\?"),
    ("train: {stepz: 1}", "", r"recipe error: x\.yaml: train\.stepz: unknown key; did you mean steps\?"),
    (
        "model: {branches: {attn: {num_head: 3}}}",
        "",
        r"recipe error: x\.yaml: model\.branches\.attn\.num_head: unknown key; did you mean num_heads\?",
    ),
    ("", "train.stpes=1", r"recipe error: command line: train\.stpes: unknown key; did you mean steps\?"),
    ("", "trian.lr=1", r"command line: trian\.lr: unknown key; did you mean train\?"),
    ("", "mesh.spp=2", r"cluster error: command line: mesh\.spp: unknown key; did you mean sp\?"),
    ("data: {sources: {code: {wieght: 1}}}", "", r".*x\.yaml: data\.sources\.code\.wieght: unknown key; .* weight\?"),
    # keys in the wrong file
    ("mesh: {sp: 2}", "", r"recipe error: x\.yaml: mesh: belongs in a cluster profile \(.*\), not in a recipe; .*"),
    ("dtype: float32", "", r"recipe error: x\.yaml: dtype: belongs in a cluster profile .*"),
    ("resume: auto", "", r"recipe error: x\.yaml: resume: belongs on the command line, not in a recipe; .*"),
    (
        "",
        "cluster=x.yaml",
        r"cluster error: small\.yaml: model: belongs in a recipe .*, not in a cluster; .*",
    ),
    # types
    (
        "train: {steps: 50k}",
        "",
        r'recipe error: x\.yaml: train\.steps: expected int or null, got "50k" \(write 50000\)',
    ),
    ("", "data.seq_len=1_k", r'.*command line: data\.seq_len: expected int, got "1_k" \(write 1000\)'),
    ("", "train.batch_tokens='100e9'", r".*expected int, got \"100e9\" \(write 100000000000\)"),
    ("train: {lr: fast}", "", r'recipe error: x\.yaml: train\.lr: expected float, got "fast"'),
    ("train: {lr: .nan}", "", r"recipe error: x\.yaml: train\.lr: expected a finite number, got nan"),
    ("train: {lr: null}", "", r"recipe error: x\.yaml: train\.lr: expected float, got null"),
    ("", "seed=99999999999999999999", r".*seed: expected a number of at most 63 bits, got 99999999999999999999"),
    ("", "model.branches.mlp.d_ff=4e18", r".*command line: model\.branches\.mlp: .*overflow.*"),
    ("", "seed=1.5", r".*seed: expected int, got 1\.5"),
    ("", "seed=true", r".*seed: expected int, got true"),
    ("", "run.dir=3", r".*run\.dir: expected str or null, got 3 \(write '\"3\"'\)"),
    ("", "dry_run=1", r"launch error: command line: dry_run: expected bool, got 1 \(write true\)"),
    ("", "dtype=float16", r'.*dtype: expected auto or float32 or bfloat16 or float64, got "float16"'),
    ("", "train.optimizer.betas=[0.9]", r".*betas: expected \[float, float\], got \[0\.9\]"),
    ("", "train.optimizer.betas=[0.9,a]", r'.*betas: expected \[float, float\], got "a"'),
    ("", "model.pattern=3", r".*model\.pattern: expected str or list of str, got 3.*"),
    ("", "train.schedule=wsd", r'.*train\.schedule: expected keys, got "wsd"'),
    ("", "train.lr.peak=1", r'.*train\.lr: expected float, got {"peak": 1}'),
    ("data: {sources: [a]}", "", r'.*data\.sources: expected NAME: keys, got \["a"\]'),
    ("data: {sources: {code: 3}}", "", r".*data\.sources\.code: expected keys, got 3"),
    ("data: {sources: {on: {path: a}}}", "", r".*data\.sources\.True: a key must be a word; put quotes around it"),
    # missing
    ("data: {sources: {b: {weight: 1}}}", "", r".*x\.yaml: data\.sources\.b\.path: give a folder .*"),
    ("", "data.sources.b.weight=1", r".*command line: data\.sources\.b\.path: give a folder .*"),
    ("", "data.sources.cod.weight=1", r".*line: data\.sources\.cod\.path: give a folder .*them; did you mean code\?"),
    ("data: {sources: {cod: {path: a, weight: -1}}}", "", r".*data\.sources\.cod\.weight: must not be .*, got -1\.0"),
    (
        "",
        "data.policy.stages.b.at=0.5",
        r".*line: data\.policy\.stages\.b\.weights: missing \(.*\): [^;]*; [^;]*read\.",
    ),
    (
        "data: {policy: {kind: staged, stages: {late: {at: 0.5, weights: {code: 1}}}}}",
        "data.policy.stages.lat.at=0.8",
        r".*line: data\.policy\.stages\.lat\.weights: missing .*; did you mean late\?",
    ),
    ("", "model.branches.atn.window=8", r".*line: model\.branches\.atn: expected a kind .*; did you mean attn\?"),
    ("model: {branches: {b: {kind: mlp}}}", "", r".*x\.yaml: model\.branches\.b\.d_ff: missing \(int\): .*"),
    # branches
    (
        "model: {branches: {ssm: {kind: manba2}}}",
        "",
        r".*x\.yaml: .*ssm\.kind: unknown kind manba2; did you mean mamba2\?",
    ),
    ("model: {branches: {b: {d_ff: 3}}}", "", r".*model\.branches\.b: expected a kind and its settings, .*"),
    ("model: {branches: {mlp: {d_ff: 0}}}", "", r".*x\.yaml: model\.branches\.mlp\.d_ff: expected at least 1, got 0"),
    ("model: {d_model: 66}", "", r".*model\.branches\.attn: d_model 66 does not divide by num_heads 4; .*"),
    ("model: {pattern: ssm gla}", "", r".*x\.yaml: model\.pattern: character 5: no branch is named 'gla'.*"),
    # interpolation and YAML
    (
        "train: {lr: '${train.rate}'}",
        "",
        r"recipe error: x\.yaml: train\.lr: Interpolation key 'train\.rate' not found",
    ),
    ("seed: ${mesh.sp}", "", r"recipe error: x\.yaml: seed: Interpolation key 'mesh\.sp' not found"),
    ("seed: ${", "", r"recipe error: x\.yaml: .*"),
    ("seed: 1\nseed: 2", "", r"recipe error: x\.yaml: .*found duplicate key seed.*line 3.*"),
    ("seed: [1", "", r"recipe error: x\.yaml: .*line 2.*"),
    ("seed: !!python/name:os.system x", "", r"recipe error: x\.yaml: .*python/name.*"),
    ("", "train.lr=[1", r"command line: train\.lr: '\[1' is not YAML: .*"),
    # words of the command line
    ("", "seed", r"command line: seed: expected key=value, or --help"),
    ("", "--seed=3", r"command line: --seed=3: expected key=value \(write seed=3\), or --help"),
    ("", "a..b=3", r"command line: a\.\.b=3: expected words with dots between them before the ="),
    # rules of one room and between rooms
    ("checkpoint: {keep_last: 0}", "", r".*x\.yaml: checkpoint\.keep_last: must be at least 1, got 0"),
    (
        "",
        "train.tokens=1e6",
        r".*small\.yaml and command line: train: steps and tokens are both set; keep one .*steps=null.*",
    ),
    ("", "train.steps=null", r".*train: how long\? give one of steps \(optimizer steps\) and tokens"),
    ("", "data.seq_len=100", r".*small\.yaml: train\.batch_tokens: 1024 is no multiple of data\.seq_len 100 .*1000\)"),
    ("", "train.schedule.warmup_tokens=1e6", r".*command line: train\.schedule\.warmup_tokens: .*"),
    ("", "init_from=a branch_from=b", r"command line: init_from and branch_from: give one .*"),
    ("format_version: 2", "", r"recipe error: x\.yaml: format_version: 2 is newer than this lmtrain reads \(1\); .*"),
]


@pytest.mark.parametrize(("lines", "words", "message"), TABLE)
def test_message(write: Write, lines: str | None, words: str, message: str) -> None:
    argv = words.split()
    if lines is not None:
        write("x.yaml", f"base: small.yaml\n{lines}\n")
        argv = ["recipe=x.yaml", *argv]
    with pytest.raises(UsageError) as caught:
        load(argv)
    text = str(caught.value)
    assert re.fullmatch(message, text, re.DOTALL), text
    assert "\n" not in text or "model.pattern" in text, text
    assert caught.value.exit_code == EXIT_USAGE
    assert not Path("runs").exists()


def test_cycle_of_bases(write: Write) -> None:
    write("a.yaml", "base: b.yaml")
    write("b.yaml", "base: a.yaml")
    with pytest.raises(UsageError, match=r"recipe error: base: a\.yaml -> b\.yaml -> a\.yaml is a cycle"):
        load(["recipe=a.yaml"])


def test_missing_key_of_a_recipe_names_its_file(write: Write) -> None:
    write("x.yaml", "model: {d_model: 8}\ndata: {tokenizer: t, seq_len: 8}\ntrain: {batch_tokens: 8}\n")
    with pytest.raises(
        UsageError, match=r"^recipe error: x\.yaml: train\.lr: missing \(float\): Peak learning rate\.$"
    ):
        load(["recipe=x.yaml", "train.steps=3"])


def test_no_sources(write: Write) -> None:
    write("x.yaml", "base: small.yaml")
    small = Path("small.yaml").read_text(encoding="utf-8")
    write("small.yaml", small.replace("  sources:\n    code: {path: data/code}\n", ""))
    with pytest.raises(UsageError, match=r"data\.sources: no sources; name at least one"):
        load(["recipe=x.yaml"])


def test_renamed_keys_name_the_new_one(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(recipe_module.RENAMED, "train.learning_rate", "train.lr")
    write("x.yaml", "base: small.yaml\ntrain: {learning_rate: 3}")
    with pytest.raises(UsageError, match=r"x\.yaml: train\.learning_rate: was renamed to train\.lr"):
        load(["recipe=x.yaml"])
