"""The report page: what it says, that it stands alone, that nothing in a run folder becomes markup."""

from __future__ import annotations

import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lmtrain.errors import DataError, UsageError
from lmtrain.report.page import write_report
from tests.small_run import train, words

HOSTILE = (
    "</pre></style></title><script>alert(1)</script><img src=http://evil.example/x onerror='alert(2)'>\"'{{ 7*7 }}"
)

spec = importlib.util.spec_from_file_location("report_command", Path(__file__).parents[2] / "launch" / "report.py")
assert spec is not None and spec.loader is not None
command = importlib.util.module_from_spec(spec)
spec.loader.exec_module(command)


class Page(HTMLParser):
    """Tags, attributes, ids and visible text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(self.source)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta",):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text += data


def test_the_page_tells_the_run(run_dir: Path) -> None:
    path = write_report(run_dir)
    page = Page(path)
    assert path == run_dir / "report.html" and path.stat().st_size < 1_500_000
    for told in (
        "4 residual branches (1 mamba2, 2 moe and 1 attention) of width 32",
        "3,072 tokens in 24 steps",
        "on 2 processes (A Processor), in 2 attempts",
        "2.100 bits per byte, down from 4.000: below token unigram (3.40) and token bigram (2.20), not yet below xz",
        "finished",
        "Training loss by source",
        "clipped at 1",
        "Load of the experts in branch 1 (moe)",
        "control/stop",
        "Skipped or not finite: step 5 (gradient norm is nan).",
        "completion",
        "0.4125",
        "6.25",
        "NemotronHForCausalLM",
        "Left out: this run has no checkpoint.",
        "# Experts a token uses.",
    ):
        assert told in page.text, told
    samples = [page.text.index(sample) for sample in ("x9 qqL e", "width):\n    return", "return width * height")]
    assert samples == sorted(samples)
    assert page.tags.count("figure") == page.tags.count("figcaption") + 3
    assert page.tags.count("title") > 0 and len(re.findall(r'role="img" aria-label="[^"]+"', page.source)) >= 9
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_the_page_stands_alone(run_dir: Path) -> None:
    page = Page(write_report(run_dir))
    links = [value for name, value in page.attributes if name in ("src", "href", "srcset", "action", "data", "poster")]
    assert links and all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert all(inside.startswith("#") for inside in re.findall(r"url\(\s*['\"]?([^)]*)", page.source))
    assert not re.search(r"https?://|@import|<script|<link|javascript:", page.source, re.IGNORECASE)
    assert "default-src 'none'" in page.source


def _hostile(run_dir: Path) -> Path:
    """The run with HOSTILE wherever a string can stand."""
    hostile = run_dir.with_name("<img src=x onerror=alert(1)>")
    run_dir.rename(hostile)
    rows = [json.loads(line) for line in (hostile / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        if row["kind"] == "step":
            row[f"source_loss.{HOSTILE}"] = row["source_loss.code"]
            row["skipped"] = HOSTILE
        if row["kind"] == "eval":
            row |= {"sample": HOSTILE, "sample_prompt": HOSTILE, f"heldout_bpb.{HOSTILE}": 3.0}
    (hostile / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (hostile / "recipe.yaml").write_text(f"model: {HOSTILE}", encoding="utf-8")
    (hostile / "exits.jsonl").write_text(json.dumps({"attempt": HOSTILE, "code": HOSTILE, "reason": HOSTILE}) + "\n")
    (hostile / "summary.json").write_text(json.dumps({f"{HOSTILE}_bpb": 3.0}), encoding="utf-8")
    nested = {HOSTILE: {HOSTILE: HOSTILE, "list": [{HOSTILE: HOSTILE}]}}
    for name in ("evaluation", "environment", "export/lmtrain_export"):
        (hostile / f"{name}.json").write_text(json.dumps(nested), encoding="utf-8")
    return hostile


def test_hostile_strings_are_inert(run_dir: Path) -> None:
    page = Page(write_report(_hostile(run_dir)))
    assert not {"script", "img", "iframe", "object", "link"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert all(not value.startswith("http") for name, value in page.attributes if name in ("src", "href"))
    assert page.text.count("<script>alert(1)</script>") > 10
    assert "{{ 7*7 }}" in page.text and "<img src=x onerror=alert(1)>" in page.text


def test_secrets_stay_out(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "sesame-sesame")
    (run_dir / "evaluation.json").write_text(json.dumps({"judge": {"header": "Bearer sesame-sesame"}}))
    recipe = run_dir / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("nowhere/code", "s3://me:sesame-sesame@bucket/code"))
    source = Page(write_report(run_dir)).source
    assert "sesame" not in source and "***@bucket/code" in source


@pytest.mark.parametrize(
    "missing",
    ["recipe.yaml", "metrics.jsonl", "exits.jsonl", "summary.json", "evaluation.json", "export", "environment.json"],
)
def test_a_missing_piece_is_left_out(run_dir: Path, missing: str) -> None:
    (run_dir / missing).rename(run_dir.parent / "away")
    page = Page(write_report(run_dir))
    assert ("Training loss" in page.text) == (missing != "metrics.jsonl")
    assert ("no exit recorded" in page.text) == (missing == "exits.jsonl")


def test_a_run_that_only_began(run_dir: Path) -> None:
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for kept in (1, 2, 3):
        (run_dir / "metrics.jsonl").write_text("".join(lines[:kept]) + '{"kind":"st', encoding="utf-8")
        assert ("No optimizer step is recorded" in Page(write_report(run_dir)).text) == (kept < 3)


def test_damage_is_told(run_dir: Path) -> None:
    (run_dir / "summary.json").write_text("{", encoding="utf-8")
    (run_dir / "recipe.yaml").write_text("model: {d_modle: 3}", encoding="utf-8")
    text = Page(write_report(run_dir)).text
    assert "summary.json could not be read" in text
    assert "recipe.yaml is shown as it is" in text and "model: {d_modle: 3}" in text
    (run_dir / "metrics.jsonl").write_text("not a row\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"metrics.jsonl:1"):
        write_report(run_dir)


def test_a_trained_run_has_its_pictures(small_recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "small"
    assert train(words(small_recipe, run)).code == 0
    page = Page(write_report(run))
    assert "Branch 0: ssm (mamba2)" in page.text and "Branch 2: attn (attention)" in page.text
    assert page.text.count("nothing crosses from one document into the other") == 2
    assert "held-out documents of prose and lists" in page.text
    assert "parameters: 4 residual branches" in page.text
    assert (
        "Realised mixture" in page.text and "unknown" not in page.text.split("What it read")[1].split("Which tokens")[0]
    )
    newest = max((run / "checkpoints").glob("step-*"))
    shard = next(newest.glob("shard-*.bin"))
    shard.write_bytes(shard.read_bytes()[:-1])
    Page(write_report(run))


def test_the_command(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(run_dir), f"out={tmp_path / 'page.html'}"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n" and (tmp_path / "page.html").exists()
    assert command.main(["--help"]) == 0
    assert "launch/report.py runs/demo" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["{runs}/small-meo"], 64, "{runs}/small-meo: no run here; did you mean small-moe?"),
        (["{runs}/small-moe", "uot=x"], 64, "uot: unknown key; did you mean out?"),
        (["{runs}/small-moe", "out="], 64, "out: expected a path, got nothing"),
        (["--out"], 64, "--out: unknown option"),
        (["out=x"], 64, "expected one run folder, got 0"),
        (["{runs}/small-moe", "out={runs}/no/such/x"], 74, "{runs}/no/such/x: cannot be written: No such file"),
    ],
)
def test_a_mistake_is_one_line(
    run_dir: Path, capsys: pytest.CaptureFixture[str], argv: list[str], code: int, message: str
) -> None:
    runs = str(run_dir.parent)
    assert command.main([word.replace("{runs}", runs) for word in argv]) == code
    told = capsys.readouterr().err
    assert told.startswith(f"report: {message.replace('{runs}', runs)}") and told.count("\n") == 1


def test_no_run_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run here"):
        write_report(tmp_path / "nothing" / "there")
